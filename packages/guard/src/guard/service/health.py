"""Liveness, readiness, metrics, and the list of models."""

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response

from guard.service import metrics, openapi
from guard.service.state import Service


def add(app: FastAPI, service: Service) -> None:
    """The routes."""

    @app.get("/healthz", tags=["operate"])
    async def healthz() -> dict[str, str]:
        """The process answers: restart it where this does not."""
        return {"status": "ok"}

    @app.get(
        "/readyz",
        tags=["operate"],
        response_model=None,
        responses={503: {"description": "loading, restarting, stopping or failed"}},
    )
    async def readyz() -> JSONResponse:
        """The guard is loaded and takes requests: send it none where this does not answer 200."""
        if service.ready:
            return JSONResponse({"status": "ready", "model": service.name})
        return JSONResponse({"status": _why_not(service)}, status_code=503)

    @app.get(
        "/metrics",
        tags=["operate"],
        response_model=None,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def prometheus() -> Response:
        """Prometheus metrics."""
        found = service.metrics
        found.ready.set(service.ready)
        found.waiting.set(service.batcher.waiting if service.batcher is not None else 0)
        found.engine_restarts.set(getattr(service.engine, "restarts", 0))
        return Response(found.text(), media_type=metrics.CONTENT_TYPE)

    @app.get("/v1/models", tags=["judge"], responses=openapi.errors())
    async def models() -> JSONResponse:
        """The one guard that runs here, in the OpenAI shape."""
        service.require()
        model = {"id": service.name, "object": "model", "created": 0, "owned_by": "guard"}
        return JSONResponse({"object": "list", "data": [model]})


def _why_not(service: Service) -> str:
    if service.draining:
        return "stopping"
    if service.engine is not None:
        return "restarting"
    return "failed" if service.failed else "loading"
