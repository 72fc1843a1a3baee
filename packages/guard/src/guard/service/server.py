"""Listening, and stopping without losing anything."""

import asyncio
import logging
import signal
import socket
import time
from types import FrameType

import uvicorn
from fastapi import FastAPI

from core_llm.errors import UserError
from guard.service.state import Service

log = logging.getLogger("guard.service")


class Server(uvicorn.Server):
    """On SIGTERM or SIGINT: new requests and /readyz answer 503, what was let in is answered, then it ends.

    notice: seconds for which new requests are still met with 503 and not with a closed door, so that a load
    balancer looks elsewhere first. drain: seconds after which what is still unanswered is given up. A second
    signal ends it at once. SIGHUP reads the policy file again.
    """

    def __init__(self, config: uvicorn.Config, service: Service, notice: float, drain: float) -> None:
        super().__init__(config)
        self._service, self._notice, self._drain = service, notice, drain
        self._loop: asyncio.AbstractEventLoop | None = None
        self._leaving: asyncio.Task[None] | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer until told to stop."""
        self._loop = asyncio.get_running_loop()
        if self._service.settings.policies is not None:
            self._loop.add_signal_handler(signal.SIGHUP, self._reload)
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by the signal; the rest happens on the loop."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._leave)

    def _leave(self) -> None:
        if self._leaving is not None:
            self.should_exit = self.force_exit = True
            return
        log.info("stopping: %d requests are still being answered", self._service.in_flight)
        self._service.draining = True
        self._leaving = asyncio.create_task(self._wait())

    async def _wait(self) -> None:
        began = time.monotonic()
        while (elapsed := time.monotonic() - began) < self._drain:
            if elapsed >= self._notice and self._service.in_flight == 0:
                break
            await asyncio.sleep(0.02)
        else:
            log.error("%d requests were not answered in time", self._service.in_flight)
            self.force_exit = True
        self.should_exit = True

    def _reload(self) -> None:
        assert self._loop is not None
        self._loop.run_in_executor(None, self._service.reload_policy)


def run(app: FastAPI, host: str, port: int, notice: float, drain: float) -> None:
    """Serve until SIGTERM; raises `UserError` where the address is taken."""
    config = uvicorn.Config(
        app, host=host, port=port, log_level="info", access_log=False, server_header=False,
        timeout_keep_alive=30, h11_max_incomplete_event_size=65_536,
    )  # fmt: skip
    server = Server(config, app.state.service, notice, drain)
    try:
        server.run()
    except OSError as error:
        raise UserError(f"cannot listen on {host}:{port} ({error}); choose another --port") from error
    if not server.started:
        raise UserError(f"cannot listen on {host}:{port}; choose another --port")
