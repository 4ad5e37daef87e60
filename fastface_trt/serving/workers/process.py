"""Parts of a pool: worker processes, the slots that they fill, and the ledger of their tasks.

`WorkerProcess` starts a child, talks to it and notices its death. A `Slot` is a worker's place: the
process in it, and when the next may start. The `Ledger` has what workers were given and what has
not ended yet: every task ends exactly once there.
"""

import itertools
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from fastface_trt.engines.children import start_child
from fastface_trt.errors import (
    BackendUnavailable,
    Cancelled,
    DeadlinePassed,
    FastFaceError,
    Unavailable,
)
from fastface_trt.runtime.face import Face
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
    Analyze,
    Analyzed,
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
"""Deaths in a row, with no picture between them, after which a slot stays empty."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 10.0
MAX_ATTEMPTS = 2
"""A task that was there when two workers died is given up: it may be what kills them."""


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
            self._child = start_child(
                [*program, str(theirs.fileno())],
                environment,
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
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


class Slot:
    """One place; all methods are called with the pool's lock held, times are monotonic seconds."""

    def __init__(self, name: str, environment: Mapping[str, str]) -> None:
        self.name = name
        self.environment = environment
        self.process: WorkerProcess | None = None
        self._deaths = 0
        self._start_at: float | None = None
        self._progress: tuple[Load, float] | None = None

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

    def died(self, now: float) -> None:
        """Its process has gone; the next starts after a pause that doubles with every death."""
        self.process = None
        self._progress = None
        self._deaths += 1
        pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** (self._deaths - 1))
        self._start_at = None if self.given_up else now + pause

    def due(self, now: float) -> bool:
        """Whether a new process should be started now."""
        if self._start_at is None or now < self._start_at:
            return False
        self._start_at = None
        return True

    def reported(self, process: WorkerProcess, now: float) -> None:
        """Its process said how it is."""
        before = self._progress
        load = process.load
        if before is None or load.running == 0 or _work(before[0]) != _work(load):
            self._progress = load, now

    def stalled(self, now: float, seconds: float) -> bool:
        """Whether its process has work and got nothing done for so long."""
        if self._progress is None or now - self._progress[1] < seconds:
            return False
        # Also when it reports no more, as a process that is stopped.
        self._progress = None
        return True


def _work(load: Load) -> tuple[int, int, int]:
    return load.calls, load.running, load.waiting


@dataclass(slots=True)
class _Assignment:
    """A task and who works on it (None: it waits for a worker); `attempts` workers had it."""

    task: Task
    on_event: OnEvent
    process: WorkerProcess | None
    attempts: int = 1
    cancelled: bool = False

    def ending(self, now: float) -> FastFaceError | None:
        """Why it must not go on to another worker, None where it may."""
        if self.cancelled:
            return Cancelled("The task was cancelled.")
        if self.task.deadline is not None and now > self.task.deadline:
            return DeadlinePassed(
                "The picture was not done by its deadline.", "Allow more time, or try later."
            )
        if self.attempts >= MAX_ATTEMPTS:
            return Unavailable("Two workers died while they had this picture.", "Try again later.")
        return None


@dataclass(slots=True)
class _Analysis:
    """A face that is looked for."""

    message: Analyze
    future: "Future[Face]"
    process: WorkerProcess | None
    attempts: int = 1


class Ledger:
    """Tasks and analyses of all workers. `changed` is the pool's lock, and clients' callbacks
    are called without it.

    Methods that say "with the lock" expect that the caller holds it.
    """

    def __init__(self, changed: threading.Condition) -> None:
        self._changed = changed
        self._tasks: dict[str, _Assignment] = {}
        self._analyses: dict[int, _Analysis] = {}
        self._keys = itertools.count()

    def __len__(self) -> int:
        """How many tasks have not ended."""
        return len(self._tasks)

    @property
    def held(self) -> int:
        """With the lock: how many tasks wait for a worker."""
        return sum(one.process is None for one in self._tasks.values())

    def tasks_of(self, process: WorkerProcess) -> int:
        """With the lock: how many tasks a worker has."""
        return sum(one.process is process for one in self._tasks.values())

    def submit(self, task: Task, on_event: OnEvent, process: WorkerProcess) -> None:
        """With the lock: give a task to a worker; raises ValueError for an id that is there."""
        if task.id in self._tasks:
            raise ValueError(f"a task {task.id} is there already")
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

    def analyze(self, pixels: Pixels, index: int | None, process: WorkerProcess) -> "Future[Face]":
        """With the lock: give a picture to a worker."""
        future: Future[Face] = Future()
        future.set_running_or_notify_cancel()
        message = Analyze(next(self._keys), pixels, index)
        self._analyses[message.key] = _Analysis(message, future, process)
        process.send(message)
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
        if analysis is None:
            return
        if isinstance(message.result, Face):
            analysis.future.set_result(message.result)
        else:
            analysis.future.set_exception(message.result)

    def lost_by(self, process: WorkerProcess) -> int:
        """With the lock: what a dead worker had waits for another; how many tasks it had."""
        lost = [one for one in self._tasks.values() if one.process is process]
        for assigned in lost:
            assigned.process = None
        for analysis in self._analyses.values():
            if analysis.process is process:
                analysis.process = None
        return len(lost)

    def hand_out(
        self, now: float, choose: Callable[[], WorkerProcess | None]
    ) -> list[Callable[[], None]]:
        """With the lock: give what waits to workers; `choose` gives None where none is ready.

        Returns what to call without the lock, to end those that must not go on.
        """
        endings: list[Callable[[], None]] = []
        for assigned in [one for one in self._tasks.values() if one.process is None]:
            error = assigned.ending(now)
            if error is not None:
                endings.append(partial(self.finish, TaskFailed(assigned.task.id, error)))
            elif (process := choose()) is not None:
                assigned.process = process
                assigned.attempts += 1
                process.send(Submit(assigned.task))
        for analysis in [one for one in self._analyses.values() if one.process is None]:
            if analysis.attempts >= MAX_ATTEMPTS:
                refusal = Unavailable("Two workers died while they had this face.", "Try another.")
                endings.append(partial(self.found, Analyzed(analysis.message.key, refusal)))
            elif (process := choose()) is not None:
                analysis.process = process
                analysis.attempts += 1
                process.send(analysis.message)
        return endings

    def end_all(self, error: FastFaceError) -> None:
        """End everything that is left with `error`."""
        with self._changed:
            tasks, analyses = list(self._tasks), list(self._analyses)
        for task_id in tasks:
            self.finish(TaskFailed(task_id, error))
        for key in analyses:
            self.found(Analyzed(key, error))
