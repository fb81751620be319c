"""Close connections that send their headers too slowly, so that a slow client cannot hold resources."""

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADERS_WITHIN_S = 10.0
"""Time limit for a request's headers, counted from its first byte (for the first request: from the connection)."""
MOST_CONNECTIONS = 600
"""Most open connections. The usual limit of open files is 1024, and run files need some of them."""


class TimedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 protocol with a deadline for a request's headers; uvicorn itself waits forever."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._deadline = self.loop.call_later(HEADERS_WITHIN_S, transport.close)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._cancel_deadline()
        elif self._deadline is None:  # a later request starts
            self._deadline = self.loop.call_later(HEADERS_WITHIN_S, self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_deadline()
        super().connection_lost(exc)

    def _cancel_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
