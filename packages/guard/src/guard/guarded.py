"""An assistant behind a guard: it hears only what passed, and says only what passed.

Spoken parts are judged by what the assistant itself recognises in them, and images are not judged: this
guard reads text. With readers (`guard.multimodal`) both are read first, and what nobody can read is refused.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from core_llm.chat import Audio, Message, Text
from core_llm.errors import UserError
from core_llm.sampling import Sampling
from guard.guard import Guard, Verdict
from guard.multimodal import Heard, Readers, marked, put_into_words

SIDES = ("input", "output")
REFUSAL = "I can't help with that."
# The prompt with which the core learnt to repeat speech.
TRANSCRIBE = "Repeat after me in English:"


class Speaker(Protocol):
    """What is guarded: `core_llm.adapters.Assistant`, or anything that answers like it."""

    def generate(
        self, conversations: Sequence[Sequence[Message]], settings: Sampling | None = None
    ) -> list[str]:
        """Answers to a batch of conversations."""
        ...

    def stream(self, conversation: Sequence[Message], settings: Sampling | None = None) -> Iterator[str]:
        """One answer, piece by piece."""
        ...


@dataclass(frozen=True)
class Answer:
    """What was said. blocked: the side that refused ("input" or "output"), or None. verdict: the decisive
    one, the output's where both passed; None where nothing was judged.
    """

    text: str
    blocked: str | None = None
    verdict: Verdict | None = None


class GuardedAssistant:
    """Answers like its assistant; an unsafe question or answer becomes `refusal`.

    While streaming, every piece waits until the answer up to `every` characters beyond the last check has
    been judged, and the last `hold_back` characters of a checked text wait for the next check, so that no
    phrase gets out in two halves that are each harmless.

    readers: put pictures and sounds into words, see `multimodal.readers_of`. A part that they cannot read, on
    a checked input, is refused; a kind of part that they do not know is an error.
    """

    def __init__(
        self, assistant: Speaker, guard: Guard, on: Collection[str] = SIDES,
        refusal: str = REFUSAL, every: int = 120, hold_back: int = 40, readers: Readers | None = None,
    ) -> None:  # fmt: skip
        unknown = sorted(set(on) - set(SIDES))
        if unknown or not on or isinstance(on, str):
            raise UserError(f"a guard checks {' and '.join(SIDES)}, not {', '.join(unknown) or repr(on)}")
        if every < 1 or hold_back < 0:
            raise UserError("every must be at least 1 character, hold_back not negative")
        self.assistant, self.guard = assistant, guard
        self.on, self.refusal = frozenset(on), refusal
        self.every, self.hold_back = every, hold_back
        self.readers = readers

    def generate(
        self, conversations: Sequence[Sequence[Message]], settings: Sampling | None = None
    ) -> list[str]:
        """Answers or refusals, one per conversation."""
        return [answer.text for answer in self.answer(conversations, settings)]

    def answer(
        self, conversations: Sequence[Sequence[Message]], settings: Sampling | None = None
    ) -> list[Answer]:
        """Answers with what the guard thought of them."""
        readings = self._hear(conversations)
        heard = [list(reading.messages) for reading in readings]
        found: list[Answer | None] = [None] * len(conversations)
        verdicts = self._judge_inputs(readings)
        for row, verdict in enumerate(verdicts):
            if verdict is not None and verdict.unsafe:
                found[row] = Answer(self.refusal, "input", verdict)
        passed = [row for row, answer in enumerate(found) if answer is None]
        texts = self.assistant.generate([conversations[row] for row in passed], settings) if passed else []
        judged = self._judge_outputs([heard[row] for row in passed], texts)
        for row, text, verdict in zip(passed, texts, judged, strict=True):
            blocked = verdict is not None and verdict.unsafe
            found[row] = Answer(
                self.refusal if blocked else text, "output" if blocked else None, verdict or verdicts[row]
            )
        return [answer for answer in found if answer is not None]

    def stream(self, conversation: Sequence[Message], settings: Sampling | None = None) -> Iterator[str]:
        """Yield checked text only; an unsafe continuation ends the answer with the refusal."""
        (reading,) = self._hear([conversation])
        heard = list(reading.messages)
        verdict = self._judge_inputs([reading])[0]
        if verdict is not None and verdict.unsafe:
            yield self.refusal
            return
        pieces = self.assistant.stream(conversation, settings)
        if "output" not in self.on:
            yield from pieces
            return
        said, checked, released = "", 0, 0
        for piece in pieces:
            said += piece
            if len(said) - checked < self.every:
                continue
            if self._unsafe_output(heard, said):
                yield self._break_off(released)
                return
            checked = len(said)
            if checked - self.hold_back > released:
                yield said[released : checked - self.hold_back]
                released = checked - self.hold_back
        if checked < len(said) and self._unsafe_output(heard, said):
            yield self._break_off(released)
        elif released < len(said):
            yield said[released:]

    def _break_off(self, released: int) -> str:
        return f"\n{self.refusal}" if released else self.refusal

    def as_text(self, conversation: Sequence[Message]) -> list[Message]:
        """The conversation as the guard reads it: speech replaced by its transcript, images left out.

        With readers, images are replaced by what these read in them.
        """
        return list(self._hear([conversation])[0].messages)

    def _hear(self, conversations: Sequence[Sequence[Message]]) -> list[Heard]:
        if self.readers is not None:
            return put_into_words(conversations, self.readers)
        return [Heard(tuple(self._as_text(message) for message in messages)) for messages in conversations]

    def _as_text(self, message: Message) -> Message:
        parts = message.parts
        if all(isinstance(part, Text) for part in parts):
            return message
        words = [
            self.assistant.generate([[Message("user", (Text(TRANSCRIBE), part))]])[0]
            if isinstance(part, Audio)
            else part.text
            for part in parts
            if isinstance(part, (Audio, Text))
        ]
        return Message(message.role, " ".join(words))

    def _judge_inputs(self, readings: Sequence[Heard]) -> list[Verdict | None]:
        """Verdicts on the last messages; None where the input is not checked or holds no words."""
        if "input" not in self.on:
            return [None] * len(readings)
        silent = Verdict(True, 1.0, 0.0, {}, ())  # of a part that nobody could read, and no word beside it
        return [
            marked(verdict or silent, reading) if reading.unread else verdict
            for verdict, reading in zip(
                self._judge([reading.messages for reading in readings]), readings, strict=True
            )
        ]

    def _judge_outputs(self, heard: Sequence[list[Message]], texts: Sequence[str]) -> list[Verdict | None]:
        if "output" not in self.on:
            return [None] * len(texts)
        return self._judge([[*h, Message("assistant", t)] for h, t in zip(heard, texts, strict=True)])

    def _unsafe_output(self, heard: list[Message], said: str) -> bool:
        verdict = self._judge_outputs([heard], [said])[0]
        return verdict is not None and verdict.unsafe

    def _judge(self, conversations: Sequence[Sequence[Message]]) -> list[Verdict | None]:
        verdicts: list[Verdict | None] = [None] * len(conversations)
        # An image alone, or an empty answer, holds nothing that could be judged or released.
        rows = [i for i, messages in enumerate(conversations) if messages and messages[-1].text.strip()]
        for row, verdict in zip(rows, self.guard.classify([conversations[i] for i in rows]), strict=True):
            verdicts[row] = verdict
        return verdicts
