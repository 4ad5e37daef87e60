"""The pool's end of one worker process: starting it, talking to it, noticing its death."""

import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.spawn import get_executable
from typing import Any

from fastface_trt.errors import BackendUnavailable
from fastface_trt.serving.settings import WorkerSettings
from fastface_trt.serving.work import Load, State
from fastface_trt.serving.workers.messages import Close, FromWorker, Open, Report, ToWorker
from fastface_trt.serving.workers.outbox import Outbox

WORKER_PROGRAM = ("-m", "fastface_trt.serving.workers.child")


class WorkerProcess:
    """One child. `on_message` and `on_death` are called on its reader's thread, death last.

    `state` and `load` are what it reported last; DEAD once it has gone.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        environment: Mapping[str, str],
        name: str,
        on_message: Callable[["WorkerProcess", FromWorker], None],
        on_death: Callable[["WorkerProcess", int], None],
        *,
        program: Sequence[str] = WORKER_PROGRAM,
    ) -> None:
        self.name = name
        self.state = State.STARTING
        self.load = Load()
        self._on_message, self._on_death = on_message, on_death
        ours, theirs = _pair()
        with theirs:
            self._child = subprocess.Popen(
                # What multiprocessing would start: a program that embeds Python sets it.
                [os.fsdecode(get_executable()), *program, str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                # Its own session, so that a Ctrl-C reaches only the server, which then decides.
                start_new_session=True,
                env={**os.environ, "PYTHONSAFEPATH": "1", **environment},
            )
        self._connection: Connection[Any, Any] = Connection(ours.detach())
        self._outbox = Outbox(self._connection, f"{name} outbox")
        self.send(Open(settings))
        self._reader = threading.Thread(target=self._read, name=f"{name} reader", daemon=True)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._child.pid

    def start_reading(self) -> None:
        """Let its messages in; from here on the callbacks are called."""
        self._reader.start()

    def send(self, message: ToWorker) -> None:
        """Queue a message; dropped when the process has gone, which `on_death` tells."""
        self._outbox.put(message)

    def kill(self) -> None:
        """End it at once; `on_death` follows."""
        with suppress(ProcessLookupError):
            self._child.send_signal(signal.SIGKILL)

    def leave(self) -> None:
        """Ask it to free its engines and leave; `on_death` follows."""
        self.send(Close())

    def join(self, seconds: float) -> bool:
        """Wait for its end and that of its threads; whether that came in time."""
        self._reader.join(timeout=seconds)
        return not self._reader.is_alive()

    def _read(self) -> None:
        while True:
            try:
                message = self._connection.recv()
            except (EOFError, OSError):
                break
            if isinstance(message, Report):
                self.state, self.load = message.state, message.load
            self._on_message(self, message)
        self.state = State.DEAD
        self.kill()  # whatever closed the pipe without leaving
        status = self._child.wait()
        self._outbox.close(1)
        self._connection.close()
        self._on_death(self, status)


def _pair() -> tuple[socket.socket, socket.socket]:
    if os.name != "posix":
        raise BackendUnavailable(
            "Worker processes need Linux or macOS.",
            "Use the Python API here, or run the server under WSL.",
        )
    return socket.socketpair()
