"""Conversations of text, images and audio, and their Llama 3 token form.

One message type for the whole project. Media parts only carry their source: adapters decode them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Union

from core_llm.errors import UserError
from core_llm.tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image as PILImage

ROLES = ("system", "user", "assistant", "ipython")


@dataclass(frozen=True)
class Text:
    """Plain text; nothing in it is read as a special token."""

    text: str


@dataclass(frozen=True, eq=False)
class Image:
    """An image: a path, encoded bytes, a PIL image, or uint8 pixels [height, width, 3]."""

    data: "str | Path | bytes | PILImage | np.ndarray"


@dataclass(frozen=True, eq=False)
class Audio:
    """A sound: a path, encoded bytes, or a float32 mono waveform [samples] with its rate in Hz."""

    data: "str | Path | bytes | np.ndarray"
    rate: int | None = None


Part = Union[Text, Image, Audio]


@dataclass(frozen=True)
class Message:
    """One turn. `content` may be a string, one part, or a sequence of parts; `parts` is always a tuple."""

    role: str
    content: "str | Part | Sequence[Part]"

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise UserError(f"unknown role '{self.role}'; known: {', '.join(ROLES)}")

    @property
    def parts(self) -> tuple[Part, ...]:
        """The content as parts."""
        if isinstance(self.content, str):
            return (Text(self.content),)
        if isinstance(self.content, (Text, Image, Audio)):
            return (self.content,)
        return tuple(self.content)

    @property
    def text(self) -> str:
        """All text of the message, media left out."""
        return "".join(part.text for part in self.parts if isinstance(part, Text))


@dataclass(frozen=True)
class Rendered:
    """A conversation as token ids.

    ids: every media part is one placeholder id. loss_mask: true on what the assistant says, its end
    token included. parts: (index in ids, part) of every media part. answer_start: index where the
    content of the last message begins.
    """

    ids: list[int]
    loss_mask: list[bool]
    parts: list[tuple[int, Part]]
    answer_start: int


def render(messages: Sequence[Message], tokenizer: Tokenizer, generation_prompt: bool = True) -> Rendered:
    """Llama 3 chat format; with `generation_prompt` it ends where the assistant begins to speak.

    Raises `UserError` for an empty conversation or one without any content.
    """
    if not messages:
        raise UserError("the conversation is empty: give at least one message")
    if all(isinstance(part, Text) and not part.text.strip() for m in messages for part in m.parts):
        raise UserError("the prompt is empty: give some text, an image or audio")
    ids, loss_mask = [tokenizer.bos_id], [False]
    placed: list[tuple[int, Part]] = []
    answer_start = 1
    for message in messages:
        header = header_ids(message.role, tokenizer)
        ids += header
        loss_mask += [False] * len(header)
        answer_start = len(ids)
        for part in message.parts:
            if isinstance(part, Text):
                ids += tokenizer.encode(part.text)
            else:
                placed.append((len(ids), part))
                ids.append(tokenizer.image_id if isinstance(part, Image) else tokenizer.audio_id)
        ids.append(tokenizer.eot_id)
        loss_mask += [message.role == "assistant"] * (len(ids) - len(loss_mask))
    if generation_prompt:
        header = header_ids("assistant", tokenizer)
        ids += header
        loss_mask += [False] * len(header)
    return Rendered(ids, loss_mask, placed, answer_start)


def header_ids(role: str, tokenizer: Tokenizer) -> list[int]:
    """What stands before the content of a message."""
    if role not in tokenizer.headers:
        start, end = tokenizer.special("<|start_header_id|>"), tokenizer.special("<|end_header_id|>")
        tokenizer.headers[role] = [start, *tokenizer.encode(role), end, *tokenizer.encode("\n\n")]
    return tokenizer.headers[role]
