"""Connections of strangers: what holds before a request is one, and before anybody looks at a key.

Bytes are bounded by many; here counts are, since a header or a chunk of one byte costs as much as a
long one: the lines of a head, the chunks of a body. Bodies reach the application in pieces that are
worth waking it for. What frames a message in two ways, or in a version that is not spoken here, is
answered and its connection closed.

A client can hold a connection only so long without asking, or without taking its answer. uvicorn
(0.54) ends a connection that is idle between two requests. It waits without end for a first byte,
for headers that arrive one byte at a time, and for a client that does not read.
"""

import asyncio
import logging
import re
import socket
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import h11
from h11._readers import READERS
from h11._receivebuffer import ReceiveBuffer
from starlette.exceptions import HTTPException
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from fastface_trt.errors import MissingDependency, install_hint
from fastface_trt.serving.http.errors import http_error_answer
from fastface_trt.serving.http.metrics import Metrics
from fastface_trt.serving.http.middleware import RateLimit, client_of_address
from fastface_trt.serving.settings import ServerSettings

MAX_HEAD_BYTES = 16_384
MAX_HEADERS = 100
MAX_CHUNK_LINE = 256
"""Bytes of the line before a chunk, with its extensions."""
FREE_CHUNKS = 256
CHUNK_BYTES = 1024
"""A body may have `FREE_CHUNKS` chunks of any size, and another for each `CHUNK_BYTES` of it."""
JOINED_BYTES = 8192
"""What comes in smaller pieces is kept until there are so many bytes, or the last ones."""
HUNG_UP_AT_ONCE = 32
"""Connections that are refused before the loop looks at anything else."""
RECEIVED_BYTES = 65_536
"""Taken from a socket at a time: how long one connection may occupy the loop, and what is kept of
requests that come before the answer to the one at work."""
REFUSAL_SECONDS = 1.0
"""After which a client is told that it is refused: until then it does not come again."""
LINGER_SECONDS = 1.0
LINGER_BYTES = 1_000_000
"""For how long, and how much, is still read of a client that was refused, so that it gets to its
answer: a socket that is closed over unread bytes resets the connection."""
REFUSALS = {
    400: "This is no request of HTTP/1.1 that can be read in one way only",
    413: f"A body has at most {FREE_CHUNKS} chunks and one more per {CHUNK_BYTES} bytes",
    431: f"A request has at most {MAX_HEADERS} headers in {MAX_HEAD_BYTES:,} bytes",
    501: "The only transfer coding is chunked",
    505: "Requests are of HTTP/1.1 or HTTP/1.0",
}
_REQUEST_TIMEOUT = (
    b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n"
    b"content-type: text/plain; charset=utf-8\r\n\r\n"
)
_BLANK_LINE = re.compile(rb"\n\r?\n")
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:;[\t\x20-\x7e\x80-\xff]{0,200})?[ \t]{0,16}\r\n")
_log = logging.getLogger(__name__)


def guarded_protocol(
    settings: ServerSettings, metrics: Metrics | None = None
) -> "type[GuardedProtocol]":
    """The `http` of a `uvicorn.Config`; every server needs one of its own, for it counts.

    Raises `MissingDependency` where the installed h11 would not ask the bounded readers.
    """
    if getattr(BoundedConnection(), "_reader", None) is not read_head:
        raise MissingDependency(
            "The installed h11 reads requests in a way that is not bounded here.",
            f"Run {install_hint('serve')}",
        )
    connections = Connections(
        settings.max_connections,
        settings.max_connections_per_address,
        metrics.connection_refused if metrics else lambda _: None,
    )

    class Guarded(GuardedProtocol):
        open_connections = connections
        turns = Turns()
        header_seconds = settings.body_timeout
        write_seconds = settings.write_timeout

    return Guarded


def refuse(status: int) -> h11.LocalProtocolError:
    """What a reader of h11 raises for a client that is answered with `status`."""
    return h11.LocalProtocolError(REFUSALS[status], error_status_hint=status)


