"""Workers in child processes behind one queue: what dies is started again, what it had goes on.

Pictures follow from their request alone, so a task whose worker died is simply made again by
another worker: its client sees steps counted from 1 once more, and the same picture.
"""

import itertools
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from time import monotonic

from fastface_trt.engines.closing import Closing
from fastface_trt.errors import Busy, Cancelled, DeadlinePassed, FastFaceError, Unavailable
from fastface_trt.runtime.face import Face
from fastface_trt.serving.batching.memory import resident_bytes
from fastface_trt.serving.settings import WorkerSettings
from fastface_trt.serving.work import (
    Event,
    Load,
    OnEvent,
    PictureDone,
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
    FromWorker,
    OpenFailed,
    Report,
    Submit,
)
from fastface_trt.serving.workers.process import WORKER_PROGRAM, WorkerProcess
from fastface_trt.serving.workers.slot import Slot

_SECONDS_BETWEEN_LOOKS = 0.1
_SECONDS_TO_LEAVE = 10.0
_MAX_ATTEMPTS = 2
"""A task that was there when two workers died is given up: it may be what kills them."""

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Entry:
    """A task that has not ended: who works on it (None: waits for a worker), and how often so."""

    task: Task
    on_event: OnEvent
    process: WorkerProcess | None
    attempts: int = 1
    cancelled: bool = False


@dataclass(slots=True)
class _Analysis:
    """A face that is looked for."""

    message: Analyze
    future: "Future[Face]"
    process: WorkerProcess | None
    attempts: int = 1


