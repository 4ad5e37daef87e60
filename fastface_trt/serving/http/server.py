"""A server's life: listen, say when it is ready, drain on a signal, leave in time."""

import asyncio
import ipaddress
import logging
import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from fastface_trt.errors import InvalidRequest
from fastface_trt.measure.memory import keep_no_large_memory
from fastface_trt.serving.http.context import Context
from fastface_trt.serving.http.logs import log_event
from fastface_trt.serving.http.protocol import BoundedListener, guarded_protocol
from fastface_trt.serving.settings import ServerSettings
from fastface_trt.serving.work import State, Worker

STOPPED, WORKER_DIED, HUNG = 0, 1, 70
"""Exit statuses: stopped by a signal; the worker is dead, so a supervisor should start all of it
again; something did not let go in time."""
STATE_POLL_SECONDS = 0.25
FINISH_SECONDS = 5
"""For answers that are on their way when all tasks have ended."""
CLOSE_SECONDS = 15.0
BACKLOG = 2048
"""Connections that the system keeps until they are accepted."""
ACCEPTED_AT_ONCE = 32
"""Connections that are accepted before the loop looks at anything else."""


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
        return socket.create_server(address[:2], family=family, backlog=BACKLOG)
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
        for one in sockets or ():
            one.listen(BACKLOG)  # asyncio has made it as short as what it accepts at once
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
        protocol = guarded_protocol(self._settings, self._app.state.context.metrics)
        listener = BoundedListener(listener, protocol.open_connections)
        config = uvicorn.Config(
            self._app,
            http=protocol,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=FINISH_SECONDS,
            backlog=ACCEPTED_AT_ONCE,
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
