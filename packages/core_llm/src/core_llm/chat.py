"""Conversations of text, images, audio and tool use, and their Llama 3 token form.

One message type for the whole project. Media parts only carry their source: adapters decode them.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union, get_args

from core_llm.errors import UserError
from core_llm.tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image as PILImage

    from core_llm.config import LlamaConfig

ROLES = ("system", "user", "assistant", "ipython", "tool")


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


@dataclass(frozen=True, eq=False)
class Video:
    """A video without its sound: a path, encoded bytes, or its frames in order, each as in `Image`."""

    data: "str | Path | bytes | Sequence[str | Path | bytes | PILImage | np.ndarray]"


@dataclass(frozen=True)
class ToolCall:
    """A tool that the assistant calls: all that its message holds.

    arguments: values by name, or, for the code interpreter of Llama 3.1, the code itself.
    """

    name: str
    arguments: Mapping[str, Any] | str


@dataclass(frozen=True)
class ToolResult:
    """What a tool gave back as JSON values; a result that is text may as well be a `Text`."""

    value: Any


Part = Union[Text, Image, Audio, Video, ToolCall, ToolResult]


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
        if isinstance(self.content, (Text, Image, Audio, Video, ToolCall, ToolResult)):
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


Style = Literal["plain", "llama-3", "llama-3.1", "llama-3.2"]


@dataclass(frozen=True)
class ChatFormat:
    """How a conversation is written for a model.

    style: "plain" writes messages as they are (the nano family); the others are the released templates of
    Llama 3, of 3.1 and 3.3, and of the 3.2 text models, which trim every text and, from 3.1 on, open with
    dates. tools: functions that the model may call, as JSON schemas; None is not the same as an empty list,
    which announces tools without naming one. tools_in_user_message: name them before the first user message,
    not in the system message. builtin_tools: names of the tools that 3.1 was trained to call in Python
    syntax; with them a call ends in `<|eom_id|>`. date: "today" in the system message; fixed by default, so
    that a prompt does not change overnight.
    """

    style: Style = "plain"
    tools: Sequence[Mapping[str, Any]] | None = None
    builtin_tools: Sequence[str] | None = None
    tools_in_user_message: bool = True
    date: str = "26 Jul 2024"

    def __post_init__(self) -> None:
        if self.style not in get_args(Style):
            raise UserError(f"unknown chat style '{self.style}'; known: {', '.join(get_args(Style))}")
        if self.tools is not None and not self.dated:
            raise UserError(f"chat style '{self.style}' has no tools; take llama-3.1 or llama-3.2")
        if self.builtin_tools is not None and self.style != "llama-3.1":
            raise UserError(f"chat style '{self.style}' has no built-in tools; take llama-3.1")

    @property
    def dated(self) -> bool:
        """Whether the style opens with a system message of its own."""
        return self.style in ("llama-3.1", "llama-3.2")

    @classmethod
    def of(cls, config: "LlamaConfig") -> "ChatFormat":
        """The format of the released model of this shape; plain for another vocabulary, such as nano's."""
        if config.vocab_size < 128_256:
            return cls()
        if config.rope_scaling is None:
            return cls("llama-3")
        return cls("llama-3.2" if config.rope_scaling.factor == 32 else "llama-3.1")


PLAIN = ChatFormat()


@dataclass(frozen=True)
class _Turn:
    """A message on its way to ids. pieces: texts, each encoded alone, and media; python: behind the tag."""

    role: str
    pieces: tuple[str | Image | Audio | Video, ...]
    python: bool = False
    end: Literal["eot", "eom"] = "eot"


def render(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    generation_prompt: bool = True,
    chat: ChatFormat = PLAIN,
) -> Rendered:
    """A conversation in a chat format; with `generation_prompt` it ends where the assistant begins to speak.

    Raises `UserError` for an empty conversation, one without any content, or a message that the format
    cannot write.
    """
    if not messages:
        raise UserError("the conversation is empty: give at least one message")
    if all(isinstance(part, Text) and not part.text.strip() for m in messages for part in m.parts):
        raise UserError("the prompt is empty: give some text, an image or audio")
    ids, loss_mask = [tokenizer.bos_id], [False]
    placed: list[tuple[int, Part]] = []
    answer_start = 1
    for turn in _turns(messages, chat):
        header = header_ids(turn.role, tokenizer)
        ids += header
        loss_mask += [False] * len(header)
        answer_start = len(ids)
        if turn.python:
            ids.append(tokenizer.python_tag_id)
        for piece in turn.pieces:
            if isinstance(piece, str):
                ids += tokenizer.encode(piece)
            else:
                placed.append((len(ids), piece))
                # The vocabulary has no token for videos: they stand where pictures stand.
                ids.append(tokenizer.audio_id if isinstance(piece, Audio) else tokenizer.image_id)
        ids.append(tokenizer.eot_id if turn.end == "eot" else tokenizer.eom_id)
        loss_mask += [turn.role == "assistant"] * (len(ids) - len(loss_mask))
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


def _turns(messages: Sequence[Message], chat: ChatFormat) -> list[_Turn]:
    if chat.style == "plain":
        return [_Turn("ipython" if m.role == "tool" else m.role, _spoken(m, chat)) for m in messages]
    if chat.style == "llama-3":
        return [_Turn(m.role, _trimmed(m, chat)) for m in messages]
    return _dated_turns(list(messages), chat)


