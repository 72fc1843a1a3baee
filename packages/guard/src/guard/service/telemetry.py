"""OpenTelemetry spans, where it is installed and switched on; nothing at all otherwise.

A span holds the endpoint, status, request id, number of inputs and of flagged ones: no text, no key.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from core_llm.errors import UserError


class Tracing:
    """Spans of the service, or none. provider: an OpenTelemetry tracer provider; None switches it off."""

    def __init__(self, provider: Any = None) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("guard.service") if provider is not None else None

    @contextmanager
    def span(
        self, name: str, headers: Mapping[str, str] | None = None, **attributes: Any
    ) -> Iterator[Any | None]:
        """A span around a block, a child of the caller's where `headers` hold a traceparent."""
        if self._tracer is None:
            yield None
            return
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        parent = TraceContextTextMapPropagator().extract(dict(headers)) if headers is not None else None
        kind = SpanKind.SERVER if headers is not None else SpanKind.INTERNAL
        # An exception's text may quote the user: its kind alone is recorded, by whoever handles it.
        with self._tracer.start_as_current_span(
            name,
            context=parent,
            kind=kind,
            attributes=attributes,
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            yield span

    def close(self) -> None:
        """Send what waits."""
        if self._provider is not None:
            self._provider.shutdown()


def to_collector(endpoint: str) -> Tracing:
    """Spans to an OTLP collector over HTTP, such as http://localhost:4318/v1/traces."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise UserError("--otlp needs OpenTelemetry: pip install 'guard[otel]'") from None
    if urlsplit(endpoint).scheme not in ("http", "https") or not urlsplit(endpoint).hostname:
        raise UserError(f"--otlp must be an http(s) address, got {endpoint}")
    provider = TracerProvider(resource=Resource.create({"service.name": "guard"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))
    return Tracing(provider)
