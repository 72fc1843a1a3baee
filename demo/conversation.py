"""What the user typed, dropped and recorded, as messages; and the answer, watched by the guard."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core_llm.chat import Audio, Image, Message, Part, Text
from core_llm.errors import MediaError, UserError

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

    from core_llm.adapters import Assistant
    from guard import Guard, Verdict

IMAGES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
SOUNDS = frozenset({".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a", ".webm"})


@dataclass(frozen=True)
class Turn:
    """One step of an answer: the text so far, and what the guard said (None: it did not look).

    withheld: the guard put its refusal in place of an answer. blocked: the side that it refused, "input" or
    "output".
    """

    text: str
    input_verdict: "Verdict | None" = None
    output_verdict: "Verdict | None" = None
    withheld: bool = False
    blocked: str | None = None


def user_message(text: str, files: Sequence[str]) -> Message:
    """Images first, then sound, then text: the order that adapters are trained on.

    Raises `MediaError` for a file that is neither image nor sound, `UserError` for nothing at all.
    """
    images: list[Part] = []
    sounds: list[Part] = []
    for name in files:
        suffix = Path(name).suffix.lower()
        if suffix in IMAGES:
            images.append(Image(name))
        elif suffix in SOUNDS:
            sounds.append(Audio(name))
        else:
            raise MediaError(f"{Path(name).name}: neither an image nor a sound this model can take")
    parts = [*images, *sounds, *([Text(text.strip())] if text.strip() else [])]
    if not parts:
        raise UserError("type something, add an image, or record your voice")
    return Message("user", parts)


def answer(
    assistant: "Assistant",
    guard: "Guard | None",
    conversation: Sequence[Message],
    on: frozenset[str],
    max_new_tokens: int = 64,
) -> Iterator[Turn]:
    """Stream the answer; the guard reads the question ("input" in `on`), the answer ("output") or both."""
    from core_llm.sampling import Sampling

    settings = Sampling(max_new_tokens=max_new_tokens)
    if guard is None or not on:
        yield from _streamed(assistant.stream(conversation, settings))
        return
    from guard import GuardedAssistant

    guarded = GuardedAssistant(assistant, guard, on=set(on))
    seen: dict[str, Verdict] = {}
    turn = Turn("")
    for turn in _streamed(guarded.stream(conversation, settings, on_verdict=seen.__setitem__)):
        yield Turn(turn.text, seen.get("input"), seen.get("output"))
    blocked = next((side for side, verdict in seen.items() if verdict.unsafe), None)
    yield Turn(turn.text, seen.get("input"), seen.get("output"), blocked is not None, blocked)


def _streamed(pieces: Iterator[Any]) -> Iterator[Turn]:
    text = ""
    for piece in pieces:
        text += piece
        yield Turn(text)


def transcribe(assistant: "Assistant", path: str) -> str:
    """The words in a sound file, by the recognition prompt of the nano core."""
    from core_llm.data.phrases import REPEAT_PROMPT
    from core_llm.sampling import Sampling

    message = Message("user", (Text(REPEAT_PROMPT), Audio(path)))
    return assistant.generate([[message]], Sampling(max_new_tokens=64))[0]


def attention(assistant: "Assistant", path: str, question: str) -> "PILImage":
    """Question and answer with the picture under the attention of every token of the answer.

    Raises `UserError` for an empty question, or a model that does not read pictures by cross-attention.
    """
    from vision_adapter.explain import explain
    from vision_adapter.overlay import draw

    return draw(explain(assistant, path, question))
