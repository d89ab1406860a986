"""Connections of the server: who sends no request, or reads no answer, does not hold one for long."""

import asyncio
import socket

from uvicorn.protocols.http.h11_impl import H11Protocol

REQUEST_SECONDS = 60.0
"""From a connection's beginning, or a request's first byte, to the request's last."""
UNREAD_SECONDS = 60.0
"""That a reader takes nothing of what was sent to it."""


class Impatient(H11Protocol):
    """HTTP/1.1 that drops a connection on which a request does not come, or not to its end."""

    _owed: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Begin to wait for the first request."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Read on."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no longer."""
        self._wait_no_longer()
        super().connection_lost(exc)

    def _watch(self) -> None:
        # Bytes that come behind a complete answer belong to a request of which not all is here.
        if self.cycle and not self.cycle.more_body and not self.cycle.response_complete:
            self._wait_no_longer()
        elif self._owed is None:
            self._owed = self.loop.call_later(REQUEST_SECONDS, self.transport.abort)

    def _wait_no_longer(self) -> None:
        if self._owed is not None:
            self._owed.cancel()
            self._owed = None


def drop_unread(listening: socket.socket) -> None:
    """Have the kernel drop connections accepted here whose reader takes nothing (RFC 5482; on Linux)."""
    if option := getattr(socket, "TCP_USER_TIMEOUT", None):
        listening.setsockopt(socket.IPPROTO_TCP, option, int(UNREAD_SECONDS * 1000))
