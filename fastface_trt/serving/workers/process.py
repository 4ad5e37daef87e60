"""Parts of a pool: worker processes, the slots that they fill, and the ledger of their tasks.

`WorkerProcess` starts a child, talks to it and notices its death. A `Slot` is a worker's place: the
process in it, and when the next may start. The `Ledger` has what workers were given and what has
not ended yet: every task ends exactly once there.

A death counts against the tasks that the engines were working on, as `CallRecord` says, and then
not against the slot. Who was alone in a call that crashed or stood still is not made again. Several
in one call are made again once, each in calls of its own, which shows which of them it was; so is
who was alone when the process was killed from outside or lost its GPU, which may have had another
reason. All others are made again as if nothing had been. An owner whose requests did it again and
again is let in no more for a while.
"""

import itertools
import os
import signal
import socket
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from time import monotonic
from typing import Any

from fastface_trt.engines.children import start_child
from fastface_trt.errors import (
    BackendUnavailable,
    Busy,
    Cancelled,
    DeadlinePassed,
    EngineFailed,
    FastFaceError,
    Unavailable,
)
from fastface_trt.runtime.face import Face
from fastface_trt.serving.batching.fairness import FairQueue
from fastface_trt.serving.settings import WorkerSettings
from fastface_trt.serving.work import (
    Event,
    Load,
    OnEvent,
    Pixels,
    State,
    StepDone,
    Task,
    TaskFailed,
)
from fastface_trt.serving.workers.messages import (
    DEAD_ENGINES,
    Analyze,
    Analyzed,
    CallRecord,
    Cancel,
    Close,
    FromWorker,
    Open,
    Outbox,
    Report,
    Submit,
    ToWorker,
)

WORKER_PROGRAM = ("-m", "fastface_trt.serving.workers.child")
MAX_DEATHS = 5
"""Deaths in a row that no task is to blame for, with no picture between them, after which a slot
stays empty."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 10.0
MAX_ATTEMPTS = 5
"""Workers that had a task and died, each time in the call of somebody else or in none."""
FACE_ATTEMPTS = 2
"""Workers that died while they looked for a face in a picture."""
PIXELS_OF_A_PLACE = 2_500_000
"""Of a picture that waits for its face to be found: larger ones take several of the `max_waiting`
places, so that those who wait take half a gigabyte, whatever their size; a whole one at most."""
MAX_STRIKES, STRIKE_SECONDS = 3, 600.0
"""Requests of one owner that killed workers in the last so many seconds: with these its next ones
are refused, since everybody waits while a worker starts again."""


class WorkerProcess:
    """One child. `on_message` and `on_death` are called on its reader's thread, death last.

    `state` and `load` are what it reported last; DEAD once it has gone. `record` is what its
    engines are at, or were at when it went. `stalled` says that it was killed for standing still.
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
        record = CallRecord.new_file()
        try:
            with theirs:
                shared = theirs.fileno(), record
                self._child = start_child(
                    [*program, *map(str, shared)],
                    environment,
                    pass_fds=shared,
                    stdin=subprocess.DEVNULL,
                )
            self.record = CallRecord(record)
        finally:
            os.close(record)
        self.stalled = False
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


def crashed(process: WorkerProcess, status: int) -> bool:
    """Whether a process that ended with this status crashed or stood still.

    Whoever was killed from outside, or lost its GPU, may have had no part in it.
    """
    outside = (0, DEAD_ENGINES, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT)
    return process.stalled or status not in outside


class Slot:
    """One place; all methods are called with the pool's lock held, times are monotonic seconds."""

    def __init__(self, name: str, environment: Mapping[str, str]) -> None:
        self.name = name
        self.environment = environment
        self.process: WorkerProcess | None = None
        self._deaths = 0
        self._start_at: float | None = None
        self._reported: float | None = None

    @property
    def ready(self) -> bool:
        """Whether its process takes tasks."""
        return self.process is not None and self.process.state is State.READY

    @property
    def given_up(self) -> bool:
        """Whether it stays empty."""
        return self._deaths >= MAX_DEATHS

    def give_up(self) -> None:
        """Start no process here any more: trying again would not help."""
        self._deaths = MAX_DEATHS

    def proved(self) -> None:
        """Its process made a picture, so earlier deaths say nothing."""
        if not self.given_up:
            self._deaths = 0

    def died(self, now: float, *, blamed: bool = False) -> None:
        """Its process has gone, and tasks are to blame for it or not.

        The next starts after a pause, which doubles with every death that no task is to blame for.
        """
        self.process = None
        self._reported = None
        self._deaths += not blamed
        pause = _FIRST_PAUSE if blamed else _FIRST_PAUSE * 2 ** (self._deaths - 1)
        self._start_at = None if self.given_up else now + min(_LONGEST_PAUSE, pause)

    def due(self, now: float) -> bool:
        """Whether a new process should be started now."""
        if self._start_at is None or now < self._start_at:
            return False
        self._start_at = None
        return True

    def reported(self, now: float) -> None:
        """Its process said how it is."""
        self._reported = now

    def stalled(self, now: float, seconds: float) -> bool:
        """Whether its process is in one call, or says nothing, for so long."""
        if self.process is None or self._reported is None or self.process.stalled:
            return False  # it is still opening its engines, or dying
        call = self.process.record.read()
        since = self._reported if call is None else min(call.since, self._reported)
        return now - since >= seconds


