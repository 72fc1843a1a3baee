"""What judges conversations: an engine. One interface for the guard in this process and for one elsewhere."""

import threading
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from core_llm.chat import Image, Message
from core_llm.errors import UserError
from guard.guard import Guard, Verdict
from guard.policy import Policy


class EngineError(Exception):
    """The engine itself failed or cannot be reached: nothing was judged, so nothing may pass as safe."""


@runtime_checkable
class Engine(Protocol):
    """Judges batches of conversations. Safe to call from several threads."""

    name: str

    @property
    def policy(self) -> Policy:
        """What is judged by where a request brings no policy of its own."""
        ...

    def judge(
        self, conversations: Sequence[Sequence[Message]], policy: Policy | None = None
    ) -> list[Verdict]:
        """One verdict per conversation, in order.

        Raises `UserError` for what cannot be judged as it was given (an empty message, a policy that this
        guard cannot follow) and `EngineError` where the engine failed.
        """
        ...

    def check(self, policy: Policy) -> None:
        """Raise `UserError` where this engine's guard cannot judge by `policy`."""
        ...

    def close(self) -> None:
        """Free what it holds; later calls raise `EngineError`."""
        ...


class LocalEngine:
    """A guard in this process: one forward pass per batch, one batch at a time.

    The keys and values of a policy's prompt are computed when it is first judged by, and shared by all
    conversations since.
    """

    def __init__(self, guard: Guard, batch_size: int = 32) -> None:
        if batch_size < 1:
            raise UserError(f"a batch holds at least one message, got {batch_size}")
        self.guard, self.batch_size = guard, batch_size
        self.name = guard.name
        self._lock = threading.Lock()
        self._closed = False

    @property
    def policy(self) -> Policy:
        """The guard's own policy."""
        return self.guard.policy

    def judge(
        self, conversations: Sequence[Sequence[Message]], policy: Policy | None = None
    ) -> list[Verdict]:
        """One verdict per conversation, in order; see `Engine.judge`."""
        with self._lock:
            if self._closed:
                raise EngineError("the engine is closed")
            try:
                verdicts = self.guard.classify(conversations, self.batch_size, policy)
            except UserError:
                raise
            except Exception as error:  # its text may quote what a user wrote
                raise EngineError(f"the guard failed: {type(error).__name__}") from error
        if len(verdicts) != len(conversations):
            raise EngineError("the guard lost a verdict")
        return verdicts

    def check(self, policy: Policy) -> None:
        """Raise `UserError` where this guard cannot judge by `policy`."""
        self.guard.prompter.reading(policy)

    def close(self) -> None:
        """Judge nothing more; what is being judged is finished first."""
        with self._lock:
            self._closed = True


def can_see(engine: object) -> bool:
    """Whether an engine's guard reads images."""
    adapters = getattr(getattr(engine, "guard", None), "adapters", ())
    return bool(getattr(engine, "sees", any(issubclass(Image, adapter.part) for adapter in adapters)))
