"""Refusals, and how they look to a client: always the OpenAI error shape, never the user's text."""

import json
import math
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from core_llm.errors import UserError
from guard.schemas import error_body


class Refused(Exception):
    """A request that cannot be served. retry_after: seconds after which the same request may succeed."""

    def __init__(
        self,
        message: str,
        param: str | None = None,
        code: str | None = None,
        status: int = 400,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.param, self.code, self.status = message, param, code, status
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The error body."""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        return error_body(self.message, kind, self.param, self.code)

    @property
    def headers(self) -> dict[str, str]:
        """`Retry-After` in whole seconds, where there is one; `WWW-Authenticate` for 401."""
        wait = self.retry_after
        headers = {} if wait is None else {"retry-after": str(max(1, math.ceil(wait)))}
        headers |= {"www-authenticate": "Bearer"} if self.status == 401 else {}
        return headers | ({"x-error-code": self.code} if self.code else {})

    @property
    def response(self) -> JSONResponse:
        """The response of a request that was not answered."""
        return JSONResponse(self.body, self.status, self.headers)

    @property
    def line(self) -> str:
        """The same as one line of a stream whose status has long been sent."""
        return json.dumps({"type": "error", **self.body})


def not_ready(message: str) -> Refused:
    """503 for what will pass by itself."""
    return Refused(message, code="not_ready", status=503, retry_after=1)


def add_handlers(app: FastAPI) -> None:
    """Every error that a handler raises, in the one shape."""

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> JSONResponse:
        return error.response

    @app.exception_handler(UserError)
    async def user_error(_: Request, error: UserError) -> JSONResponse:
        return as_refused(error).response

    @app.exception_handler(RequestValidationError)
    async def validation_error(_: Request, __: RequestValidationError) -> JSONResponse:
        return Refused("the request is malformed", code="invalid_request").response

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        response = Refused(
            f"{request.method}: {error.detail}", code="not_found", status=error.status_code
        ).response
        response.headers.update(error.headers or {})
        return response


def as_refused(error: UserError) -> Refused:
    """What the guard itself refuses to judge."""
    return Refused(str(error), "input", "invalid_input")
