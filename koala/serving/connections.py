"""Connections, bounded in number below the process' file limit, and in what they may leave unsent.

uvicorn waits for ever for the first request of a connection. Clients that send nothing, or half a
header, would use up the files that images are written with. When all connections are taken, the one
that has waited longest for its request to be complete makes room.
"""

import asyncio
import resource
from collections import OrderedDict
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 10.0  # from a connection, or the last answer on it, to a request's whole header
BACKLOG = 128  # connections that are accepted at once
MOST = 1000
_RESERVED = (
    3 * BACKLOG
)  # files besides the connections: accepted and closing ones, images, the rest


def most_connections() -> int:
    """How many connections the process' file limit allows."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST if soft == resource.RLIM_INFINITY else max(16, min(MOST, soft - _RESERVED))


def bounded(most: int, header_seconds: float = HEADER_SECONDS) -> type[H11Protocol]:
    """uvicorn's protocol for a server with `most` connections."""
    waiting: OrderedDict[Any, None] = OrderedDict()  # of the class below, oldest first

    class BoundedConnection(H11Protocol):
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > most:
                next(iter(waiting), self)._drop()
            self._wait()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            super().connection_lost(exc)

        def handle_events(self) -> None:
            super().handle_events()
            cycle = self.cycle
            if cycle is None or cycle.response_complete:
                return
            self._stop_timer()  # the header is there; a body has its own limits
            if not cycle.more_body:
                self._stop_waiting()

        def on_response_complete(self) -> None:
            if not self.transport.is_closing():
                self._wait()
            super().on_response_complete()  # may handle the next request

        def _wait(self) -> None:
            self._stop_waiting()
            waiting[self] = None
            self._timer = self.loop.call_later(header_seconds, self._drop)

        def _stop_waiting(self) -> None:
            self._stop_timer()
            waiting.pop(self, None)

        def _stop_timer(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _drop(self) -> None:
            self._stop_waiting()
            self.transport.abort()

    return BoundedConnection