def read_head(buffer: ReceiveBuffer) -> h11.Request | None:
    """h11's reader of a request's head, once the head is known to be a small one."""
    check_lines(buffer)
    request = READERS[h11.CLIENT, h11.IDLE](buffer)  # type: ignore[operator]
    if request is None:
        return None
    assert isinstance(request, h11.Request)
    if request.http_version not in (b"1.0", b"1.1"):
        raise refuse(505)
    names = [name for name, _ in request.headers]
    # RFC 9112, 6.1: whoever frames a body in two ways may be hiding a second request in it.
    if b"transfer-encoding" in names and (
        b"content-length" in names or request.http_version == b"1.0"
    ):
        raise refuse(400)
    return request


def check_lines(buffer: ReceiveBuffer) -> None:
    """Raise for a head, or trailers, of too many lines or bytes, whether or not all have come."""
    seen = bytes(buffer)
    blank = _BLANK_LINE.search(seen)
    size = blank.end() if blank else len(seen)
    if size > MAX_HEAD_BYTES or seen.count(b"\n", 0, size) > MAX_HEADERS + 2:
        raise refuse(431)


class LengthReader:
    """A body of a known length, in pieces of some size."""

    def __init__(self, length: int) -> None:
        self._left = length

    def __call__(self, buffer: ReceiveBuffer) -> h11.Data | h11.EndOfMessage | None:
        if not self._left:
            return h11.EndOfMessage()
        if len(buffer) < min(self._left, JOINED_BYTES):
            return None
        data = buffer.maybe_extract_at_most(self._left) or b""
        self._left -= len(data)
        return h11.Data(data=bytes(data))


class ChunksReader:
    """A chunked body, joined: all chunks that have come are read in one go and counted."""

    def __init__(self) -> None:
        self._joined = bytearray()
        self._left = 0
        """Bytes of the chunk being read that are still to come."""
        self._begun = self._ended = False
        """Whether there is a chunk whose line end has not come, and whether all have come."""
        self._chunks = self._bytes = 0

    def __call__(self, buffer: ReceiveBuffer) -> h11.Data | h11.EndOfMessage | None:
        if not self._ended:
            taken = self._take(bytes(buffer))
            if taken:
                buffer.maybe_extract_at_most(taken)
        if self._joined and (self._ended or len(self._joined) >= JOINED_BYTES):
            data, self._joined = self._joined, bytearray()
            return h11.Data(data=bytes(data))
        return self._trailers(buffer) if self._ended else None

    def _take(self, data: bytes) -> int:
        """Add the chunks in `data` to what is joined; how many bytes of it are done with."""
        at = 0
        while True:
            if self._left:
                part = data[at : at + self._left]
                self._joined += part
                self._left -= len(part)
                at += len(part)
            if self._left:
                return at
            if self._begun:
                behind = data[at : at + 2]
                if behind != b"\r\n":
                    if behind not in (b"", b"\r"):
                        raise refuse(400)
                    return at
                self._begun = False
                at += 2
            line = _CHUNK_LINE.match(data, at)
            if line is None:
                if len(data) - at > MAX_CHUNK_LINE or data.find(b"\n", at) >= 0:
                    raise refuse(400)
                return at
            at = line.end()
            self._left = int(line[1], 16)
            if not self._left:
                self._ended = True
                return at
            self._begun = True
            self._chunks += 1
            self._bytes += self._left
            if self._chunks > FREE_CHUNKS + self._bytes // CHUNK_BYTES:
                raise refuse(413)

    @staticmethod
    def _trailers(buffer: ReceiveBuffer) -> h11.EndOfMessage | None:
        check_lines(buffer)
        lines = buffer.maybe_extract_lines()
        if lines is None:
            return None
        if not all(b":" in line for line in lines):
            raise refuse(400)
        return h11.EndOfMessage()  # nobody here asks for trailers


_READERS = {
    **READERS,
    (h11.CLIENT, h11.IDLE): read_head,
    h11.SEND_BODY: {
        **READERS[h11.SEND_BODY],  # type: ignore[dict-item]
        "content-length": LengthReader,
        "chunked": ChunksReader,
    },
}


