"""What goes over the pipe between the pool and a worker's process; pickled, both ends are ours.

`Outbox` writes without making the sender wait: nobody blocks on a slow reader.
"""

import threading
from dataclasses import dataclass
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, TypeAlias

from fastface_trt.errors import FastFaceError
from fastface_trt.runtime.face import Face
from fastface_trt.serving.settings import WorkerSettings
from fastface_trt.serving.work import Event, Load, Pixels, State, Task


@dataclass(frozen=True, slots=True)
class Open:
    """The first message to a worker: what to open."""

    settings: WorkerSettings


@dataclass(frozen=True, slots=True)
class Submit:
    """Make a picture; answered by events."""

    task: Task


@dataclass(frozen=True, slots=True)
class Cancel:
    """End a task before its next step."""

    task_id: str


@dataclass(frozen=True, slots=True)
class Analyze:
    """Find a face; answered by `Analyzed` with the same key."""

    key: int
    pixels: Pixels
    index: int | None


@dataclass(frozen=True, slots=True)
class Forget:
    """Drop the faces and encodings that are kept."""


@dataclass(frozen=True, slots=True)
class Close:
    """Leave now; the tasks that are left end with `Unavailable`."""


@dataclass(frozen=True, slots=True)
class Analyzed:
    """The face that was found, or why there is none."""

    key: int
    result: Face | FastFaceError


@dataclass(frozen=True, slots=True)
class Report:
    """How the worker is, sent when that changes and several times a second."""

    state: State
    load: Load


@dataclass(frozen=True, slots=True)
class OpenFailed:
    """The engines could not be opened, and trying again would not help."""

    error: FastFaceError


ToWorker: TypeAlias = Open | Submit | Cancel | Analyze | Forget | Close
FromWorker: TypeAlias = Event | Analyzed | Report | OpenFailed


class Outbox:
    """Messages for the other end of a connection, pickled and written by a thread of its own.

    Nothing is lost while both ends live; when the other end has gone, what is left is dropped.
    """

    def __init__(self, connection: "Connection[Any, Any]", name: str) -> None:
        self._connection = connection
        self._messages: SimpleQueue[Any] = SimpleQueue()
        self._thread = threading.Thread(target=self._write, name=name, daemon=True)
        self._thread.start()

    def put(self, message: object) -> None:
        """Queue a message; messages arrive in the order of these calls."""
        self._messages.put(message)

    def close(self, seconds: float) -> None:
        """Write what is left, for at most this long."""
        self._messages.put(None)
        self._thread.join(timeout=seconds)

    def _write(self) -> None:
        while (message := self._messages.get()) is not None:
            try:
                self._connection.send(message)
            except OSError:  # the reader sees the end of the connection and tells everybody
                return
