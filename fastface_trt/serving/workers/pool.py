"""Workers in child processes behind one queue: what dies is started again, what it had goes on.

Pictures follow from their request alone, so a task whose worker died is simply made again by
another worker: its client sees steps counted from 1 once more, and the same picture.
"""

import logging
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from time import monotonic

from fastface_trt.engines.engine import Closing
from fastface_trt.errors import Busy, FastFaceError, Unavailable
from fastface_trt.measure.memory import resident_bytes
from fastface_trt.runtime.face import Face
from fastface_trt.serving.batching.fairness import places_of
from fastface_trt.serving.settings import WorkerSettings
from fastface_trt.serving.work import (
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
    Analyzed,
    Forget,
    FromWorker,
    OpenFailed,
    Report,
)
from fastface_trt.serving.workers.process import (
    WORKER_PROGRAM,
    Ledger,
    Slot,
    WorkerProcess,
    crashed,
)

_SECONDS_BETWEEN_CHECKS = 0.1
_SECONDS_TO_LEAVE = 10.0

log = logging.getLogger(__name__)


class WorkerPool(Closing):
    """A `Worker` made of `count` processes with one batcher each: `start` it, or use it in `with`.

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
        self._changed = threading.Condition()
        self._ledger = Ledger(self._changed, self._ready, settings.max_waiting)
        self._draining = False
        self._closed = False
        self._monitor = threading.Thread(target=self._watch, name="workers", daemon=True)
        self.failure: FastFaceError | None = None

    def start(self) -> None:
        """Start every process; the pool is READY as soon as one of them is."""
        with self._changed:
            for slot in self._slots:
                self._start(slot)
        self._monitor.start()

    def __enter__(self) -> "WorkerPool":
        if self._monitor.ident is None:
            self.start()
        return self

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
            held = self._ledger.held
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
        as a `TaskFailed`.
        """
        with self._changed:
            process = self._require_ready()
            held = self._ledger.tasks_of(process)
            most = places_of(task.owner, held, self._settings.max_waiting)
            if held[task.owner] >= most + self._settings.max_running:
                raise Busy(
                    f"{held[task.owner]} of your pictures are in work already.",
                    "Try again later.",
                    retry_after=max(1.0, process.load.backlog_seconds),
                )
            self._ledger.submit(task, on_event, process)

    def cancel(self, task_id: str) -> None:
        self._ledger.cancel(task_id)

    def analyze(self, pixels: Pixels, index: int | None = None, owner: str = "") -> "Future[Face]":
        with self._changed:
            try:
                self._require_ready()
                return self._ledger.analyze(pixels, index, owner)
            except (Busy, Unavailable) as error:
                future: Future[Face] = Future()
                future.set_exception(error)
                return future

    def forget(self) -> None:
        with self._changed:
            for slot in self._slots:
                if slot.process is not None:
                    slot.process.send(Forget())

    def drain(self, seconds: float) -> bool:
        with self._changed:
            self._draining = True
            return self._changed.wait_for(lambda: len(self._ledger) == 0, seconds)

    def close(self) -> None:
        """Workers that do not leave in ten seconds are killed."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            processes = [slot.process for slot in self._slots if slot.process is not None]
            self._changed.notify_all()
        self._ledger.end_all(_closed())
        for process in processes:
            process.leave()
        until = monotonic() + _SECONDS_TO_LEAVE
        for process in processes:
            if not process.join(max(0.0, until - monotonic())):
                process.kill()
                process.join(_SECONDS_TO_LEAVE)
        if self._monitor.is_alive():
            self._monitor.join(timeout=_SECONDS_TO_LEAVE)

    def _require_ready(self) -> WorkerProcess:
        """With the lock: the least busy worker; raises `Unavailable` where none takes tasks."""
        process = self._ledger.least_busy()
        if self.state is not State.READY or process is None:
            raise Unavailable(f"The server is {self.state.value}.", "Try again in a few seconds.")
        return process

    def _ready(self) -> list[WorkerProcess]:
        return [slot.process for slot in self._slots if slot.process and slot.ready]

    def _start(self, slot: Slot) -> None:
        try:
            process = WorkerProcess(
                self._settings,
                slot.environment,
                slot.name,
                self._on_message,
                self._on_death,
                program=self._program,
            )
        except OSError as error:  # no memory or no process left for now
            log.error("%s could not be started: %s", slot.name, error)
            slot.died(monotonic())
            return
        slot.process = process
        process.start_reading()

    def _on_message(self, process: WorkerProcess, message: FromWorker) -> None:
        """A message of a worker, on its reader's thread."""
        match message:
            case Report():
                with self._changed:
                    self._slot_of(process).reported(monotonic())
                    self._changed.notify_all()
            case OpenFailed(error):
                with self._changed:
                    self._slot_of(process).give_up()
                    self._decide_whether_dead(error)
            case Analyzed():
                self._ledger.found(message)
            case StepDone():
                self._ledger.stepped(message)
            case PictureDone():
                self._slot_of(process).proved()
                self._ledger.finish(message)
            case TaskFailed():
                self._ledger.finish(message)

    def _on_death(self, process: WorkerProcess, status: int) -> None:
        """A worker has gone: its tasks wait for another, and its slot for a new process."""
        call = process.record.read()
        ids = () if call is None else call.ids
        with self._changed:
            slot = self._slot_of(process)
            slot.died(monotonic(), blamed=bool(ids) or self._ledger.looks_at_face(process))
            lost = self._ledger.lost_by(process, ids, by_itself=crashed(process, status))
            if not self._closed:
                log.error(
                    "%s ended with status %d and left %d tasks; it was working on %s.",
                    *(slot.name, status, lost, ", ".join(ids) or "none"),
                )
                self._decide_whether_dead(
                    Unavailable(
                        "Every worker died again and again.", "See the server's log for the reason."
                    )
                )
            self._changed.notify_all()

    def _decide_whether_dead(self, reason: FastFaceError) -> None:
        if self.failure is None and all(slot.given_up for slot in self._slots):
            self.failure = reason
            self._changed.notify_all()

    def _slot_of(self, process: WorkerProcess) -> Slot:
        return next(slot for slot in self._slots if slot.name == process.name)

    def _watch(self) -> None:
        """Start what is due, hand out what waits, end what is late; on a thread of its own."""
        while True:
            with self._changed:
                self._changed.wait(_SECONDS_BETWEEN_CHECKS)
                if self._closed:
                    return
                now = monotonic()
                for slot in self._slots:
                    if slot.due(now):
                        self._start(slot)
                    elif slot.stalled(now, self._settings.stall_seconds):
                        log.error("%s makes no progress and is killed.", slot.name)
                        assert slot.process is not None
                        slot.process.stalled = True
                        slot.process.kill()
                endings = self._ledger.hand_out(now)
                failure = self.failure
            for end in endings:
                end()
            if failure is not None:
                self._ledger.end_all(failure)


def _closed() -> Unavailable:
    return Unavailable("The server is closed.", "Start it again.")
