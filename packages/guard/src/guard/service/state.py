"""The running service: its engine, its queue, and the one way in which a verdict is given."""

import asyncio
import datetime
import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import anyio

from core_llm.chat import Image, Message, Text
from core_llm.errors import UserError
from guard.batching import Batcher, QueueFull
from guard.engine import Engine, EngineError, LocalEngine, can_see
from guard.guard import Guard, Verdict
from guard.policy import Policy
from guard.service.audit import AuditError, Entry
from guard.service.errors import Refused, not_ready
from guard.service.metrics import Metrics
from guard.service.rates import Rates
from guard.service.settings import Settings
from guard.service.telemetry import Tracing

log = logging.getLogger("guard.service")

Source = Guard | Engine | Callable[[], Guard | Engine]


@dataclass
class Asked:
    """A request that was let in. client: name of its key, or its address where there are no keys."""

    request_id: str
    client: str = ""
    endpoint: str = ""
    refused: str | None = None
    inputs: int = 0
    flagged: int = 0


@dataclass
class Judged:
    """Verdicts with the policy that they were given by, the same for all of a request."""

    verdicts: list[Verdict]
    policy: Policy
    usage: int | None = field(default=None)


class Service:
    """Holds no request beyond its answer: any number of them can stand behind a load balancer.

    count: tokens of a text, where the guard's tokenizer is known here.
    """

    def __init__(
        self,
        source: Source,
        settings: Settings,
        tracing: Tracing | None = None,
        count: Callable[[str], int] | None = None,
    ) -> None:
        self.settings, self.metrics, self.tracing = settings, Metrics(), tracing or Tracing()
        self.rates = Rates(settings.rate, settings.burst) if settings.rate is not None else None
        self.count = count
        self.keys = settings.keys
        self.engine: Engine | None = None
        self.batcher: Batcher | None = None
        self.failed: str | None = None
        self.draining = False
        self.in_flight = 0
        self._source = source
        if isinstance(source, Guard) or not callable(source):
            self._take(source)

    def load(self) -> None:
        """Get the engine from whoever was given to load it; a failure stays visible at /readyz."""
        if self.engine is not None:
            return
        assert callable(self._source)
        try:
            self._take(self._source())
        except UserError as error:
            self.failed = str(error)
            log.error("the guard cannot be loaded: %s", error)
        except Exception as error:
            self.failed = type(error).__name__
            log.error("the guard cannot be loaded: %s", self.failed)

    def _take(self, source: Guard | Engine) -> None:
        engine = LocalEngine(source, self.settings.batch) if isinstance(source, Guard) else source
        self.batcher = Batcher(engine, self.settings.batch, self.settings.wait_ms, self.settings.queue)
        self.engine = engine
        self.metrics.show_policy(self.policy)

    @property
    def policy(self) -> Policy:
        """The policy in force."""
        assert self.engine is not None
        store = self.settings.policies
        return store.current if store is not None else self.engine.policy

    @property
    def sees(self) -> bool:
        """Whether images can be judged."""
        return can_see(self.engine)

    @property
    def ready(self) -> bool:
        """Whether a request that comes now would be judged."""
        return self.engine is not None and not self.draining and bool(getattr(self.engine, "ready", True))

    @property
    def name(self) -> str:
        """The name of the guard that judges."""
        assert self.engine is not None
        return self.engine.name

    def require(self) -> Engine:
        """The engine; raises `Refused` 503 before it is loaded, and while it starts again."""
        if self.engine is None:
            raise not_ready("the guard is not loaded yet: try again")
        if not getattr(self.engine, "ready", True):
            raise not_ready("the guard is starting again: try again")
        return self.engine

    async def judge(self, asked: Asked, conversations: Sequence[Sequence[Message]]) -> Judged:
        """Verdicts in order, recorded; raises `Refused` where there are none."""
        engine = self.require()
        policy = self.policy
        asked.inputs += len(conversations)
        usage = await self._count(conversations)
        began = time.monotonic()
        with self.tracing.span("judge", inputs=len(conversations)):
            verdicts = await self._verdicts(
                conversations, policy if self.settings.policies is not None else None
            )
        self.metrics.judge_seconds.observe(time.monotonic() - began)
        await self.record(asked, conversations, verdicts, policy, engine.name)
        return Judged(verdicts, policy, usage)

    async def _verdicts(
        self, conversations: Sequence[Sequence[Message]], policy: Policy | None
    ) -> list[Verdict]:
        assert self.batcher is not None
        try:
            futures = self.batcher.submit(conversations, policy)
        except QueueFull:
            raise Refused(
                "too many requests wait: try again", code="overloaded", status=503, retry_after=1
            ) from None
        except EngineError:
            raise not_ready("the service is stopping: try again") from None
        try:
            with anyio.fail_after(self.settings.timeout):
                return list(await asyncio.gather(*map(asyncio.wrap_future, futures)))
        except TimeoutError:
            message = f"no verdict within {self.settings.timeout:g} s: try again"
            raise Refused(message, code="timeout", status=503, retry_after=1) from None
        except EngineError as error:
            self.metrics.engine_failures.inc()
            log.error("no verdict: %s", error)
            raise Refused(
                "the guard failed on this request: try again",
                code="engine_unavailable",
                status=503,
                retry_after=1,
            ) from None
        finally:
            for future in futures:
                future.cancel()

    async def _count(self, conversations: Sequence[Sequence[Message]]) -> int | None:
        """Tokens of all texts; raises `Refused` 413 above the limit."""
        count, limit = self.count, self.settings.limits.tokens
        if count is None:
            return None
        texts = [message.text for messages in conversations for message in messages]
        total = await anyio.to_thread.run_sync(lambda: sum(map(count, texts)))
        if limit is not None and total > limit:
            raise Refused(f"the texts have more than {limit} tokens", "input", "input_too_long", 413)
        return total

    async def record(
        self,
        asked: Asked,
        conversations: Sequence[Sequence[Message]],
        verdicts: Sequence[Verdict],
        policy: Policy,
        model: str,
    ) -> None:
        """Count verdicts and write them down; raises `Refused` where they must be written and cannot."""
        for verdict in verdicts:
            asked.flagged += verdict.unsafe
            self.metrics.verdicts.labels("unsafe" if verdict.unsafe else "safe").inc()
            for code in verdict.named:
                self.metrics.categories.labels(code).inc()
        audit = self.settings.audit
        if audit is None:
            return
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        entries = [
            Entry(
                now, asked.request_id, item, asked.client, asked.endpoint, model, policy.name,
                policy.version, policy.digest, _content(messages), verdict.unsafe, verdict.probability,
                verdict.mass, verdict.named, verdict.categories, "\n".join(m.text for m in messages),
            )
            for item, (messages, verdict) in enumerate(zip(conversations, verdicts, strict=True))
        ]  # fmt: skip
        try:
            await asyncio.wrap_future(audit.write(entries))
        except AuditError as error:
            self.metrics.audit_failures.inc()
            log.error("verdicts of %s could not be recorded: %s", asked.request_id, error)
            if self.settings.audit_required:
                raise Refused(
                    "the verdict cannot be recorded: try again",
                    code="audit_unavailable",
                    status=503,
                    retry_after=5,
                ) from None

    def close(self) -> None:
        """Finish what waits, then let go of everything."""
        if self.settings.policies is not None:
            self.settings.policies.close()
        if self.batcher is not None:
            self.batcher.close()
        if self.engine is not None:
            self.engine.close()
        if self.settings.audit is not None:
            self.settings.audit.close()
        self.tracing.close()

    def watch_policy(self, seconds: float = 1.0) -> None:
        """Follow the policy file, and say what became of each change."""
        if self.settings.policies is not None:
            self.settings.policies.watch(seconds, self._changed, self._unchanged)

    def reload_policy(self) -> None:
        """Read the policy file now."""
        if self.settings.policies is not None:
            try:
                self._changed(self.settings.policies.reload())
            except UserError as error:
                self._unchanged(error)

    def _changed(self, policy: Policy) -> None:
        self.metrics.reloads.labels("accepted").inc()
        self.metrics.show_policy(policy)
        log.info("policy %s, version %s: in force", policy.name, policy.version)

    def _unchanged(self, error: UserError) -> None:
        self.metrics.reloads.labels("refused").inc()
        log.error("the policy stays as it was: %s", error)


def _content(messages: Sequence[Message]) -> bytes:
    """What the audit log hashes: of one user text the text itself, of anything else roles, texts, images."""
    if len(messages) == 1 and messages[0].role == "user" and isinstance(messages[0].content, str):
        return messages[0].text.encode("utf-8", "surrogatepass")
    turns = [
        [m.role, *(p.text if isinstance(p, Text) else {"image": _hash(p)} for p in m.parts)] for m in messages
    ]
    return json.dumps(turns, ensure_ascii=False).encode("utf-8", "surrogatepass")


def _hash(part: object) -> str:
    import hashlib

    data = part.data if isinstance(part, Image) else b""
    return hashlib.sha256(data if isinstance(data, bytes) else repr(data).encode()).hexdigest()


def in_background(service: Service) -> threading.Thread:
    """Load the engine beside the event loop."""
    thread = threading.Thread(target=service.load, name="guard-load", daemon=True)
    thread.start()
    return thread