def _spoken(message: Message, chat: ChatFormat) -> tuple[str | Image | Audio | Video, ...]:
    """Texts and media of a message, in order."""
    pieces: list[str | Image | Audio | Video] = []
    for part in message.parts:
        if isinstance(part, (ToolCall, ToolResult)):
            kind = "tool call" if isinstance(part, ToolCall) else "tool result"
            where = f"in a {message.role} message" if chat.dated else f"in chat style '{chat.style}'"
            raise UserError(f"a {kind} has no place {where}")
        pieces.append(part.text if isinstance(part, Text) else part)
    return tuple(pieces)


def _trimmed(message: Message, chat: ChatFormat, before: str = "") -> tuple[str | Image | Audio | Video, ...]:
    """The message without blanks at its ends and with `before` in front; neighbouring texts are one text."""
    pieces: list[str | Image | Audio | Video] = [""]
    for piece in _spoken(message, chat):
        last = pieces[-1]
        if isinstance(piece, str) and isinstance(last, str):
            pieces[-1] = last + piece
        else:
            pieces.append(piece)
    pieces[0] = str(pieces[0]).lstrip()
    if isinstance(pieces[-1], str):
        pieces[-1] = pieces[-1].rstrip()
    return (before + str(pieces[0]), *pieces[1:])


# What the released templates of 3.1 and 3.2 say around tools, to the letter: the models were tuned on it.
_TOOLS_IN_SYSTEM = (
    "You have access to the following functions. "
    "To call a function, please respond with JSON for a function call."
)
_TOOLS_IN_USER = (
    "Given the following functions, please respond with a JSON for a function call "
    "with its proper arguments that best answers the given prompt.\n\n"
)
_CALL_FORMAT = (
    'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.'
    "Do not use variables.\n\n"
)


def _dated_turns(messages: list[Message], chat: ChatFormat) -> list[_Turn]:
    """The turns of 3.1 and 3.2: a system message is always there, and tools are told of."""
    system = messages.pop(0) if messages[0].role == "system" else Message("system", "")
    listed = "".join(f"{_json(tool, 4)}\n\n" for tool in chat.tools or ())
    opening = "Environment: ipython\n" if (chat.tools, chat.builtin_tools) != (None, None) else ""
    if chat.builtin_tools is not None:
        names = ", ".join(name for name in chat.builtin_tools if name != "code_interpreter")
        opening += f"Tools: {names}\n\n"
    opening += f"Cutting Knowledge Date: December 2023\nToday Date: {chat.date}\n\n"
    if chat.tools is not None and not chat.tools_in_user_message:
        opening += _TOOLS_IN_SYSTEM + _CALL_FORMAT + listed
    turns = [_Turn("system", _trimmed(system, chat, opening))]
    if chat.tools is not None and chat.tools_in_user_message:
        if not messages or messages[0].role != "user":
            raise UserError(
                "tools are named in the first user message, and there is none: "
                "begin with one, or set tools_in_user_message=False"
            )
        turns.append(_Turn("user", _trimmed(messages.pop(0), chat, _TOOLS_IN_USER + _CALL_FORMAT + listed)))
    return turns + [_dated_turn(message, chat) for message in messages]


def _dated_turn(message: Message, chat: ChatFormat) -> _Turn:
    calls = [part for part in message.parts if isinstance(part, ToolCall)]
    if calls and message.role == "assistant":
        rest = [part for part in message.parts if part != Text("")]
        if len(rest) > 1:
            raise UserError("a message with a tool call holds that one call and nothing else")
        return _call(calls[0], chat)
    if message.role in ("ipython", "tool"):
        return _Turn("ipython", (_result(message),))
    return _Turn(message.role, _trimmed(message, chat))


def _call(call: ToolCall, chat: ChatFormat) -> _Turn:
    """A call in Python syntax for a built-in tool, else in JSON."""
    builtin = chat.builtin_tools is not None and call.name in chat.builtin_tools
    end: Literal["eot", "eom"] = "eot" if chat.builtin_tools is None else "eom"
    if isinstance(call.arguments, str):
        if not builtin or call.name != "code_interpreter":
            raise UserError(
                f"the arguments of '{call.name}' must be a mapping; only code_interpreter takes text"
            )
        return _Turn("assistant", (call.arguments,), python=True, end=end)
    if not builtin:
        text = f'{{"name": "{call.name}", "parameters": {_json(call.arguments)}}}'
        return _Turn("assistant", (text,), end=end)
    for name, value in call.arguments.items():
        if not isinstance(value, str):
            raise UserError(f"argument '{name}' of the built-in tool '{call.name}' must be text")
    arguments = ", ".join(f'{name}="{value}"' for name, value in call.arguments.items())
    return _Turn("assistant", (f"{call.name}.call({arguments})",), python=True, end=end)


def _result(message: Message) -> str:
    """What a tool gave back: texts and containers as JSON, other values as Python writes them."""
    if len(message.parts) == 1 and isinstance(message.parts[0], ToolResult):
        value = message.parts[0].value
        return _json(value) if isinstance(value, (str, Mapping, list, tuple)) else str(value)
    if not all(isinstance(part, Text) for part in message.parts):
        raise UserError("a tool's message holds one ToolResult, or text")
    return _json(message.text)


def _json(value: Any, indent: int | None = None) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, indent=indent)
    except (TypeError, ValueError) as error:
        raise UserError(f"a tool, its arguments or its result cannot be written as JSON ({error})") from error
