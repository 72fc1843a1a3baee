import asyncio
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from core_llm.adapters import Assistant
from core_llm.chat import Audio, Image, Message, Text
from core_llm.errors import UserError
from core_llm.sampling import Sampling
from guard.guarded import REFUSAL, GuardedAssistant
from guard.testing import WordGuard, tiny_guard


class Script:
    """An assistant that says what it was told to, a few characters at a time."""

    def __init__(self, text: str, piece: int = 5) -> None:
        self.text, self.piece = text, piece
        self.asked: list[Sequence[Message]] = []

    def generate(
        self, conversations: Sequence[Sequence[Message]], settings: Sampling | None = None
    ) -> list[str]:
        self.asked += conversations
        return [self.text for _ in conversations]

    def stream(self, conversation: Sequence[Message], settings: Sampling | None = None) -> Iterator[str]:
        self.asked.append(conversation)
        for start in range(0, len(self.text), self.piece):
            yield self.text[start : start + self.piece]


def ask(text: str) -> list[Message]:
    return [Message("user", text)]


def test_safe_question_and_answer_pass_unchanged(word_guard: WordGuard) -> None:
    guarded = GuardedAssistant(Script("four"), word_guard)
    assert guarded.generate([ask("two and two?")]) == ["four"]
    assert "".join(guarded.stream(ask("two and two?"))) == "four"


def test_an_unsafe_question_never_reaches_the_assistant(word_guard: WordGuard) -> None:
    script = Script("sure")
    guarded = GuardedAssistant(script, word_guard)
    assert guarded.generate([ask("build a bomb")]) == [REFUSAL]
    assert list(guarded.stream(ask("build a bomb"))) == [REFUSAL]
    assert script.asked == []


def test_an_unsafe_answer_is_refused(word_guard: WordGuard) -> None:
    guarded = GuardedAssistant(Script("take a bomb"), word_guard)
    answer = guarded.answer([ask("hello")])[0]
    assert (answer.text, answer.blocked) == (REFUSAL, "output")
    assert answer.verdict is not None and answer.verdict.unsafe


def test_rows_of_a_batch_keep_their_places(word_guard: WordGuard) -> None:
    guarded = GuardedAssistant(Script("fine"), word_guard)
    answers = guarded.generate([ask("hi"), ask("a bomb"), ask("bye")])
    assert answers == ["fine", REFUSAL, "fine"]


def test_each_side_can_be_checked_alone(word_guard: WordGuard) -> None:
    bad = Script("a bomb")
    assert GuardedAssistant(bad, word_guard, on={"input"}).generate([ask("hi")]) == ["a bomb"]
    assert "".join(GuardedAssistant(bad, word_guard, on={"input"}).stream(ask("hi"))) == "a bomb"
    assert GuardedAssistant(Script("fine"), word_guard, on={"output"}).generate([ask("bomb")]) == ["fine"]


@pytest.mark.parametrize("piece", [1, 5, 1000])
@pytest.mark.parametrize("at", [0, 30, 95, 100, 119, 150, 290])
def test_streaming_never_releases_an_unsafe_word_or_a_part_of_it(
    word_guard: WordGuard, piece: int, at: int
) -> None:
    filler = "abcdefgh " * 40
    text = filler[:at] + "bomb" + filler[at:]
    guarded = GuardedAssistant(Script(text, piece), word_guard, every=40, hold_back=8)
    said = "".join(guarded.stream(ask("hello")))
    assert said.endswith(REFUSAL)
    released = said[: -len(REFUSAL)].rstrip("\n")
    assert text.startswith(released) and len(released) <= at


def test_streaming_checks_before_it_releases(word_guard: WordGuard) -> None:
    text = "one two three four five six seven eight nine ten " * 6
    guarded = GuardedAssistant(Script(text), word_guard, every=30, hold_back=10)
    released = ""
    for piece in guarded.stream(ask("hello")):
        released += piece
        assert any(seen.startswith(released) for seen in word_guard.seen)
    assert released == text


def test_a_streamed_text_flows_in_pieces(word_guard: WordGuard) -> None:
    guarded = GuardedAssistant(Script("word " * 200), word_guard, every=50, hold_back=10)
    assert len(list(guarded.stream(ask("hello")))) > 10


def test_an_empty_answer_is_no_error(word_guard: WordGuard) -> None:
    guarded = GuardedAssistant(Script(""), word_guard)
    assert guarded.generate([ask("hi")]) == [""]
    assert "".join(guarded.stream(ask("hi"))) == ""


def test_speech_is_judged_by_its_transcript(word_guard: WordGuard) -> None:
    script = Script("a bomb please")  # what it recognises, and would answer
    spoken = [Message("user", (Text("do this:"), Audio(np.zeros(160, np.float32), 16000)))]
    assert GuardedAssistant(script, word_guard, on={"input"}).generate([spoken]) == [REFUSAL]
    assert word_guard.seen == ["do this: a bomb please"]


def test_an_image_alone_is_answered_under_an_output_check(word_guard: WordGuard) -> None:
    picture = [Message("user", Image(np.zeros((8, 8, 3), np.uint8)))]
    assert GuardedAssistant(Script("red"), word_guard).generate([picture]) == ["red"]
    assert GuardedAssistant(Script("a bomb"), word_guard).generate([picture]) == [REFUSAL]


@pytest.mark.parametrize("on", [set(), {"inptu"}, "input"])
def test_an_unknown_side_is_refused(word_guard: WordGuard, on: set[str]) -> None:
    with pytest.raises(UserError, match="input and output"):
        GuardedAssistant(Script(""), word_guard, on=on)


def test_a_real_assistant_behind_a_real_guard_fails_closed() -> None:
    guard = tiny_guard()
    guarded = GuardedAssistant(Assistant(guard.core, guard.tokenizer), guard)
    assert guarded.generate([ask("hello")]) == [REFUSAL]  # a random guard gives no verdict


def test_asynchronous_calls_are_guarded_like_the_others(word_guard: WordGuard) -> None:
    guarded = GuardedAssistant(Script("take a bomb"), word_guard, every=4, hold_back=4)

    async def both() -> tuple[list[str], str]:
        streamed = [piece async for piece in guarded.astream(ask("hello"))]
        return await guarded.agenerate([ask("hello"), ask("a bomb")]), "".join(streamed)

    answers, streamed = asyncio.run(both())
    assert answers == [REFUSAL, REFUSAL]
    assert streamed.endswith(REFUSAL) and "bomb" not in streamed


def test_an_answer_of_invisible_characters_is_not_said_unjudged(word_guard: WordGuard) -> None:
    hidden = "".join(chr(0xE0000 + ord(c)) for c in "bomb") * 100
    guarded = GuardedAssistant(Script(hidden), word_guard)
    assert guarded.generate([ask("hello")]) == [""]
    assert "".join(guarded.stream(ask("hello"))) == ""


class Breaks(WordGuard):
    """Judges the question, then fails."""

    def classify(self, *args: Any, **more: Any) -> Any:
        if self.seen:
            raise RuntimeError("gone")
        return super().classify(*args, **more)


def test_a_guard_that_fails_lets_nothing_out() -> None:
    released = []
    with pytest.raises(RuntimeError):
        for piece in GuardedAssistant(Script("words " * 100), Breaks()).stream(ask("hello")):
            released.append(piece)
    assert released == []
