"""A server's life: listen, say when it is ready, drain on a signal, leave in time.

Its connections have a bound on how long a client may hold one without asking, or without taking
its answer. uvicorn (0.54) ends a connection that is idle between two requests. It waits without end
for a first byte, for headers that arrive one byte at a time, and for a client that does not read.
"""

import asyncio
import ipaddress
import logging
import os
import socket
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from fastface_trt.errors import InvalidRequest
from fastface_trt.serving.http.context import Context, keep_no_large_memory
from fastface_trt.serving.http.logs import log_event
from fastface_trt.serving.http.middleware import client_of_address
from fastface_trt.serving.settings import ServerSettings
from fastface_trt.serving.work import State, Worker

STOPPED, WORKER_DIED, HUNG = 0, 1, 70
"""Exit statuses: stopped by a signal; the worker is dead, so a supervisor should start all of it
again; something did not let go in time."""
STATE_POLL_SECONDS = 0.25
FINISH_SECONDS = 5
"""For answers that are on their way when all tasks have ended."""
CLOSE_SECONDS = 15.0
_REQUEST_TIMEOUT = (
    b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n"
    b"content-type: text/plain; charset=utf-8\r\n\r\n"
)
_log = logging.getLogger(__name__)


def check_binding(settings: ServerSettings, *, allow_anonymous: bool) -> None:
    """Raise `InvalidRequest` where everybody who reaches the address would be let in."""
    if settings.api_keys or allow_anonymous or is_local(settings.host):
        return
    raise InvalidRequest(
        f"Without API keys, everybody who reaches {settings.host} could make pictures.",
        "Give keys (--api-keys-file or FASTFACE_API_KEYS), or let everybody in with "
        "--allow-anonymous.",
    )


def is_local(host: str) -> bool:
    """Whether only this machine reaches the address."""
    if host == "localhost":
        return True
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def listen(settings: ServerSettings) -> socket.socket:
    """The socket of the server. Raises `InvalidRequest` where the address cannot be had."""
    host, port = settings.host, settings.port
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        raise InvalidRequest(
            f"The server cannot listen on {host} port {port}: {error.strerror or error}.",
            "Choose another --host or --port.",
        ) from None


def run_server(
    app: FastAPI,
    worker: Worker,
    settings: ServerSettings,
    listener: socket.socket,
    *,
    give_up: Callable[[int], Any] = os._exit,
) -> int:
    """Serve `app` until SIGTERM, SIGINT or the worker's death; the exit status.

    The first signal makes the server unready and lets its tasks end within `drain_seconds`, a
    second one ends everything at once. The worker is closed on the way out. Where something hangs
    past all of its times, `give_up` is called with `HUNG`, from a thread.
    """
    keep_no_large_memory()
    with listener:
        return asyncio.run(_Life(app, worker, settings, give_up).run(listener))


class _Server(uvicorn.Server):
    """uvicorn's server, which leaves it to us what a signal means."""

    def __init__(
        self, config: uvicorn.Config, listening: Callable[[], None], stop: Callable[[], object]
    ) -> None:
        super().__init__(config)
        self._listening, self._stop = listening, stop
        self._signals = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Tell that it listens; from here on a signal finds its handler."""
        await super().startup(sockets)
        self._listening()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """On the first signal drain, on the second leave."""
        self._signals += 1
        if self._signals == 1:
            self._stop()
        else:
            self.should_exit = self.force_exit = True


class _Life:
    def __init__(
        self, app: FastAPI, worker: Worker, settings: ServerSettings, give_up: Callable[[int], Any]
    ) -> None:
        context = app.state.context
        assert isinstance(context, Context)
        self._app, self._worker, self._settings = app, worker, settings
        self._admission, self._give_up = context.admission, give_up

    async def run(self, listener: socket.socket) -> int:
        loop = asyncio.get_running_loop()
        stop_asked = asyncio.Event()
        config = uvicorn.Config(
            self._app,
            http=guarded_protocol(self._settings),
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=FINISH_SECONDS,
        )
        host, port = listener.getsockname()[:2]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        server = _Server(
            config,
            lambda: log_event("listening", address=address),
            lambda: loop.call_soon_threadsafe(stop_asked.set),
        )
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        stopping = asyncio.create_task(stop_asked.wait())
        dying = asyncio.create_task(self._death())
        try:
            await asyncio.wait({serving, stopping, dying}, return_when=asyncio.FIRST_COMPLETED)
            died = dying.done()
            dying.cancel()  # from now on the worker's end is our own doing
            await self._stop(server, serving, died)
        finally:
            for one in (stopping, dying):
                one.cancel()
        return WORKER_DIED if died else STOPPED

    async def _death(self) -> None:
        before = None
        while self._worker.state is not State.DEAD:
            if self._worker.state is not before:
                before = self._worker.state
                log_event("worker", state=before.value)
            await asyncio.sleep(STATE_POLL_SECONDS)
        log_event("the worker is dead", level=logging.CRITICAL)

    async def _stop(self, server: _Server, serving: "asyncio.Task[None]", died: bool) -> None:
        self._admission.leaving = True
        seconds = self._settings.drain_seconds
        alarm = threading.Timer(seconds + CLOSE_SECONDS + 2 * FINISH_SECONDS, self._give_up, [HUNG])
        alarm.name, alarm.daemon = "fastface-alarm", True
        alarm.start()
        if not died and not serving.done():
            log_event("draining", seconds=seconds, in_work=self._admission.in_work)
            draining = _in_thread("fastface-drain", lambda: self._worker.drain(seconds))
            # A second signal ends serving, and there is nobody left to drain for.
            await asyncio.wait({draining, serving}, return_when=asyncio.FIRST_COMPLETED)
        # What is left ends with an error now, so that its clients get an answer.
        await _in_thread("fastface-close", self._worker.close)
        server.should_exit = True
        await serving
        alarm.cancel()
        log_event("stopped", in_work=self._admission.in_work)


def _in_thread(name: str, function: Callable[[], object]) -> "asyncio.Future[None]":
    """Ends when `function` has, or raised; the thread does not keep the process alive."""
    loop = asyncio.get_running_loop()
    ended = loop.create_future()

    def set_ended(error: BaseException | None) -> None:
        if ended.cancelled():
            return
        if error is None:
            ended.set_result(None)
        else:
            ended.set_exception(error)

    def run() -> None:
        error: BaseException | None = None
        try:
            function()
        except Exception as failure:
            error = failure
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(set_ended, error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return ended


def guarded_protocol(settings: ServerSettings) -> "type[GuardedProtocol]":
    """The `http` of a `uvicorn.Config`; every server needs one of its own, for it counts."""
    connections = Connections(settings.max_connections, settings.max_connections_per_address)

    class Guarded(GuardedProtocol):
        open_connections = connections
        header_seconds = settings.body_timeout
        write_seconds = settings.write_timeout

    return Guarded


class GuardedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 connection, with a time for headers and one for the client to read.

    It builds on h11 and not on httptools, which gathers headers without a bound on their size.
    `guarded_protocol` fills in the three attributes.
    """

    open_connections: "Connections"
    header_seconds: float
    write_seconds: float

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
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
        if not self._at_work:
            self._start_request_timer()
        super().data_received(data)
        if self._at_work:
            self._stop_request_timer()

    def on_response_complete(self) -> None:
        """Wait for the client to take the last of it; uvicorn itself waits for its next request."""
        super().on_response_complete()
        if self._at_work:  # the next one had already come
            self._stop_request_timer()
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
