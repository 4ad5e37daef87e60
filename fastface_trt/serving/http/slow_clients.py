"""A bound on how long a client may hold a connection without asking, or without taking its answer.

uvicorn (0.54) ends a connection that is idle between two requests. It waits without end for a
first byte, for headers that arrive one byte at a time, and for a client that does not read.
"""

import asyncio
import logging
from collections import Counter
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from fastface_trt.serving.settings import ServerSettings

_log = logging.getLogger(__name__)
_TOO_SLOW = (
    b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n"
    b"content-type: text/plain; charset=utf-8\r\n\r\n"
)


class Connections:
    """How many connections are open, in total and by the clients' addresses."""

    def __init__(self, limit: int, limit_per_address: int | None) -> None:
        self._limit, self._limit_per_address = limit, limit_per_address
        self._open: Counter[str] = Counter()
        self.refused = 0

    @property
    def open(self) -> int:
        """How many are open."""
        return self._open.total()

    def enter(self, address: str) -> bool:
        """Count a new connection, unless it is one too many."""
        limit = self._limit_per_address
        if self._open.total() >= self._limit or (
            limit is not None and self._open[address] >= limit
        ):
            # A line per refusal would give the flood a second way to do harm.
            if self.refused % 1000 == 0:
                _log.warning("connections are refused: too many are open (%d)", self._open.total())
            self.refused += 1
            return False
        self._open[address] += 1
        return True

    def leave(self, address: str) -> None:
        """A counted connection has ended."""
        self._open[address] -= 1
        if not self._open[address]:
            del self._open[address]


class GuardedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 connection, with a time for headers and one for the client to read.

    It builds on h11 and not on httptools, which gathers headers without a bound on their size.
    `guarded_protocol` fills in the three attributes.
    """

    open_connections: Connections
    header_seconds: float
    write_seconds: float

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._address: str | None = None
        self._asking: asyncio.TimerHandle | None = None
        self._taking: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first request."""
        super().connection_made(transport)
        address = self.client[0] if self.client else ""
        if not self.open_connections.enter(address):
            transport.abort()
            return
        self._address = address
        self._wait_for_request()

    def connection_lost(self, exc: Exception | None) -> None:
        """Give back what the connection held."""
        super().connection_lost(exc)
        self._stop_asking()
        self._stop_taking()
        if self._address is not None:
            self.open_connections.leave(self._address)
            self._address = None

    def data_received(self, data: bytes) -> None:
        """Take in a part of a request."""
        if self.transport.is_closing():
            return
        if not self._at_work:
            self._wait_for_request()
        super().data_received(data)
        if self._at_work:
            self._stop_asking()

    def on_response_complete(self) -> None:
        """Wait for the client to take the last of it; uvicorn itself waits for its next request."""
        super().on_response_complete()
        if self._at_work:  # the next one had already come
            self._stop_asking()
        if self.transport.get_write_buffer_size() and not self.flow.write_paused:
            self._wait_for_reader()

    def pause_writing(self) -> None:
        """The buffer to the client is full."""
        super().pause_writing()
        self._wait_for_reader()

    def resume_writing(self) -> None:
        """The client has taken most of it."""
        super().resume_writing()
        self._stop_taking()

    @property
    def _at_work(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _wait_for_request(self) -> None:
        # Not put off by further bytes: the time is for all of the headers.
        if self._asking is None:
            self._asking = self.loop.call_later(self.header_seconds, self._asked_too_slowly)

    def _stop_asking(self) -> None:
        if self._asking is not None:
            self._asking.cancel()
            self._asking = None

    def _asked_too_slowly(self) -> None:
        self._asking = None
        if not self.transport.is_closing():
            self.transport.write(_TOO_SLOW)
            self.transport.close()
            self._wait_for_reader()

    def _wait_for_reader(self) -> None:
        self._stop_taking()
        self._taking = self.loop.call_later(self.write_seconds, self._read_too_slowly)

    def _stop_taking(self) -> None:
        if self._taking is not None:
            self._taking.cancel()
            self._taking = None

    def _read_too_slowly(self) -> None:
        self._taking = None
        # In the midst of an answer a little may lie there; it may have been written just now.
        waits = self.flow.write_paused or not self._at_work
        if waits and self.transport.get_write_buffer_size():
            self.transport.abort()


def guarded_protocol(settings: ServerSettings) -> type[GuardedProtocol]:
    """The `http` of a `uvicorn.Config`; every server needs one of its own, for it counts."""
    connections = Connections(settings.max_connections, settings.max_connections_per_address)

    class Guarded(GuardedProtocol):
        open_connections = connections
        header_seconds = settings.body_timeout
        write_seconds = settings.write_timeout

    return Guarded
