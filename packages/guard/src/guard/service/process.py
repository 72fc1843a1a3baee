"""An engine in a process of its own, watched and started again.

A crash, a kill for memory or a hang of the model ends that process and not the service: what was being
judged fails with `EngineError` (the service answers 503), and a new process takes over.
"""

import atexit
import contextlib
import logging
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

from core_llm.chat import Message
from core_llm.errors import UserError
from guard.engine import Engine, EngineError, can_see
from guard.guard import Verdict
from guard.policy import Policy

log = logging.getLogger("guard.service")

_BACKOFF = (0.2, 30.0)  # seconds before the first new start and, doubled each time, at most
_STABLE = 60.0  # seconds after which a process counts as sound


class ProcessEngine:
    """`load` runs in the other process and gives the engine; it must be picklable.

    timeout: seconds for one batch, after which the process counts as hung and is ended. start_timeout:
    seconds for loading. The first process is started here: raises `UserError` where it cannot be loaded.
    """

    def __init__(
        self, load: Callable[[], Engine], timeout: float = 120.0, start_timeout: float = 600.0
    ) -> None:
        self._load, self.timeout, self.start_timeout = load, timeout, start_timeout
        self._context = multiprocessing.get_context("spawn")
        self._lock = threading.Lock()  # one conversation with the process at a time
        self._closing = threading.Event()
        self._up = threading.Event()
        self.restarts = 0
        self._process: Any = None
        self._pipe: Connection
        self._keeper: threading.Thread | None = None
        # Before the exit handler of multiprocessing, which would wait for a process that ignores its signal.
        atexit.register(self.close)
        self._start()
        self._keeper = threading.Thread(target=self._keep, name="engine-keeper", daemon=True)
        self._keeper.start()

    @property
    def policy(self) -> Policy:
        """The guard's own policy."""
        return self._policy

    @property
    def ready(self) -> bool:
        """Whether the process lives and has its engine."""
        return self._up.is_set()

    @property
    def pid(self) -> int:
        """Of the process that judges now."""
        return int(self._process.pid)

    def judge(
        self, conversations: Sequence[Sequence[Message]], policy: Policy | None = None
    ) -> list[Verdict]:
        """See `Engine.judge`; `EngineError` while the process is down."""
        found = self._ask("judge", [list(messages) for messages in conversations], policy)
        if len(found) != len(conversations):
            raise EngineError("the engine lost a verdict")
        return list(found)

    def check(self, policy: Policy) -> None:
        """Raise `UserError` where the guard cannot judge by `policy`; waits while the process starts."""
        deadline = time.monotonic() + self.start_timeout
        while not self._closing.is_set():
            try:
                self._ask("check", policy)
                return
            except EngineError:
                if time.monotonic() > deadline:
                    raise UserError("the policy cannot be checked: the engine does not start") from None
                self._up.wait(1.0)
        raise UserError("the policy cannot be checked: the engine is closed")

    def close(self) -> None:
        """End the process; a batch that is being judged gets a second to finish."""
        atexit.unregister(self.close)
        self._closing.set()
        held = self._lock.acquire(timeout=1.0)
        try:
            if self._process is not None:
                self._end()
        finally:
            if held:
                self._lock.release()
        if self._keeper is not None:
            self._keeper.join(timeout=5)

    def _ask(self, *message: Any) -> Any:
        with self._lock:
            if self._closing.is_set() or not self._up.is_set():
                raise EngineError("the engine's process is down")
            try:
                self._pipe.send(message)
                if not self._pipe.poll(self.timeout):
                    raise TimeoutError
                kind, value = self._pipe.recv()
            except (EOFError, OSError) as error:
                # TimeoutError too. What it may still send belongs to nobody: this pipe is never read again.
                self._up.clear()
                self._end()
                raise EngineError(f"the engine's process is gone ({type(error).__name__})") from None
        if kind == "user":
            raise UserError(value)
        if kind == "engine":
            raise EngineError(value)
        return value

    def _start(self) -> None:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=_serve, args=(self._load, theirs), name="guard-engine", daemon=True
        )
        process.start()
        theirs.close()  # the end of the pipe is then the end of the process
        self._process, self._pipe = process, ours
        try:
            if not ours.poll(self.start_timeout):
                raise TimeoutError
            kind, value = ours.recv()
        except (EOFError, OSError) as error:
            self._end()
            raise EngineError(f"the engine's process did not start ({type(error).__name__})") from None
        if kind != "ready":
            self._end()
            raise UserError(value) if kind == "user" else EngineError(value)
        self.name, self._policy, self.sees = value
        self._up.set()

    def _end(self) -> None:
        self._up.clear()
        with contextlib.suppress(OSError):
            self._pipe.close()
        self._process.join(timeout=1.0 if self._closing.is_set() else 0.0)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _keep(self) -> None:
        """Start a new process whenever the last one is gone, later and later while that does not help."""
        wait, began = _BACKOFF[0], time.monotonic()
        while not self._closing.is_set():
            self._process.join(timeout=0.2)
            if self._process.is_alive():
                continue
            self._up.clear()
            if time.monotonic() - began > _STABLE:
                wait = _BACKOFF[0]
            if self._closing.wait(wait):
                return
            wait, began = min(2 * wait, _BACKOFF[1]), time.monotonic()
            with self._lock:
                if self._closing.is_set():
                    return
                self.restarts += 1
                log.error("the engine's process is gone: starting it again")
                with contextlib.suppress(OSError):
                    self._pipe.close()
                try:
                    self._start()
                except (EngineError, UserError, OSError) as error:
                    log.error("the engine did not start: %s", error)


def _serve(load: Callable[[], Engine], pipe: Connection) -> None:
    """The other process: answers until the pipe closes. A signal sent to the whole group does not end it."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    try:
        engine = load()
    except UserError as error:
        pipe.send(("user", str(error)))
        return
    except Exception as error:
        pipe.send(("engine", f"the engine could not be loaded: {type(error).__name__}: {error}"))
        return
    pipe.send(("ready", (engine.name, engine.policy, can_see(engine))))
    with contextlib.suppress(EOFError, OSError):  # the service is gone, and so is the reason to live
        while True:
            pipe.send(_answer(engine, *pipe.recv()))
    engine.close()


def _answer(engine: Engine, kind: str, *values: Any) -> tuple[str, Any]:
    try:
        if kind == "judge":
            return "done", engine.judge(*values)
        engine.check(*values)
        return "done", None
    except UserError as error:
        return "user", str(error)
    except EngineError as error:
        return "engine", str(error)
    except Exception as error:  # its text may quote the user
        return "engine", f"the engine failed: {type(error).__name__}"