class BoundedConnection(h11.Connection):
    """h11's server side with the readers above; `refusal` is the status of what it refused.

    h11 (0.16) asks `_get_io_object` for a reader whenever its state changes.
    """

    def __init__(self) -> None:
        super().__init__(h11.SERVER, MAX_HEAD_BYTES)
        self.refusal = 400

    def _get_io_object(self, role: Any, event: Any, io_dict: Any) -> Any:
        return super()._get_io_object(role, event, _READERS if io_dict is READERS else io_dict)

    def next_event(self) -> Any:
        """See h11."""
        try:
            return super().next_event()
        except h11.RemoteProtocolError as error:
            self.refusal = error.error_status_hint
            raise


class GuardedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 connection, bounded, and timed while headers come and answers go.

    It builds on h11 and not on httptools, which gathers headers without a bound on their size.
    `guarded_protocol` fills in the four attributes.
    """

    open_connections: "Connections"
    turns: "Turns"
    header_seconds: float
    write_seconds: float

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.conn: BoundedConnection = BoundedConnection()
        self._unread: int | None = None
        """Of a client that was refused: how many bytes of it may still come."""
        self._answered_before = self._awaits_turn = False
        self._address: str | None = None
        self._request_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first request."""
        super().connection_made(transport)
        address = client_of_address(self.client[0]) if self.client else ""
        if not self.open_connections.enter(address):
            transport.abort()
            return
        with suppress(AttributeError):  # asyncio's transports have it, at 256 KiB
            transport.max_size = RECEIVED_BYTES  # type: ignore[attr-defined]
        self._address = address
        self._start_request_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Give back what the connection held."""
        super().connection_lost(exc)
        self._stop_request_timer()
        self._stop_write_timer()
        if self._address is not None:
            self.open_connections.leave(self._address)
            self._address = None

    def data_received(self, data: bytes) -> None:
        """Take in a part of a request."""
        if self.transport.is_closing():
            return
        if self._unread is not None:
            self._unread -= len(data)
            if self._unread < 0:
                self.transport.abort()
            return
        if not self._at_work:
            self._start_request_timer()
        super().data_received(data)

    def handle_events(self) -> None:
        """Read what has come, once it is this connection's turn."""
        idle = self._answered_before and self.conn.their_state is h11.IDLE
        if idle and self.conn.trailing_data[0]:
            if not self._awaits_turn:
                self._awaits_turn = True
                self.flow.pause_reading()
                self.turns.wait(self._begin)
            return
        super().handle_events()
        if self._at_work:
            self._stop_request_timer()

    def _begin(self) -> None:
        self._answered_before = self._awaits_turn = False
        if not self.transport.is_closing():
            self.flow.resume_reading()
            self.handle_events()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no request, where an answer is still possible, and read no more of it.

        uvicorn's own raises where a part of an answer has been sent.
        """
        status = self.conn.refusal if self.conn.refusal in REFUSALS else 400
        self.open_connections.count_refusal(str(status))
        self._unset_keepalive_if_required()
        self._stop_request_timer()
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            self._start_write_timer()
            return
        self._unread = LINGER_BYTES
        self.flow.pause_reading()
        self.loop.call_later(REFUSAL_SECONDS, self._answer_refusal, status)

    def _answer_refusal(self, status: int) -> None:
        if self.transport.is_closing():
            return
        answer = http_error_answer(HTTPException(status, REFUSALS[status]))
        answer.headers["Connection"] = "close"
        head = [b"HTTP/1.1 %d %s" % (status, STATUS_PHRASES[status])]
        head += [b"%s: %s" % header for header in answer.raw_headers]
        self.transport.write(b"\r\n".join([*head, b"", bytes(answer.body)]))
        self.transport.write_eof()
        self.flow.resume_reading()
        self.loop.call_later(LINGER_SECONDS, self.transport.abort)

    def on_response_complete(self) -> None:
        """Wait for the client to take the last of it; uvicorn itself waits for its next request."""
        self._answered_before = True
        super().on_response_complete()
        if self.transport.get_write_buffer_size() and not self.flow.write_paused:
            self._start_write_timer()

    def pause_writing(self) -> None:
        """The buffer to the client is full."""
        super().pause_writing()
        self._start_write_timer()

    def resume_writing(self) -> None:
        """The client has taken most of it."""
        super().resume_writing()
        self._stop_write_timer()

    @property
    def _at_work(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _start_request_timer(self) -> None:
        # Not put off by further bytes: the time is for all of the headers.
        if self._request_timer is None:
            self._request_timer = self.loop.call_later(self.header_seconds, self._request_timed_out)

    def _stop_request_timer(self) -> None:
        if self._request_timer is not None:
            self._request_timer.cancel()
            self._request_timer = None

    def _request_timed_out(self) -> None:
        self._request_timer = None
        if not self.transport.is_closing():
            self.transport.write(_REQUEST_TIMEOUT)
            self.transport.close()
            self._start_write_timer()

    def _start_write_timer(self) -> None:
        self._stop_write_timer()
        self._write_timer = self.loop.call_later(self.write_seconds, self._write_timed_out)

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _write_timed_out(self) -> None:
        self._write_timer = None
        # In the midst of an answer a little may lie there; it may have been written just now.
        waits = self.flow.write_paused or not self._at_work
        if waits and self.transport.get_write_buffer_size():
            self.transport.abort()


class Turns:
    """Lets one connection per turn of the loop begin with its next request, in order.

    Whoever sends one request behind the other, on many connections, would otherwise have all of
    them answered before anybody else is looked at: a new connection, or a health probe on it.
    """

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], None]] = deque()

    def wait(self, begin: Callable[[], None]) -> None:
        """Call `begin` when it is its turn."""
        self._waiting.append(begin)
        if len(self._waiting) == 1:
            asyncio.get_running_loop().call_soon(self._next)

    def _next(self) -> None:
        # It stays in the line while it begins, so that nobody starts a second one.
        try:
            self._waiting[0]()
        finally:
            self._waiting.popleft()
            if self._waiting:
                asyncio.get_running_loop().call_soon(self._next)


class BoundedListener(socket.socket):
    """A listening socket that hangs up on clients that open too many connections.

    Before anything is made for them: whoever opens and closes thousands would else keep the loop
    busy with that alone.
    """

    def __init__(self, listener: socket.socket, connections: "Connections") -> None:
        super().__init__(fileno=listener.detach())
        self._connections = connections

    def accept(self) -> tuple[socket.socket, Any]:
        """The next connection of a client that may have one."""
        for _ in range(HUNG_UP_AT_ONCE):
            connection, address = super().accept()
            if self._connections.may_open(client_of_address(str(address[0]))):
                return connection, address
            connection.close()
        raise BlockingIOError  # there may be more, which the loop comes back for


class Connections:
    """How many connections are open, in total and by the clients' addresses.

    An address may open as many in a second as it may have open.
    """

    def __init__(
        self,
        limit: int,
        limit_per_address: int | None,
        count_refusal: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._limit, self._limit_per_address = limit, limit_per_address
        self._rate = RateLimit(limit_per_address, seconds=1.0)
        self._open: Counter[str] = Counter()
        self.refused = 0
        self.count_refusal = count_refusal

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
            return self._refuse("too many are open")
        self._open[address] += 1
        return True

    def may_open(self, address: str) -> bool:
        """Count that one is opened, unless that comes too often."""
        return not self._rate.wait(address) or self._refuse("a client opens too many a second")

    def _refuse(self, why: str) -> bool:
        # A line per refusal would give the flood a second way to do harm.
        if self.refused % 1000 == 0:
            _log.warning("connections are refused: %s (%d are open)", why, self._open.total())
        self.refused += 1
        self.count_refusal("connection")
        return False

    def leave(self, address: str) -> None:
        """A counted connection has ended."""
        self._open[address] -= 1
        if not self._open[address]:
            del self._open[address]
