"""Requests that come one by one, judged together: what waits while a batch is computed is the next batch."""

import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field

from core_llm.chat import Message
from core_llm.errors import UserError
from guard.engine import Engine, EngineError
from guard.guard import Verdict
from guard.policy import Policy


class QueueFull(Exception):
    """As many conversations wait as may: try again later."""


@dataclass(eq=False)
class _Job:
    conversation: Sequence[Message]
    policy: Policy | None
    done: "Future[Verdict]" = field(default_factory=Future)
    came: float = field(default_factory=time.monotonic)


class Batcher:
    """Feeds an engine from many threads or tasks; verdicts go to whoever asked, whatever the batch held.

    max_batch: conversations per call of the engine. max_wait_ms: how long the first one of a batch waits for
    company while the engine is idle. max_queue: conversations that may wait; more raise `QueueFull`. One
    conversation that cannot be judged fails alone: the rest of its batch is judged without it.
    """

    def __init__(
        self, engine: Engine, max_batch: int = 32, max_wait_ms: float = 2.0, max_queue: int = 512
    ) -> None:
        if max_batch < 1 or max_queue < 1 or max_wait_ms < 0:
            raise UserError("a batch and its queue hold at least one conversation, and no wait is negative")
        self.engine = engine
        self._max_batch, self._max_wait, self._max_queue = max_batch, max_wait_ms / 1000, max_queue
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._judging = 0
        self._thread = threading.Thread(target=self._run, name="guard-batches", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Conversations that wait for their verdict, those being judged included."""
        return len(self._jobs) + self._judging

    def submit(
        self, conversations: Sequence[Sequence[Message]], policy: Policy | None = None
    ) -> "list[Future[Verdict]]":
        """One future per conversation; all are taken or none.

        Raises `QueueFull`; a request larger than the queue is taken when nothing waits. A future that is
        cancelled in time is never computed; others raise what `Engine.judge` raises.
        """
        jobs = [_Job(conversation, policy) for conversation in conversations]
        with self._changed:
            if self._closed:
                raise EngineError("the engine is closed")
            if self._jobs and len(self._jobs) + len(jobs) > self._max_queue:
                self._drop_cancelled()
            if self._jobs and len(self._jobs) + len(jobs) > self._max_queue:
                raise QueueFull(f"{len(self._jobs)} conversations wait already")
            self._jobs.extend(jobs)
            self._changed.notify()
        return [job.done for job in jobs]

    def judge(
        self, conversations: Sequence[Sequence[Message]], policy: Policy | None = None
    ) -> list[Verdict]:
        """The same, waiting: `Engine.judge` for many threads."""
        return [done.result() for done in self.submit(conversations, policy)]

    def close(self) -> None:
        """Judge what waits, then stop; the engine stays open."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _drop_cancelled(self) -> None:
        self._jobs = deque(job for job in self._jobs if not job.done.cancelled())

    def _run(self) -> None:
        while True:
            jobs = self._next()
            if not jobs:
                return
            self._judge(jobs)
            self._judging = 0

    def _next(self) -> list[_Job]:
        """The next batch, of one policy, in the order of arrival; [] when closed and empty."""
        with self._changed:
            while not self._closed:
                # What came while the last batch was judged has waited already.
                left = self._jobs[0].came + self._max_wait - time.monotonic() if self._jobs else None
                if self._jobs and (len(self._jobs) >= self._max_batch or left is None or left <= 0):
                    break
                self._changed.wait(left)
            taken: list[_Job] = []
            kept: list[_Job] = []
            while self._jobs and len(taken) < self._max_batch:
                job = self._jobs.popleft()
                same = not taken or job.policy is taken[0].policy or job.policy == taken[0].policy
                (taken if same else kept).append(job)
            self._jobs.extendleft(reversed(kept))
            self._judging = len(taken)
            return taken

    def _judge(self, jobs: list[_Job]) -> None:
        running = [job for job in jobs if job.done.set_running_or_notify_cancel()]
        if not running:
            return
        try:
            verdicts = self.engine.judge([job.conversation for job in running], running[0].policy)
            if len(verdicts) != len(running):
                raise EngineError("the engine lost a verdict")
        except UserError as error:
            if len(running) == 1:
                running[0].done.set_exception(error)
                return
            for job in running:
                self._alone(job)
        except EngineError as error:
            _fail(running, error)
        except Exception as error:  # its text may quote what a user wrote
            _fail(running, EngineError(f"the engine failed: {type(error).__name__}"))
        else:
            for job, verdict in zip(running, verdicts, strict=True):
                job.done.set_result(verdict)

    def _alone(self, job: _Job) -> None:
        """One of a batch that was refused: it may be the one that was meant, or not."""
        try:
            [verdict] = self.engine.judge([job.conversation], job.policy)
            job.done.set_result(verdict)
        except (UserError, EngineError) as error:
            job.done.set_exception(error)
        except Exception as error:
            job.done.set_exception(EngineError(f"the engine failed: {type(error).__name__}"))


def _fail(jobs: Sequence[_Job], error: EngineError) -> None:
    for job in jobs:
        try:
            job.done.set_exception(error)
        except InvalidStateError:
            continue  # answered already
