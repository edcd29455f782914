"""The process: loads, listens, and stops without losing a request."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn

from attlas.errors import AttlasError
from attlas.serve.app import Server, create_app
from attlas.serve.connection import Connection
from attlas.serve.errors import draining
from attlas.serve.options import ServeOptions
from attlas.serve.service import Served, Service

KEY_VARIABLE = "ATTLAS_API_KEY"
LARGEST_HEADER = 64 * 1024  # bytes, request line included
KEEP_ALIVE = 30  # seconds


def keys_of(options: ServeOptions) -> tuple[str, ...]:
    """The keys of the command line and of the environment."""
    named = (key.strip() for key in os.environ.get(KEY_VARIABLE, "").split(","))
    return (*options.api_key, *(key for key in named if key))


class DrainingServer(uvicorn.Server):
    """uvicorn, with another way to stop: on SIGTERM or SIGINT new requests are answered with 503 while those inside are finished,
    at most `seconds` long; then it exits. A second signal ends it at once."""

    def __init__(self, config: uvicorn.Config, app: Server, seconds: float) -> None:
        super().__init__(config)
        self.app, self.seconds = app, seconds
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drain: asyncio.Task[None] | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.app.gate.closed or self._loop is None:
            super().handle_exit(sig, frame)
            self.force_exit = True
            return
        self.app.gate.closed = True  # here, not on the loop: what arrives from now on is refused
        self._loop.call_soon_threadsafe(self._begin)

    def _begin(self) -> None:
        self._drain = asyncio.ensure_future(self._finish())

    async def _finish(self) -> None:
        gate = self.app.gate
        try:
            await asyncio.wait_for(gate.empty.wait(), self.seconds)
        except asyncio.TimeoutError:
            logging.getLogger("attlas.serve").error("%d requests were cut off after %g s", gate.inside, self.seconds)
            for flight in list(self.app.service.flights.values()):
                flight.fail(draining())
            await asyncio.sleep(0.5)  # their answers are written
        self.should_exit = True


def run(options: ServeOptions, started: Callable[[dict[str, Any]], None] = lambda _: None, served: Served | None = None) -> None:
    """Serve until a signal ends it. `started` is told the address when it is bound. `served` replaces the
    model that the options name."""
    keys = keys_of(options)
    options.check_reach(keys)
    bound = bind(options.host, options.port)
    if served is None:
        from attlas.serve.load import load

        served = load(options)
    logging.basicConfig(stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    app = create_app(Service(served, options.limits()), keys, options.allow_origin, options.hosts(keys))
    config = configuration(app, options.log_level)
    host, port = bound.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    started({"url": f"http://{shown}:{port}", "model": served.name, "pid": os.getpid(), "keys": len(keys)})
    DrainingServer(config, app, options.drain_seconds).run(sockets=[bound])


def configuration(app: Server, log_level: str) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        log_level=log_level,
        http=Connection,  # h11 bounds the headers
        h11_max_incomplete_event_size=LARGEST_HEADER,
        ws="none",
        lifespan="on",
        access_log=log_level in ("info", "debug"),
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=5,
    )


def bind(host: str, port: int) -> socket.socket:
    """A listening address, before the model is loaded: a taken port is said at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise AttlasError(f"cannot listen on {host}, port {port}: {error.strerror or error}") from error
    return sock
