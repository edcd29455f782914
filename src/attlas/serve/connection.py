"""A connection that a client may not keep open without asking for anything."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 15.0  # within which the headers of a request must have arrived, counted from its first byte or the connection


class Connection(H11Protocol):
    """uvicorn's protocol, which by itself waits for ever for the rest of a header: whoever opens many connections and then says
    nothing would use up the process's file descriptors without ever showing a key."""

    header_seconds = HEADER_SECONDS
    _late: asyncio.TimerHandle | None = None
    _idle: Any = None  # the state of a connection on which no request has begun

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        self._idle = self.conn.their_state
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """Between requests the keep-alive timer counts; a request that has begun has limits of its own."""
        if self.conn.their_state is not self._idle or self.timeout_keep_alive_task is not None:
            self._forget()
        elif self._late is None:
            self._late = self.loop.call_later(self.header_seconds, self._close)

    def _forget(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _close(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()
