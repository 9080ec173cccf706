"""A connection to the gateway: one of so many, and none that keeps us waiting for a request."""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_CONNECTIONS = 512  # at once: below the 1024 files that a process usually may open
REQUEST_SECONDS = 15.0  # from a request's first byte, or from connecting, to its last header
REFUSED_SECONDS = 1.0  # in which a refused client may read why
_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\ncontent-length: 0\r\n"
    b"connection: close\r\n\r\n"
)


class Connection(H11Protocol):
    """Uvicorn's connection, which by itself may stay open forever without asking anything."""

    _patience: asyncio.TimerHandle | None = None
    _is_refused = False

    def connection_made(self, transport: Any) -> None:
        """Take it, or answer 503 where there are too many, or far too many to answer."""
        super().connection_made(transport)
        self._is_refused = len(self.connections) > MAX_CONNECTIONS
        if len(self.connections) > 2 * MAX_CONNECTIONS:
            transport.abort()
        elif self._is_refused:
            transport.write(_FULL)
            transport.write_eof()  # closed at once, unread bytes would take the answer with them
            self._patience = self.loop.call_later(REFUSED_SECONDS, transport.abort)
        else:
            self._watch()

    def data_received(self, data: bytes) -> None:
        """Read on; a request that comes drop by drop gets no more time for each drop."""
        if not self._is_refused:
            super().data_received(data)
            self._watch()

    def send_400_response(self, msg: str) -> None:
        """Say that this is no HTTP, and let nobody answer what had begun as a request."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        try:
            super().send_400_response(msg)
        except h11.LocalProtocolError:  # an answer has begun, or may have no body
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        self._stop_watching()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """Give a request that has not wholly come the time it has; one that has, none to keep."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_watching()
        elif self._patience is None:
            self._patience = self.loop.call_later(REQUEST_SECONDS, self.transport.abort)

    def _stop_watching(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None