class WorkerPool(Closing):
    """A `Worker` made of `count` processes with one batcher each.

    `environments` holds additions to each process's environment, such as the GPU that it may see.
    `program` is what a process runs, as arguments of Python. `failure` says why the pool is DEAD.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        count: int = 1,
        *,
        environments: Sequence[Mapping[str, str]] | None = None,
        program: Sequence[str] = WORKER_PROGRAM,
    ) -> None:
        self._settings = settings
        self._program = program
        self._slots = [
            Slot(f"worker {index}", environment)
            for index, environment in enumerate(environments or [{}] * count)
        ]
        self._entries: dict[str, _Entry] = {}
        self._analyses: dict[int, _Analysis] = {}
        self._keys = itertools.count()
        self._draining = False
        self._closed = False
        self._changed = threading.Condition()
        self._monitor = threading.Thread(target=self._watch, name="workers", daemon=True)
        self.failure: FastFaceError | None = None

    def start(self) -> None:
        """Start every process; the pool is READY as soon as one of them is."""
        with self._changed:
            for slot in self._slots:
                self._start(slot)
        self._monitor.start()

    def wait_until_ready(self, seconds: float | None = None) -> bool:
        """Wait until all workers opened their engines; False when that took longer.

        Raises the error of a worker that cannot open them, and `Unavailable` once closed.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self.failure or self._closed or all(s.ready for s in self._slots), seconds
            )
            if self.failure:
                raise self.failure
            if self._closed:
                raise _closed()
            return all(slot.ready for slot in self._slots)

    @property
    def state(self) -> State:
        """READY while one worker is; DEAD when every one of them was given up."""
        if self._closed or self.failure is not None:
            return State.DEAD
        if self._draining:
            return State.DRAINING
        return State.READY if any(slot.ready for slot in self._slots) else State.STARTING

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that live."""
        with self._changed:
            return [slot.process.pid for slot in self._slots if slot.process is not None]

    def load(self) -> Load:
        """The sum over the workers; `backlog_seconds` is that of the least busy one."""
        with self._changed:
            loads = [slot.process.load for slot in self._slots if slot.process and slot.ready]
            held = sum(entry.process is None for entry in self._entries.values())
        return Load(
            waiting=held + sum(load.waiting for load in loads),
            running=sum(load.running for load in loads),
            backlog_seconds=min((load.backlog_seconds for load in loads), default=0.0),
            calls=sum(load.calls for load in loads),
            rows=sum(load.rows for load in loads),
            memory_bytes=resident_bytes() + sum(load.memory_bytes for load in loads),
        )

    def submit(self, task: Task, on_event: OnEvent) -> None:
        """Give a task to the least busy worker; see `Worker.submit`.

        What a worker refuses by itself, such as a task that would miss the latency budget, arrives
        as a `TaskFailed` with `Busy`.
        """
        with self._changed:
            self._require_ready()
            if task.id in self._entries:
                raise ValueError(f"a task {task.id} is there already")
            most = self._settings.max_waiting + self._settings.max_running
            process, outstanding = self._least_busy()
            if outstanding >= most:
                raise Busy(
                    "The server has as much to do as it may take on.",
                    "Try again later.",
                    retry_after=max(1.0, process.load.backlog_seconds),
                )
            self._entries[task.id] = _Entry(task, on_event, process)
            process.send(Submit(task))

    def cancel(self, task_id: str) -> None:
        """See `Worker.cancel`."""
        with self._changed:
            entry = self._entries.get(task_id)
            if entry is None:
                return
            entry.cancelled = True
            if entry.process is not None:
                entry.process.send(Cancel(task_id))
                return
        self._finish(task_id, TaskFailed(task_id, Cancelled("The task was cancelled.")))

    def analyze(self, pixels: Pixels, index: int | None = None) -> "Future[Face]":
        """See `Worker.analyze`."""
        future: Future[Face] = Future()
        future.set_running_or_notify_cancel()
        with self._changed:
            try:
                self._require_ready()
            except Unavailable as error:
                future.set_exception(error)
                return future
            message = Analyze(next(self._keys), pixels, index)
            process, _ = self._least_busy()
            self._analyses[message.key] = _Analysis(message, future, process)
            process.send(message)
        return future

    def drain(self, seconds: float) -> bool:
        """See `Worker.drain`."""
        with self._changed:
            self._draining = True
            return self._changed.wait_for(lambda: not self._entries, seconds)

    def close(self) -> None:
        """See `Worker.close`; workers that do not leave in ten seconds are killed."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            processes = [slot.process for slot in self._slots if slot.process is not None]
            self._changed.notify_all()
        self._give_up(_closed())
        for process in processes:
            process.leave()
        until = monotonic() + _SECONDS_TO_LEAVE
        for process in processes:
            if not process.join(max(0.0, until - monotonic())):
                process.kill()
                process.join(_SECONDS_TO_LEAVE)
        if self._monitor.is_alive():
            self._monitor.join(timeout=_SECONDS_TO_LEAVE)

    def _require_ready(self) -> None:
        state = self.state
        if state is not State.READY:
            raise Unavailable(f"The server is {state.value}.", "Try again in a few seconds.")

    def _least_busy(self) -> tuple[WorkerProcess, int]:
        """A worker that is ready, and how many tasks it has; the lock is held and one is READY."""
        counts = {slot.process: 0 for slot in self._slots if slot.process and slot.ready}
        for entry in self._entries.values():
            if entry.process in counts:
                counts[entry.process] += 1
        process = min(counts, key=lambda one: (counts[one], one.load.backlog_seconds))
        return process, counts[process]

    def _start(self, slot: Slot) -> None:
        try:
            process = WorkerProcess(
                self._settings,
                slot.environment,
                slot.name,
                self._told,
                self._died,
                program=self._program,
            )
        except OSError as error:  # no memory or no process left for now
            log.error("%s could not be started: %s", slot.name, error)
            slot.died(monotonic())
            return
        slot.process = process
        process.start_reading()

    def _told(self, process: WorkerProcess, message: FromWorker) -> None:
        """A message of a worker, on its reader's thread."""
        match message:
            case Report():
                with self._changed:
                    self._slot_of(process).reported(process, monotonic())
                    self._changed.notify_all()
            case OpenFailed(error):
                with self._changed:
                    self._slot_of(process).give_up()
                    self._decide_whether_dead(error)
            case Analyzed(key, result):
                with self._changed:
                    analysis = self._analyses.pop(key, None)
                if analysis is None:
                    return
                if isinstance(result, Face):
                    analysis.future.set_result(result)
                else:
                    analysis.future.set_exception(result)
            case StepDone(id=task_id):
                with self._changed:
                    entry = self._entries.get(task_id)
                if entry is not None:
                    entry.on_event(message)
            case PictureDone(id=task_id) | TaskFailed(id=task_id):
                if isinstance(message, PictureDone):
                    self._slot_of(process).proved()
                self._finish(task_id, message)

    def _finish(self, task_id: str, event: Event) -> None:
        with self._changed:
            entry = self._entries.pop(task_id, None)
            self._changed.notify_all()
        if entry is not None:
            entry.on_event(event)

    def _died(self, process: WorkerProcess, status: int) -> None:
        """A worker has gone: its tasks wait for another, and its slot for a new process."""
        with self._changed:
            slot = self._slot_of(process)
            slot.died(monotonic())
            lost = [entry for entry in self._entries.values() if entry.process is process]
            for entry in lost:
                entry.process = None
            for analysis in self._analyses.values():
                if analysis.process is process:
                    analysis.process = None
            if not self._closed:
                log.error(
                    "%s ended with status %d and left %d tasks behind.",
                    slot.name,
                    status,
                    len(lost),
                )
                self._decide_whether_dead(
                    Unavailable(
                        "Every worker died again and again.", "See the server's log for the reason."
                    )
                )
            self._changed.notify_all()

    def _decide_whether_dead(self, reason: FastFaceError) -> None:
        if all(slot.given_up for slot in self._slots):
            self.failure = reason
            self._changed.notify_all()

    def _slot_of(self, process: WorkerProcess) -> Slot:
        return next(slot for slot in self._slots if slot.name == process.name)

    def _watch(self) -> None:
        """Start what is due, hand out what waits, end what is late; on a thread of its own."""
        while True:
            with self._changed:
                self._changed.wait(_SECONDS_BETWEEN_LOOKS)
                if self._closed:
                    return
                now = monotonic()
                for slot in self._slots:
                    if slot.due(now):
                        self._start(slot)
                    elif slot.stalled(now, self._settings.stall_seconds):
                        log.error("%s makes no progress and is killed.", slot.name)
                        assert slot.process is not None
                        slot.process.kill()
                endings = self._hand_out(now)
                failure = self.failure
            for end in endings:
                end()
            if failure is not None:
                self._give_up(failure)

    def _hand_out(self, now: float) -> list[Callable[[], None]]:
        """Give what a dead worker left behind to one that is ready; the lock is held.

        Returns what to call without the lock, to end those that must not go on.
        """
        endings: list[Callable[[], None]] = []
        ready = any(slot.ready for slot in self._slots)
        for entry in [one for one in self._entries.values() if one.process is None]:
            error = _why_it_ends(entry, now)
            if error is not None:
                failed = TaskFailed(entry.task.id, error)
                endings.append(partial(self._finish, entry.task.id, failed))
            elif ready:
                entry.process, _ = self._least_busy()
                entry.attempts += 1
                entry.process.send(Submit(entry.task))
        for analysis in [one for one in self._analyses.values() if one.process is None]:
            if analysis.attempts >= _MAX_ATTEMPTS:
                del self._analyses[analysis.message.key]
                refusal = Unavailable("Two workers died while they had this face.", "Try another.")
                endings.append(partial(analysis.future.set_exception, refusal))
            elif ready:
                analysis.process, _ = self._least_busy()
                analysis.attempts += 1
                analysis.process.send(analysis.message)
        return endings

    def _give_up(self, error: FastFaceError) -> None:
        """End everything that is left with `error`."""
        with self._changed:
            tasks = list(self._entries)
            analyses = list(self._analyses.values())
            self._analyses.clear()
        for task_id in tasks:
            self._finish(task_id, TaskFailed(task_id, error))
        for analysis in analyses:
            analysis.future.set_exception(error)


def _why_it_ends(entry: _Entry, now: float) -> FastFaceError | None:
    """Why a task without a worker must not go on, None where it may."""
    if entry.cancelled:
        return Cancelled("The task was cancelled.")
    if entry.task.deadline is not None and now > entry.task.deadline:
        return DeadlinePassed(
            "The picture was not done by its deadline.", "Allow more time, or try later."
        )
    if entry.attempts >= _MAX_ATTEMPTS:
        return Unavailable("Two workers died while they had this picture.", "Try again later.")
    return None


def _closed() -> Unavailable:
    return Unavailable("The server is closed.", "Start it again.")
