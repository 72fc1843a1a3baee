"""An assistant behind a guard: it hears only what passed, and says only what passed.

Spoken parts are judged by what the assistant itself recognises in them, and images are not judged: this
guard reads text. With readers (`guard.multimodal`) both are read first, and what nobody can read is refused.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from core_llm.chat import Audio, Message, Text
from core_llm.errors import UserError
from core_llm.sampling import Sampling
from guard.guard import Guard, Verdict
from guard.multimodal import Heard, Readers, marked, put_into_words
from guard.prompt import plain
from guard.windows import EVERY, HOLD_BACK, Window

SIDES = ("input", "output")
OnVerdict = Callable[[str, Verdict], object]
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
        refusal: str = REFUSAL, every: int = EVERY, hold_back: int = HOLD_BACK,
        readers: Readers | None = None,
    ) -> None:  # fmt: skip
        unknown = sorted(set(on) - set(SIDES))
        if unknown or not on or isinstance(on, str):
            raise UserError(f"a guard checks {' and '.join(SIDES)}, not {', '.join(unknown) or repr(on)}")
        Window(every, hold_back)  # raises for numbers that make no sense
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
            if verdict is None and "output" in self.on:
                text = ""  # nothing in it could be judged, so nothing of it is said
            found[row] = Answer(
                self.refusal if blocked else text, "output" if blocked else None, verdict or verdicts[row]
            )
        return [answer for answer in found if answer is not None]

    def stream(
        self,
        conversation: Sequence[Message],
        settings: Sampling | None = None,
        on_verdict: OnVerdict | None = None,
    ) -> Iterator[str]:
        """Yield checked text only; an unsafe continuation ends the answer with the refusal.

        on_verdict: is told each verdict as it is given, with the side that it is on ("input" or "output").
        """
        (reading,) = self._hear([conversation])
        verdict = self._judge_inputs([reading])[0]
        if verdict is not None and on_verdict is not None:
            on_verdict("input", verdict)
        if verdict is not None and verdict.unsafe:
            yield self.refusal
            return
        pieces = self.assistant.stream(conversation, settings)
        if "output" not in self.on:
            yield from pieces
            return
        yield from self._watched(list(reading.messages), pieces, on_verdict)

    def _watched(
        self, heard: list[Message], pieces: Iterator[str], on_verdict: OnVerdict | None
    ) -> Iterator[str]:
        """The answer as far as it was judged safe; a guard that fails ends it, and nothing more is shown."""
        window = Window(self.every, self.hold_back)

        def unsafe() -> bool:
            verdict = self._judge_outputs([heard], [window.to_judge])[0]
            if verdict is not None and on_verdict is not None:
                on_verdict("output", verdict)
            return verdict is not None and verdict.unsafe

        for piece in pieces:
            if not window.add(piece) or not _readable(window.to_judge):
                continue
            if unsafe():
                yield self._break_off(window.released)
                return
            if shown := window.passed():
                yield shown
        if window.unchecked and unsafe():
            yield self._break_off(window.released)
        elif _readable(window.text) and (shown := window.passed(end=True)):
            yield shown

    async def aanswer(
        self, conversations: Sequence[Sequence[Message]], settings: Sampling | None = None
    ) -> list[Answer]:
        """`answer` for asynchronous programs: in a thread, with the same checks."""
        return await asyncio.to_thread(self.answer, conversations, settings)

    async def agenerate(
        self, conversations: Sequence[Sequence[Message]], settings: Sampling | None = None
    ) -> list[str]:
        """`generate` for asynchronous programs."""
        return [answer.text for answer in await self.aanswer(conversations, settings)]

    async def astream(
        self,
        conversation: Sequence[Message],
        settings: Sampling | None = None,
        on_verdict: OnVerdict | None = None,
    ) -> AsyncIterator[str]:
        """`stream` for asynchronous programs; each piece is made in a thread, the loop stays free."""
        pieces = self.stream(conversation, settings, on_verdict)
        try:
            while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
                yield piece
        finally:
            close = getattr(pieces, "close", None)
            if close is not None:
                # Where the reader left during a step, that step still runs: its generator cannot be closed.
                with contextlib.suppress(ValueError):
                    close()

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

    def _judge(self, conversations: Sequence[Sequence[Message]]) -> list[Verdict | None]:
        verdicts: list[Verdict | None] = [None] * len(conversations)
        # An image alone, or an answer without a visible character, holds nothing that could be judged.
        rows = [i for i, messages in enumerate(conversations) if messages and _readable(messages[-1].text)]
        for row, verdict in zip(rows, self.guard.classify([conversations[i] for i in rows]), strict=True):
            verdicts[row] = verdict
        return verdicts


def _readable(text: str) -> bool:
    """Whether a guard would see anything of it: invisible characters are dropped before it reads."""
    return bool(plain(text).strip())