@dataclass(slots=True)
class _Assignment:
    """A task and who works on it (None: it waits for a worker); `attempts` workers had it.

    suspect: it was in the call in which a worker died; guilty: and nobody else can have been it.
    """

    task: Task
    on_event: OnEvent
    process: WorkerProcess | None
    attempts: int = 1
    cancelled: bool = False
    suspect: bool = False
    guilty: bool = False

    def ending(self, now: float) -> FastFaceError | None:
        """Why it must not go on to another worker, None where it may."""
        if self.cancelled:
            return Cancelled("The task was cancelled.")
        if self.task.deadline is not None and now > self.task.deadline:
            return DeadlinePassed(
                "The picture was not done by its deadline.", "Allow more time, or try later."
            )
        if self.guilty:
            return EngineFailed(
                "A worker died of this picture, which is not tried again.",
                "Ask for another size or other settings, and look at the server's log.",
            )
        if self.attempts >= MAX_ATTEMPTS:
            return Unavailable(
                f"{MAX_ATTEMPTS} workers died while they had this picture.", "Try again later."
            )
        return None


@dataclass(slots=True)
class _Analysis:
    """A face that is looked for; `failed` where that killed workers."""

    message: Analyze
    future: "Future[Face]"
    owner: str
    process: WorkerProcess | None = None
    attempts: int = 1
    failed: bool = False


