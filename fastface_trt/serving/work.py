"""What a worker is asked for, and the events that it answers with: the seam of all of serving.

A worker makes pictures for many clients at once. In this process it is `batching.Batcher`; in child
processes it is `workers.WorkerPool`, which holds many; HTTP, Ray and Triton see only `Worker`.
Everything here can be pickled between processes of one machine.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fastface_trt.errors import FastFaceError
from fastface_trt.runtime.face import ChannelOrder, Face
from fastface_trt.runtime.request import GenerationRequest

Pixels: TypeAlias = NDArray[np.uint8]
"""RGB, uint8 [H, W, 3]."""


@dataclass(frozen=True, slots=True)
class Task:
    """One picture to make.

    `id` is unique among the tasks of a worker. `deadline` is in seconds of `time.monotonic`, which
    all processes of a machine share and which no change of the clock moves; a task that passes it
    ends with `DeadlinePassed`, in the queue, between two steps, or before it is decoded.
    `previews` asks for a small picture of the latents with every `StepDone`. `owner` is who asks:
    a key's id or an address over HTTP, "" elsewhere.
    """

    id: str
    request: GenerationRequest
    face: Face
    channel_order: ChannelOrder = "bgr"
    deadline: float | None = None
    previews: bool = False
    owner: str = ""


@dataclass(frozen=True, slots=True)
class StepDone:
    """A step of a task is done: `step` of `steps`, counted from 1; `preview` is small RGB."""

    id: str
    step: int
    steps: int
    preview: Pixels | None = None


@dataclass(frozen=True, slots=True)
class PictureDone:
    """A task's picture, what `write_picture` stores in it, and where its time went.

    `seconds` has `queue` (until its first UNet call), `denoise` (until its last step) and `decode`.
    """

    id: str
    pixels: Pixels
    parameters: Mapping[str, Any]
    warnings: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TaskFailed:
    """A task ended without a picture."""

    id: str
    error: FastFaceError


Event: TypeAlias = StepDone | PictureDone | TaskFailed
OnEvent: TypeAlias = Callable[[Event], None]
"""Called with a task's events in order, the last of which is `PictureDone` or `TaskFailed`, exactly
once. It is called on a thread of the worker: it must return at once and not raise.
"""


class State(Enum):
    """How a worker is.

    STARTING: engines are opened and warmed up. READY: it takes tasks. DRAINING: it finishes what it
    has and takes no more. DEAD: its engines failed for good; what it had has ended with an error.
    """

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    DEAD = "dead"


@dataclass(frozen=True, slots=True)
class Load:
    """How busy a worker is, for admission and metrics.

    waiting: tasks before their first step. running: tasks between their first step and their end.
    backlog_seconds: the worker's estimate of the time until it is done with all of them, from the
    rates that it measured; 0 as long as it measured none. calls, rows: UNet calls and the rows in
    them since it started. memory_bytes: resident memory of its process.
    """

    waiting: int = 0
    running: int = 0
    backlog_seconds: float = 0.0
    calls: int = 0
    rows: int = 0
    memory_bytes: int = 0


class Worker(Protocol):
    """Makes pictures for many clients at once; every method may be called from any thread."""

    @property
    def state(self) -> State:
        """How it is; READY only after a warm-up whose pictures were finite."""
        ...

    def load(self) -> Load:
        """How busy it is now; cheap enough to ask for at every request."""
        ...

    def submit(self, task: Task, on_event: OnEvent) -> None:
        """Queue a task. Raises `Busy` when its owner's part of the queue is full, `Unavailable`
        unless READY, `InvalidRequest` for a picture that is not made here, and `DeadlinePassed` for
        one that could not be in time.

        Where it raises, `on_event` is never called. A worker that finds out later ends the task
        with a `TaskFailed` of the same error. Raises ValueError for an id that is there.
        """
        ...

    def cancel(self, task_id: str) -> None:
        """End a task with `Cancelled` before its next step; unknown and ended ones are ignored."""
        ...

    def analyze(self, pixels: Pixels, index: int | None = None, owner: str = "") -> "Future[Face]":
        """Find a face: the largest, or the `index`-th by size, beside the UNet's work.

        Owners take turns. The future raises `NoFaceFound`, `FaceIndexOutOfRange`, `BadPicture`,
        `Unavailable`, `Busy` where many pictures of its owner wait, and `EngineFailed`.
        """
        ...

    def forget(self) -> None:
        """Drop the faces and encodings that are kept for the next picture; returns at once."""
        ...

    def drain(self, seconds: float) -> bool:
        """Take no more tasks and wait for those it has; whether all ended in that time."""
        ...

    def close(self) -> None:
        """End what it still has with `Unavailable`, and free everything."""
        ...
