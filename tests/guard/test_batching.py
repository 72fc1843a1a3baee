"""Many threads, one engine: everybody gets their own verdict, or an error that is theirs."""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from core_llm.chat import Message
from core_llm.errors import UserError
from guard.batching import Batcher, QueueFull
from guard.engine import EngineError
from guard.policy import Policy
from guard.testing import WordEngine, word_probability


def said(text: str) -> list[Message]:
    return [Message("user", text)]


class Recording(WordEngine):
    """Remembers its batches; may wait for a signal, or fail."""

    def __init__(self, gate: threading.Event | None = None, error: Exception | None = None) -> None:
        super().__init__()
        self.batches: list[list[str]] = []
        self.gate, self.error = gate, error

    def judge(self, conversations: Sequence[Sequence[Message]], policy: Policy | None = None) -> list[Any]:
        self.batches.append([messages[-1].text for messages in conversations])
        if self.gate is not None:
            assert self.gate.wait(5)
        if self.error is not None:
            raise self.error
        return super().judge(conversations, policy)


def test_every_thread_gets_its_own_verdicts_in_order() -> None:
    batcher = Batcher(WordEngine(), max_batch=7)

    def ask(i: int) -> bool:
        texts = [f"text {i} {j}" for j in range(1 + i % 5)]
        found = batcher.judge([said(text) for text in texts])
        return [v.probability for v in found] == [word_probability(text) for text in texts]

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(ask, range(300)))
    assert batcher.waiting == 0
    batcher.close()


def test_what_waits_while_a_batch_is_computed_is_the_next_batch() -> None:
    gate = threading.Event()
    engine = Recording(gate)
    batcher = Batcher(engine, max_batch=3, max_wait_ms=0)
    first = batcher.submit([said("a")])
    while not engine.batches:
        time.sleep(0.001)
    rest = batcher.submit([said(t) for t in "bcde"])
    gate.set()
    assert [f.result(5).unsafe for f in [*first, *rest]] == [False] * 5
    assert engine.batches == [["a"], ["b", "c", "d"], ["e"]]
    batcher.close()


def test_the_queue_is_bounded_and_what_was_cancelled_makes_room() -> None:
    gate = threading.Event()
    engine = Recording(gate)
    batcher = Batcher(engine, max_batch=1, max_wait_ms=0, max_queue=2)
    first = batcher.submit([said("a")])
    while not engine.batches:
        time.sleep(0.001)
    waiting = batcher.submit([said("b"), said("c")])
    with pytest.raises(QueueFull):
        batcher.submit([said("d")])
    assert waiting[0].cancel()
    late = batcher.submit([said("e")])
    gate.set()
    assert all(not f.result(5).unsafe for f in [*first, waiting[1], *late])
    batcher.close()
    assert ["b"] not in engine.batches
    with pytest.raises(EngineError):
        batcher.submit([said("f")])


def test_one_that_cannot_be_judged_does_not_spoil_its_batch() -> None:
    batcher = Batcher(WordEngine(), max_batch=8, max_wait_ms=50)
    good, bad, other = batcher.submit([said("fine"), said("  "), said("a bomb")])
    assert not good.result(5).unsafe and other.result(5).unsafe
    with pytest.raises(UserError):
        bad.result(5)
    batcher.close()


def test_a_batch_holds_one_policy() -> None:
    engine = Recording()
    batcher = Batcher(engine, max_batch=8, max_wait_ms=50)
    strict, lax = Policy(threshold=0.1, version="strict"), Policy(threshold=0.95, version="lax")
    asked = [batcher.submit([said(f"bomb {i}")], (strict, lax)[i % 2])[0] for i in range(6)]
    assert [f.result(5).policy for f in asked] == [strict.digest, lax.digest] * 3
    batcher.close()


@pytest.mark.parametrize("error", [EngineError("gone"), RuntimeError("secret words")])
def test_an_engine_that_fails_fails_everybody_and_quotes_nobody(error: Exception) -> None:
    batcher = Batcher(Recording(error=error))
    for future in batcher.submit([said("a"), said("b")]):
        with pytest.raises(EngineError) as caught:
            future.result(5)
        assert "secret" not in str(caught.value)
    batcher.close()


def test_closing_judges_what_waits() -> None:
    batcher = Batcher(WordEngine(), max_batch=2, max_wait_ms=1000)
    futures = batcher.submit([said(str(i)) for i in range(5)])
    batcher.close()
    assert all(f.done() for f in futures)