class Ledger:
    """Tasks and analyses of all workers. `changed` is the pool's lock, and clients' callbacks
    are called without it. `ready` gives the workers that take tasks, with the lock.

    Methods that say "with the lock" expect that the caller holds it. Faces wait here, since a
    worker looks at one at a time: owners take turns, and no pipe is full of pictures.
    """

    def __init__(
        self,
        changed: threading.Condition,
        ready: Callable[[], Sequence[WorkerProcess]],
        max_waiting: int,
    ) -> None:
        self._changed = changed
        self._ready = ready
        self._tasks: dict[str, _Assignment] = {}
        self._faces: FairQueue[_Analysis] = FairQueue(max_waiting, "pictures wait for their face")
        self._analyses: dict[int, _Analysis] = {}
        self._keys = itertools.count()
        self._strikes: list[tuple[float, str]] = []

    def __len__(self) -> int:
        """How many tasks have not ended."""
        return len(self._tasks)

    @property
    def held(self) -> int:
        """With the lock: how many tasks wait for a worker."""
        return sum(one.process is None for one in self._tasks.values())

    def tasks_of(self, process: WorkerProcess) -> Counter[str]:
        """With the lock: how many tasks of each owner a worker has."""
        return Counter(one.task.owner for one in self._tasks.values() if one.process is process)

    def least_busy(self) -> WorkerProcess | None:
        """With the lock: who gets the next task; None where nobody is ready."""
        return min(
            self._ready(),
            key=lambda one: (self.tasks_of(one).total(), one.load.backlog_seconds),
            default=None,
        )

    def submit(self, task: Task, on_event: OnEvent, process: WorkerProcess) -> None:
        """With the lock: give a task to a worker.

        Raises `Busy` where its owner's killed too many, and ValueError for an id that is there.
        """
        if task.id in self._tasks:
            raise ValueError(f"a task {task.id} is there already")
        self._require_few_strikes(task.owner)
        self._tasks[task.id] = _Assignment(task, on_event, process)
        process.send(Submit(task))

    def cancel(self, task_id: str) -> None:
        """End a task, by its worker if it has one."""
        with self._changed:
            assigned = self._tasks.get(task_id)
            if assigned is None:
                return
            assigned.cancelled = True
            if assigned.process is not None:
                assigned.process.send(Cancel(task_id))
                return
        self.finish(TaskFailed(task_id, Cancelled("The task was cancelled.")))

    def analyze(self, pixels: Pixels, index: int | None, owner: str) -> "Future[Face]":
        """With the lock: a picture for the next worker that looks at none. Raises `Busy`."""
        self._require_few_strikes(owner)
        future: Future[Face] = Future()
        future.set_running_or_notify_cancel()
        analysis = _Analysis(Analyze(next(self._keys), pixels, index), future, owner)
        places = pixels.shape[0] * pixels.shape[1] // PIXELS_OF_A_PLACE
        self._faces.put(owner, analysis, max(1, places))
        self._hand_out_faces()
        return future

    def stepped(self, event: StepDone) -> None:
        """Pass a step on to the task's client."""
        with self._changed:
            assigned = self._tasks.get(event.id)
        if assigned is not None:
            assigned.on_event(event)

    def finish(self, event: Event) -> None:
        """Pass a task's last event on to its client, unless it has ended already."""
        with self._changed:
            assigned = self._tasks.pop(event.id, None)
            self._changed.notify_all()
        if assigned is not None:
            assigned.on_event(event)

    def found(self, message: Analyzed) -> None:
        """Pass a face, or why there is none, on to whoever waits for it."""
        with self._changed:
            analysis = self._analyses.pop(message.key, None)
            self._hand_out_faces()
        if analysis is None:
            return
        if isinstance(message.result, Face):
            analysis.future.set_result(message.result)
        else:
            analysis.future.set_exception(message.result)

    def lost_by(self, process: WorkerProcess, ids: Sequence[str], *, by_itself: bool) -> int:
        """With the lock: what a dead worker had waits for another; how many tasks it had.

        `ids` are the tasks on which its engines worked. `by_itself` is whether it crashed or stood
        still.
        """
        lost = [one for one in self._tasks.values() if one.process is process]
        for assigned in lost:
            assigned.process = None
            if assigned.task.id in ids:
                assigned.guilty = assigned.suspect or (by_itself and len(ids) == 1)
                assigned.suspect = True
                if assigned.guilty:
                    self._strikes.append((monotonic(), assigned.task.owner))
        for analysis in self._analyses.values():
            if analysis.process is process:
                analysis.process = None
                alone = by_itself and not ids
                analysis.failed = alone or analysis.attempts >= FACE_ATTEMPTS
                if analysis.failed:
                    self._strikes.append((monotonic(), analysis.owner))
        return len(lost)

    def _require_few_strikes(self, owner: str) -> None:
        """With the lock: raise `Busy` where too many of an owner's requests killed workers."""
        now = monotonic()
        self._strikes = [one for one in self._strikes if now - one[0] < STRIKE_SECONDS]
        times = [when for when, whose in self._strikes if whose == owner]
        if owner and len(times) >= MAX_STRIKES:
            left = times[-MAX_STRIKES] + STRIKE_SECONDS - now
            raise Busy(
                f"{len(times)} of your requests ended a worker in the last ten minutes.",
                "Try again later, with others.",
                retry_after=left,
            )

    def looks_at_face(self, process: WorkerProcess) -> bool:
        """With the lock: whether a worker looks for a face."""
        return any(one.process is process for one in self._analyses.values())

    def hand_out(self, now: float) -> list[Callable[[], None]]:
        """With the lock: give what waits to workers.

        Returns what to call without the lock, to end those that must not go on.
        """
        endings: list[Callable[[], None]] = []
        for assigned in [one for one in self._tasks.values() if one.process is None]:
            error = assigned.ending(now)
            if error is not None:
                endings.append(partial(self.finish, TaskFailed(assigned.task.id, error)))
            elif (process := self.least_busy()) is not None:
                assigned.process = process
                assigned.attempts += 1
                process.send(Submit(assigned.task, assigned.suspect))
        refusal = Unavailable("Workers died while they had this face.", "Try another.")
        for key in [key for key, one in self._analyses.items() if one.failed]:
            endings.append(partial(self.found, Analyzed(key, refusal)))
        self._hand_out_faces()
        return endings

    def _hand_out_faces(self) -> None:
        """With the lock: one picture to each worker that looks at none."""
        left = [one for one in self._analyses.values() if one.process is None and not one.failed]
        for process in sorted(self._ready(), key=lambda one: self.tasks_of(one).total()):
            if self.looks_at_face(process):
                continue
            if left:
                analysis = left.pop()
                analysis.attempts += 1
            elif self._faces:
                analysis = self._faces.pop()
                self._analyses[analysis.message.key] = analysis
            else:
                return
            analysis.process = process
            process.send(analysis.message)

    def end_all(self, error: FastFaceError) -> None:
        """End everything that is left with `error`."""
        with self._changed:
            tasks, analyses = list(self._tasks), list(self._analyses.values())
            self._analyses.clear()
            while self._faces:
                analyses.append(self._faces.pop())
        for task_id in tasks:
            self.finish(TaskFailed(task_id, error))
        for analysis in analyses:
            analysis.future.set_exception(error)
