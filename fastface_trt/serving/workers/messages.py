"""What goes over the pipe between the pool and a worker's process; pickled, both ends are ours.

`Outbox` writes without making the sender wait: nobody blocks on a slow reader. `CallRecord` says
what a message could not, since a process that crashes sends none: on whose tasks it was working.
"""

import json
import os
import struct
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from mmap import mmap
from multiprocessing.connection import Connection
from queue import SimpleQueue
from time import monotonic
from typing import Any, TypeAlias

from fastface_trt.errors import FastFaceError
from fastface_trt.runtime.face import Face
from fastface_trt.serving.settings import WorkerSettings
from fastface_trt.serving.work import Event, Load, Pixels, State, Task

DEAD_ENGINES = 70
"""Exit status of a worker whose engines failed for good; EX_SOFTWARE of sysexits.h."""


@dataclass(frozen=True, slots=True)
class Open:
    """The first message to a worker: what to open."""

    settings: WorkerSettings


@dataclass(frozen=True, slots=True)
class Submit:
    """Make a picture; answered by events. `alone` keeps others out of its UNet calls."""

    task: Task
    alone: bool = False


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


@dataclass(frozen=True, slots=True)
class Call:
    """What engines are doing: the ids of its tasks, none for a test of the engines themselves, and
    since when, in seconds of `time.monotonic`.
    """

    ids: tuple[str, ...]
    since: float


class CallRecord:
    """The call that a worker's engines are in, in memory that it shares with the pool.

    What is written is there at once and outlives the process. `descriptor` is a file of its size.
    """

    _SIZE = 1 << 16
    _HEAD = struct.Struct("dI")

    def __init__(self, descriptor: int) -> None:
        self._memory = mmap(descriptor, self._SIZE)

    @classmethod
    def new_file(cls) -> int:
        """A descriptor of a file without a name, for both ends; whoever asks closes it."""
        if hasattr(os, "memfd_create"):  # needs no folder that can be written
            descriptor = os.memfd_create("fastface-call")
        else:
            with tempfile.TemporaryFile() as file:
                descriptor = os.dup(file.fileno())
        os.ftruncate(descriptor, cls._SIZE)
        return descriptor

    def write(self, ids: Sequence[str] | None) -> None:
        """The engines begin to work on these tasks; None where they are done."""
        head, room = self._HEAD, self._SIZE - self._HEAD.size
        self._memory[: head.size] = head.pack(0.0, 0)
        if ids is not None:
            text = json.dumps(ids).encode()[:room]
            self._memory[head.size : head.size + len(text)] = text
            self._memory[: head.size] = head.pack(monotonic(), len(text))

    def read(self) -> Call | None:
        """The call that was written last, None where it is done."""
        since, length = self._HEAD.unpack(self._memory[: self._HEAD.size])
        if not since:
            return None
        ids: Sequence[str] = ()
        with suppress(ValueError):  # it is being written this moment, or was too long
            ids = json.loads(self._memory[self._HEAD.size : self._HEAD.size + length])
        return Call(tuple(ids), since)
