"""The guard behind HTTP: the OpenAI moderation endpoint, liveness and readiness.

Model work runs in a worker thread, one request at a time, so health checks answer while it computes.
Logs hold counts and times, never text.
"""

import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import anyio
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from core_llm.chat import Message
from core_llm.errors import UserError
from guard.guard import Guard, Verdict
from guard.schemas import (
    ImagePart,
    ModerationRequest,
    ModerationResponse,
    ModerationResult,
    TextPart,
    error_body,
)

log = logging.getLogger("guard.service")

# Names that OpenAI clients send; they all mean the guard that runs here.
ALIASES = frozenset(
    {
        "guard",
        "omni-moderation-latest",
        "omni-moderation-2024-09-26",
        "text-moderation-latest",
        "text-moderation-stable",
    }
)


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    body_bytes: int = 262_144
    inputs: int = 128
    characters: int = 65_536  # of all inputs together


class Refused(Exception):
    """A request that cannot be served; becomes an error body in the OpenAI shape."""

    def __init__(
        self, message: str, param: str | None = None, code: str | None = None, status: int = 400
    ) -> None:
        super().__init__(message)
        self.message, self.param, self.code, self.status = message, param, code, status


class _State:
    """The guard once it is loaded, and the gate that lets one request compute at a time."""

    def __init__(self) -> None:
        self.guard: Guard | None = None
        self.failed: str | None = None
        self.gate = anyio.CapacityLimiter(1)


def create_app(guard: Guard | Callable[[], Guard], limits: Limits | None = None) -> FastAPI:
    """The application. A callable is loaded in the background; until then /readyz answers 503."""
    state = _State()
    if isinstance(guard, Guard):
        state.guard = guard

    async def load() -> None:
        if isinstance(guard, Guard):
            return
        try:
            state.guard = await anyio.to_thread.run_sync(guard, limiter=state.gate)
        except UserError as error:
            state.failed = str(error)
            log.error("the guard cannot be loaded: %s", error)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(load)
            yield
            tasks.cancel_scope.cancel()

    app = FastAPI(title="guard", lifespan=lifespan)
    _add_health(app, state)
    _add_moderations(app, state, limits or Limits())
    _add_error_handlers(app)
    return app


def _add_health(app: FastAPI, state: _State) -> None:
    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    @app.get("/readyz", response_model=None)
    async def readyz() -> JSONResponse:
        """The guard is loaded and can judge."""
        if state.guard is None:
            status = "failed" if state.failed else "loading"
            return JSONResponse({"status": status}, status_code=503)
        return JSONResponse({"status": "ready", "model": state.guard.name})


def _add_moderations(app: FastAPI, state: _State, limits: Limits) -> None:
    @app.post("/v1/moderations", response_model=None)
    async def moderations(request: Request) -> JSONResponse:
        """Judge one text, each of a list of texts, or one input of several parts."""
        began = time.monotonic()
        guard = state.guard
        if guard is None:
            raise Refused("the guard is not loaded yet: try again", code="not_ready", status=503)
        asked = parse(await read_body(request, limits.body_bytes))
        _check_model(asked.model, guard)
        texts = texts_of(asked, limits)
        conversations = [[Message("user", text)] for text in texts]
        verdicts = await _judge(guard, conversations, state)
        results = [ModerationResult.of(verdict) for verdict in verdicts]
        response = ModerationResponse(id=f"modr-{uuid.uuid4().hex}", model=guard.name, results=results)
        flagged, elapsed = sum(result.flagged for result in results), time.monotonic() - began
        log.info("%s: %d inputs, %d flagged, %.0f ms", response.id, len(texts), flagged, 1000 * elapsed)
        return JSONResponse(response.model_dump())


async def _judge(guard: Guard, conversations: list[list[Message]], state: _State) -> list[Verdict]:
    """One verdict per conversation; whatever breaks becomes a 500, logged by its kind only."""
    try:
        verdicts = await anyio.to_thread.run_sync(guard.classify, conversations, limiter=state.gate)
        if len(verdicts) != len(conversations):
            raise RuntimeError("the guard lost a verdict")
        return verdicts
    except UserError:
        raise
    except Exception as error:
        # An exception's text may quote what the user wrote: it must not reach the server's own traceback log.
        log.error("request failed: %s", type(error).__name__)
    raise Refused("the guard failed on this request", code="internal_error", status=500)


async def read_body(request: Request, limit: int) -> bytes:
    """The body, read no further than `limit` bytes; a longer one raises `Refused` 413."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise Refused(f"the body is longer than {limit} bytes", code="request_too_large", status=413)
    return bytes(body)


def parse(body: bytes) -> ModerationRequest:
    """The request in a body; raises `Refused` with the place of the first mistake, never its text."""
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        raise Refused("the body is not valid JSON", code="invalid_json") from None
    if not isinstance(values, dict):
        raise Refused("the body must be a JSON object with the key 'input'", code="invalid_type")
    if "input" not in values:
        raise Refused("missing required parameter: 'input'", "input", "missing_required_parameter")
    unknown = sorted(set(values) - set(ModerationRequest.model_fields))
    if unknown:
        raise Refused(f"unknown parameter: '{unknown[0][:64]}'", unknown[0][:64], "unknown_parameter")
    try:
        return ModerationRequest.model_validate(values)
    except ValidationError as error:
        place = str(error.errors(include_input=False)[0]["loc"][0])
        expected = {
            "input": "a string, a list of strings, or a list of {type: text | image_url} parts",
            "model": "a string",
        }
        raise Refused(f"'{place}' must be {expected.get(place, 'valid')}", place, "invalid_type") from None


def texts_of(asked: ModerationRequest, limits: Limits) -> list[str]:
    """One text per result; raises `Refused` for what is empty, too much, or no text."""
    parts: Sequence[Any] = [asked.input] if isinstance(asked.input, str) else asked.input
    if not parts:
        raise Refused("'input' is empty: give at least one text", "input", "empty_input")
    if len(parts) > limits.inputs:
        raise Refused(f"'input' has more than {limits.inputs} items", "input", "too_many_inputs")
    if any(isinstance(part, ImagePart) for part in parts):
        raise Refused("this guard reads text only: leave image parts out", "input", "unsupported_input")
    if any(isinstance(part, TextPart) for part in parts):
        texts = ["\n".join(part.text for part in parts)]
    else:
        texts = list(parts)
    if any(not text.strip() for text in texts):
        raise Refused("'input' holds an empty text", "input", "empty_input")
    if sum(map(len, texts)) > limits.characters:
        message = f"'input' is longer than {limits.characters} characters"
        raise Refused(message, "input", "input_too_long", status=413)
    return texts


def _check_model(model: str | None, guard: Guard) -> None:
    if model is not None and model not in ALIASES | {guard.name}:
        known = ", ".join([guard.name, *sorted(ALIASES)])
        raise Refused(f"unknown model; known: {known}", "model", "model_not_found", status=404)


def _error(status: int, message: str, param: str | None = None, code: str | None = None) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse(error_body(message, kind, param, code), status_code=status)


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(Refused)
    async def bad_request(_: Request, error: Refused) -> JSONResponse:
        return _error(error.status, error.message, error.param, error.code)

    @app.exception_handler(UserError)
    async def user_error(_: Request, error: UserError) -> JSONResponse:
        return _error(400, str(error), "input", "invalid_input")

    @app.exception_handler(RequestValidationError)
    async def validation_error(_: Request, __: RequestValidationError) -> JSONResponse:
        return _error(400, "the request is malformed", code="invalid_request")

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        return _error(error.status_code, f"{request.method}: {error.detail}", code="not_found")
