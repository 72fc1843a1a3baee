"""The application: one guard, its limits, its routes."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version

import anyio
from fastapi import FastAPI

from guard.service import chat, errors, health, moderations, openapi, stream
from guard.service.gate import Gate
from guard.service.settings import Limits, Settings
from guard.service.state import Service, Source, in_background
from guard.service.telemetry import Tracing

DESCRIPTION = (
    "A safety guard in the OpenAI shapes. Whatever cannot be judged is an error, never a safe verdict. "
    "429 and 503 pass by themselves: try again after Retry-After seconds."
)


def create_app(
    guard: Source,
    settings: Settings | Limits | None = None,
    *,
    tracing: Tracing | None = None,
    count: Callable[[str], int] | None = None,
) -> FastAPI:
    """The application around a guard or an engine.

    guard: one that is ready, or a callable that gives one; it is called in the background, and until then
    /readyz answers 503. count: tokens of a text, for the token limit and `usage`; a guard brings its own.
    """
    settings = settings or Settings()
    settings = Settings(limits=settings) if isinstance(settings, Limits) else settings
    service = Service(guard, settings, tracing, count)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        in_background(service)
        service.watch_policy()
        yield
        service.draining = True
        await anyio.to_thread.run_sync(service.close)

    app = FastAPI(title="guard", version=version("guard"), description=DESCRIPTION, lifespan=lifespan)
    app.state.service = service
    app.add_middleware(Gate, service=service)
    health.add(app, service)
    moderations.add(app, service)
    chat.add(app, service)
    stream.add(app, service)
    errors.add_handlers(app)
    openapi.install(app, service.keys is not None)
    return app
