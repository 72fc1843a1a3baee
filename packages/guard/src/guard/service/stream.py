"""`POST /v1/moderations/stream`: a text judged while it is being written.

The body is lines of JSON: first the conversation (`StreamHead`), then pieces of the text. The answer comes
at the same time, as lines of JSON or, with `Accept: text/event-stream`, as server-sent events:
`{"type": "release", "text"}` is text whose window was judged safe, `{"type": "verdict", ...}` what was found
in a window, and the last one is `done` (all was released), `blocked` (nothing more is), or `error`.
A client that shows released text and nothing else never shows what was not judged.
"""

import json
from collections.abc import AsyncIterator
from typing import Any

import anyio
from fastapi import FastAPI, Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from core_llm.chat import Message
from core_llm.errors import UserError
from guard.guard import Verdict
from guard.prompt import plain
from guard.schemas import StreamHead, StreamPiece
from guard.service import bodies, openapi
from guard.service.errors import Refused, as_refused
from guard.service.gate import asked_of
from guard.service.state import Asked, Service
from guard.windows import Window

SSE = "text/event-stream"
NDJSON = "application/x-ndjson"


def add(app: FastAPI, service: Service) -> None:
    """The route."""

    @app.post(
        "/v1/moderations/stream",
        tags=["judge"],
        response_model=None,
        responses=openapi.stream_answers(),
        openapi_extra=openapi.stream_body(),
    )
    async def stream(request: Request) -> Response:
        """Judge a text window by window while it is written; only what was judged safe is released."""
        service.require()
        lines = Lines(request, service)
        head = await lines.next()
        if head is None:
            raise Refused("the body is empty: its first line is the conversation", code="invalid_json")
        asked = bodies.parse(head, StreamHead)
        bodies.check_model(asked.model, service)
        conversation = await bodies.conversation_of(asked.messages, service)
        watched = Watched(service, asked_of(request), asked, conversation)
        sse = SSE in request.headers.get("accept", "")
        return Duplex(watched.events(lines), sse)


class Lines:
    """Lines of a body while it comes in; bounded in all, and in the time that each may take."""

    def __init__(self, request: Request, service: Service) -> None:
        self._chunks = request.stream()
        self._limit = service.settings.limits.body(service.sees)
        self._timeout = service.settings.read_timeout
        self._buffer, self._seen, self._ended = bytearray(), 0, False

    async def next(self) -> bytes | None:
        """The next line that is not blank, or None at the end."""
        while True:
            line = self._cut()
            if line is None and self._ended:
                return None
            if line is not None and line.strip():
                return line
            if line is None:
                await self._more()

    def _cut(self) -> bytes | None:
        end = self._buffer.find(b"\n")
        if end < 0 and not (self._ended and self._buffer):
            return None
        end = len(self._buffer) if end < 0 else end + 1
        line = bytes(self._buffer[:end])
        del self._buffer[:end]
        return line

    async def _more(self) -> None:
        try:
            with anyio.fail_after(self._timeout):
                chunk = await anext(self._chunks, None)
        except TimeoutError:
            raise Refused(
                f"no further line within {self._timeout:g} s", code="request_timeout", status=408
            ) from None
        except ClientDisconnect:
            raise Refused("the client left", code="client_left", status=499) from None
        if chunk is None:
            self._ended = True
            return
        self._buffer += chunk
        self._seen += len(chunk)
        if self._seen > self._limit:
            raise Refused(
                f"the body is longer than {self._limit} bytes", code="request_too_large", status=413
            )


class Watched:
    """One text on its way through the guard. Every window is judged by the policy in force at that moment."""

    def __init__(self, service: Service, asked: Asked, head: StreamHead, conversation: list[Message]) -> None:
        settings = service.settings
        self._service, self._asked, self._head = service, asked, head
        self._conversation = conversation
        every = settings.every if head.every is None else head.every
        self._window = Window(every, settings.hold_back if head.hold_back is None else head.hold_back)

    async def events(self, lines: Lines) -> AsyncIterator[dict[str, Any]]:
        """What the client is told, in order; the last event says how it ended."""
        try:
            piece = self._head.text or ""
            while True:
                if self._window.add(piece):
                    async for event in self._check(end=False):
                        yield event
                        if event["type"] == "blocked":
                            return
                bodies.check_texts([self._window.text], self._service.settings.limits)
                line = await lines.next()
                if line is None:
                    break
                piece = bodies.parse(line, StreamPiece, "text").text
            async for event in self._check(end=True):
                yield event
                if event["type"] == "blocked":
                    return
            yield {"type": "done", "characters": self._window.released}
        except Refused as error:
            yield {"type": "error", **error.body}
        except UserError as error:
            yield {"type": "error", **as_refused(error).body}

    async def _check(self, end: bool) -> AsyncIterator[dict[str, Any]]:
        window = self._window
        if not window.unchecked:
            return  # nothing new: an empty text
        if plain(window.to_judge).strip():
            spoken = [*self._conversation, Message(self._head.role, window.to_judge)]
            judged = await self._service.judge(self._asked, [spoken])
            verdict = judged.verdicts[0]
            told = _told(verdict, len(window.text), judged.policy.digest)
            if verdict.unsafe:
                yield {"type": "blocked", **told, "released": window.released}
                return
            yield {"type": "verdict", **told}
        else:
            return  # nothing to read, and so nothing to release: blanks wait for words, invisible ones too
        text = window.passed(end)
        if text:
            yield {"type": "release", "text": text}


def _told(verdict: Verdict, until: int, policy: str) -> dict[str, Any]:
    return {
        "checked": until,
        "flagged": verdict.unsafe,
        "probability": verdict.probability,
        "categories": verdict.categories,
        "named": verdict.named,
        "policy": policy,
    }


class Duplex(Response):
    """Sends events while the body is still read: unlike a `StreamingResponse` it leaves the body alone."""

    def __init__(self, events: AsyncIterator[dict[str, Any]], sse: bool) -> None:
        super().__init__(media_type=SSE if sse else NDJSON)
        self._events, self._sse = events, sse
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-store"
        self.headers["x-accel-buffering"] = "no"  # a proxy that collects the answer would hold it back

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Start at once; an error after that is the last event."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for event in self._events:
            line = json.dumps(event)
            body = f"event: {event['type']}\ndata: {line}\n\n" if self._sse else f"{line}\n"
            await send({"type": "http.response.body", "body": body.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
