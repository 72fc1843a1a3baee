"""The gate in front of every request: id, key, rate, drain, metrics; and no error without its shape.

Plain ASGI, because a stream is answered while its body still comes in.
"""

import logging
import re
import time
import uuid
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from guard.service.errors import Refused
from guard.service.state import Asked, Service

log = logging.getLogger("guard.service")

PATHS = frozenset(
    {
        "/v1/moderations",
        "/v1/moderations/stream",
        "/v1/chat/completions",
        "/v1/models",
        "/healthz",
        "/readyz",
        "/metrics",
    }
)
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


def asked_of(request: Request) -> Asked:
    """What the gate knows about a request."""
    asked: Asked = request.scope["guard.asked"]
    return asked


class Gate:
    """Lets in, counts, and shuts; wraps the whole application."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, or the lifespan."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        given = headers.get(b"x-request-id", b"")
        request_id = given.decode() if _ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"
        endpoint = scope["path"] if scope["path"] in PATHS else "other"
        asked = scope["guard.asked"] = Asked(request_id, endpoint=endpoint)
        answer = _Answer(send, request_id, self.service)
        began = time.monotonic()
        texts = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers.items()}
        counted = scope["path"].startswith("/v1/")
        if counted:
            self.service.in_flight += 1
            self.service.metrics.in_flight.set(self.service.in_flight)
        try:
            with self._span(scope, endpoint, texts, request_id) as span:
                await self._answer(scope, receive, answer, asked, texts)
                if span is not None:
                    for name, value in self._facts(asked, answer).items():
                        span.set_attribute(name, value)
        finally:
            if counted:
                self.service.in_flight -= 1
                self.service.metrics.in_flight.set(self.service.in_flight)
            self._count(asked, answer, time.monotonic() - began)

    def _span(
        self, scope: Scope, endpoint: str, headers: dict[str, str], request_id: str
    ) -> AbstractContextManager[Any]:
        """A span for what is asked of the guard; probes and scrapes would be most of them."""
        if not scope["path"].startswith("/v1/"):
            return nullcontext()
        # Whatever a client calls its method must not become a name.
        method = scope["method"] if scope["method"] in METHODS else "other"
        return self.service.tracing.span(f"{method} {endpoint}", headers, **{"guard.request_id": request_id})

    async def _answer(
        self, scope: Scope, receive: Receive, answer: "_Answer", asked: Asked, headers: dict[str, str]
    ) -> None:
        try:
            if scope["path"].startswith("/v1/"):
                self._admit(asked, headers, scope.get("client"))
            await self.app(scope, receive, answer)
        except Refused as error:
            await self._refuse(scope, receive, answer, error)
        except Exception as error:
            # An exception's text may quote what the user wrote: it must not reach the server's own log.
            log.error("request %s failed: %s", asked.request_id, type(error).__name__)
            broken = Refused("the guard failed on this request", code="internal_error", status=500)
            await self._refuse(scope, receive, answer, broken)

    async def _refuse(self, scope: Scope, receive: Receive, answer: "_Answer", error: Refused) -> None:
        if answer.status is None:
            await error.response(scope, receive, answer)
        # Otherwise the answer breaks off unfinished, which every client notices.

    def _admit(self, asked: Asked, headers: dict[str, str], client: Any) -> None:
        service = self.service
        if service.keys is not None:
            name = service.keys.name_of(headers.get("authorization"))
            if name is None:
                raise Refused(
                    "no valid API key: send 'Authorization: Bearer KEY'", code="invalid_api_key", status=401
                )
            asked.client = name
        else:
            asked.client = str(client[0]) if client else "unknown"
        if service.draining:
            raise Refused("the service is stopping: try again", code="stopping", status=503, retry_after=1)
        if service.in_flight > service.settings.max_requests:
            raise Refused("too many requests wait: try again", code="overloaded", status=503, retry_after=1)
        wait = service.rates.take(asked.client) if service.rates is not None else 0.0
        if wait:
            raise Refused(
                f"more than {service.settings.rate:g} inputs a minute: wait",
                code="rate_limit_exceeded",
                status=429,
                retry_after=wait,
            )

    def _facts(self, asked: Asked, answer: "_Answer") -> dict[str, int]:
        return {
            "http.response.status_code": answer.status or 0,
            "guard.inputs": asked.inputs,
            "guard.flagged": asked.flagged,
        }

    def _count(self, asked: Asked, answer: "_Answer", seconds: float) -> None:
        metrics, rates = self.service.metrics, self.service.rates
        metrics.requests.labels(asked.endpoint, str(answer.status or 499)).inc()
        metrics.seconds.labels(asked.endpoint).observe(seconds)
        if answer.code is not None:
            metrics.refused.labels(answer.code).inc()
        if rates is not None and asked.inputs > 1:
            rates.charge(asked.client, asked.inputs - 1)
        if asked.inputs:
            log.info(
                "%s: %s, %d inputs, %d flagged, status %s, %.0f ms",
                asked.request_id,
                asked.endpoint,
                asked.inputs,
                asked.flagged,
                answer.status or "none, the client left",
                1000 * seconds,
            )


class _Answer:
    """The way out: adds the headers that every answer has, and remembers the status."""

    def __init__(self, send: Send, request_id: str, service: Service) -> None:
        self._send, self._service = send, service
        self._request_id = request_id
        self.status: int | None = None
        self.code: str | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = list(message.get("headers", ()))
            self.code = next((v.decode() for k, v in headers if k == b"x-error-code"), None)
            headers.append((b"x-request-id", self._request_id.encode()))
            if self._service.draining:
                headers.append((b"connection", b"close"))
            message = {**message, "headers": headers}
        await self._send(message)
