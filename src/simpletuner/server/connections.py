"""Connections that do not keep up are closed: whoever sends a request byte by byte holds nothing for long."""

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADERS_WITHIN_S = 10.0
"""How long a request may take from its first byte, or the first one from the connection, to the end of its headers."""
MOST_CONNECTIONS = 600
"""At once. The usual limit of open files is 1024, and runs' files must open beside them."""


class TimedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1, which alone waits for the end of a request's headers for ever."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._deadline = self.loop.call_later(HEADERS_WITHIN_S, transport.close)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop_clock()
        elif self._deadline is None:  # the start of a later request
            self._deadline = self.loop.call_later(HEADERS_WITHIN_S, self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_clock()
        super().connection_lost(exc)

    def _stop_clock(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
