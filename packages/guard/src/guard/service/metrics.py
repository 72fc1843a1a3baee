"""Prometheus metrics. Labels are few and fixed: nothing that a client sends becomes one."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from guard.policy import Policy

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """One set per application, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "guard_requests", "Answered requests.", ["endpoint", "status"], registry=registry
        )
        self.seconds = Histogram(
            "guard_request_seconds",
            "From the request's head to the end of its answer.",
            ["endpoint"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.judge_seconds = Histogram(
            "guard_judge_seconds",
            "Waiting for verdicts: queue, batch and model.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.verdicts = Counter("guard_verdicts", "Verdicts given.", ["verdict"], registry=registry)
        self.categories = Counter(
            "guard_categories", "Categories named by unsafe verdicts.", ["code"], registry=registry
        )
        self.refused = Counter(
            "guard_refused", "Requests refused, by the error's code.", ["code"], registry=registry
        )
        self.in_flight = Gauge("guard_in_flight", "Requests that are being answered.", registry=registry)
        self.waiting = Gauge(
            "guard_waiting", "Conversations that wait for their verdict or get it.", registry=registry
        )
        self.ready = Gauge("guard_ready", "1 when the guard can judge.", registry=registry)
        self.engine_failures = Counter(
            "guard_engine_failures", "Batches that the engine failed on.", registry=registry
        )
        self.engine_restarts = Gauge(
            "guard_engine_restarts", "Times that the engine's process was started again.", registry=registry
        )
        self.audit_failures = Counter(
            "guard_audit_failures", "Requests whose verdicts could not be recorded.", registry=registry
        )
        self.reloads = Counter(
            "guard_policy_reloads", "Changes of the policy file.", ["result"], registry=registry
        )
        self.policy = Gauge(
            "guard_policy_info", "The policy in force.", ["name", "version", "digest"], registry=registry
        )
        for result in ("accepted", "refused"):
            self.reloads.labels(result)
        for verdict in ("safe", "unsafe"):
            self.verdicts.labels(verdict)

    def show_policy(self, policy: Policy) -> None:
        """Name the policy in force, and it alone."""
        self.policy.clear()
        self.policy.labels(policy.name, policy.version, policy.digest).set(1)

    def text(self) -> bytes:
        """What Prometheus reads."""
        return generate_latest(self.registry)
