"""What workers have been given and what has not ended yet: every task ends exactly once here."""

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

from fastface_trt.errors import Cancelled, DeadlinePassed, FastFaceError, Unavailable
from fastface_trt.runtime.face import Face
from fastface_trt.serving.work import Event, OnEvent, Pixels, StepDone, Task, TaskFailed
from fastface_trt.serving.workers.messages import Analyze, Analyzed, Cancel, Submit
from fastface_trt.serving.workers.process import WorkerProcess

MAX_ATTEMPTS = 2
"""A task that was there when two workers died is given up: it may be what kills them."""


@dataclass(slots=True)
class _Entry:
    """A task: who works on it (None: it waits for a worker), and how many had it."""

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
    """Tasks and analyses of all workers. `changed` is the pool's lock; clients are told without it.

    Methods that say "with the lock" expect that the caller holds it.
    """

    def __init__(self, changed: threading.Condition) -> None:
        self._changed = changed
        self._entries: dict[str, _Entry] = {}
        self._analyses: dict[int, _Analysis] = {}
        self._keys = itertools.count()

    def __len__(self) -> int:
        """How many tasks have not ended."""
        return len(self._entries)

    @property
    def held(self) -> int:
        """With the lock: how many tasks wait for a worker."""
        return sum(entry.process is None for entry in self._entries.values())

    def tasks_of(self, process: WorkerProcess) -> int:
        """With the lock: how many tasks a worker has."""
        return sum(entry.process is process for entry in self._entries.values())

    def submit(self, task: Task, on_event: OnEvent, process: WorkerProcess) -> None:
        """With the lock: give a task to a worker; raises ValueError for an id that is there."""
        if task.id in self._entries:
            raise ValueError(f"a task {task.id} is there already")
        self._entries[task.id] = _Entry(task, on_event, process)
        process.send(Submit(task))

    def cancel(self, task_id: str) -> None:
        """End a task, by its worker if it has one."""
        with self._changed:
            entry = self._entries.get(task_id)
            if entry is None:
                return
            entry.cancelled = True
            if entry.process is not None:
                entry.process.send(Cancel(task_id))
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
        """Tell a step to the task's client."""
        with self._changed:
            entry = self._entries.get(event.id)
        if entry is not None:
            entry.on_event(event)

    def finish(self, event: Event) -> None:
        """Tell a task's last event to its client, unless it has ended already."""
        with self._changed:
            entry = self._entries.pop(event.id, None)
            self._changed.notify_all()
        if entry is not None:
            entry.on_event(event)

    def found(self, message: Analyzed) -> None:
        """Tell a face, or why there is none, to whoever waits for it."""
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
        lost = [entry for entry in self._entries.values() if entry.process is process]
        for entry in lost:
            entry.process = None
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
        for entry in [one for one in self._entries.values() if one.process is None]:
            error = entry.ending(now)
            if error is not None:
                endings.append(partial(self.finish, TaskFailed(entry.task.id, error)))
            elif (process := choose()) is not None:
                entry.process = process
                entry.attempts += 1
                process.send(Submit(entry.task))
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
            tasks, analyses = list(self._entries), list(self._analyses)
        for task_id in tasks:
            self.finish(TaskFailed(task_id, error))
        for key in analyses:
            self.found(Analyzed(key, error))
