"""A worker inside one process: strangers' pictures in the same UNet calls, continuously."""

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from fastface_trt.engines.engine import Closing
from fastface_trt.engines.manifest import ExportManifest
from fastface_trt.errors import Busy, EngineFailed, FastFaceError, Unavailable
from fastface_trt.measure.memory import resident_bytes
from fastface_trt.runtime.face import Face
from fastface_trt.runtime.pipeline import FastFace
from fastface_trt.serving.batching.cost import CostModel
from fastface_trt.serving.batching.entry import Demand, Entry, LatencyBudget, remaining
from fastface_trt.serving.batching.loop import Clock, EngineLoop, Preview, TaskTable
from fastface_trt.serving.settings import WorkerSettings
from fastface_trt.serving.work import Load, OnEvent, Pixels, State, Task

_log = logging.getLogger(__name__)

SOONEST_RETRY = 0.1
"""Seconds that a refused client should wait at least."""


class Batcher(Closing):
    """A `Worker` over one `FastFace`: `start` it, or use it in a `with` block.

    With `owns_fastface` closing it closes `fastface` too. `preview` makes the pictures of
    `StepDone` for tasks that ask for them. `clock` gives the seconds that deadlines are in.
    """

    def __init__(
        self,
        fastface: FastFace,
        settings: WorkerSettings,
        *,
        preview: Preview | None = None,
        owns_fastface: bool = False,
        clock: Clock = time.monotonic,
    ) -> None:
        self._fastface = fastface
        self._settings = settings
        self._owns_fastface = owns_fastface
        self._clock = clock
        self._orders = itertools.count()
        self._cost = CostModel()
        self._table = TaskTable()
        self._analysis = FaceAnalysis(fastface, settings.max_waiting)
        self._budget = LatencyBudget(settings.latency_budget, self._cost, clock)
        self._loop = EngineLoop(
            fastface, settings, self._table, self._cost, self._budget, preview, clock
        )
        self._thread = threading.Thread(target=self._loop.run, name="engines", daemon=True)

    def start(self) -> None:
        """Open the engines, warm them up, and take tasks: READY when this returns.

        Raises what opening engines raises, and `EngineFailed` where they fail or their pictures are
        not finite; it is closed then.
        """
        self._thread.start()
        self._analysis.start()
        try:
            self._table.wait_until_started()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Batcher":
        if self._thread.ident is None:
            self.start()
        return self

    @property
    def manifest(self) -> ExportManifest:
        """The manifest of the export that it serves."""
        return self._fastface.manifest

    @property
    def state(self) -> State:
        """How it is; DRAINING from `drain` or `close` on."""
        return self._table.state

    def load(self) -> Load:
        """How busy it is now."""
        entries = self._table.entries()
        waiting = sum(entry.sample is None for entry in entries)
        tally = self._loop.tally
        return Load(
            waiting,
            len(entries) - waiting,
            self._backlog_seconds(entries),
            tally.calls,
            tally.rows,
            resident_bytes(),
        )

    def submit(self, task: Task, on_event: OnEvent) -> None:
        """Queue a task; a request that this export cannot do ends with `TaskFailed`.

        Raises `Busy` where it would wait behind too many or too long, `Unavailable` unless READY,
        and ValueError for an id that is in work.
        """
        entry = Entry(next(self._orders), task, on_event, task.request, self._clock())
        manifest = self._fastface.manifest
        try:
            entry.request = task.request.for_adapter(manifest.adapter_kind)
            self._fastface.stages.check_size(entry.request)
            positions = self._fastface.stages.text_positions(entry.request)
            entry.demand = Demand.of(entry.request, manifest, positions)
        except FastFaceError as error:
            entry.refused = error
        self._table.add(entry, lambda others: self._admit(entry, others))

    def cancel(self, task_id: str) -> None:
        """End a task with `Cancelled` before its next step; unknown and ended ones are ignored."""
        self._table.cancel(task_id)

    def analyze(self, pixels: Pixels, index: int | None = None) -> "Future[Face]":
        """Find a face on a thread beside the engines.

        The future also raises `Busy`, where as many pictures wait as `max_waiting` says.
        """
        return self._analysis.submit(pixels, index)

    def forget(self) -> None:
        """Drop every face and encoding that is kept for the next picture."""
        self._fastface.forget()

    def drain(self, seconds: float) -> bool:
        """Take no more tasks and wait for those it has; whether all ended in that time."""
        return self._table.drain(seconds)

    def close(self) -> None:
        """End what it still has with `Unavailable` after the call at hand, and free everything."""
        self._table.close()
        self._analysis.close()
        if self._thread.ident is not None:
            self._thread.join()
        if self._owns_fastface:
            self._fastface.close()

    def _admit(self, entry: Entry, others: Sequence[Entry]) -> None:
        waiting = sum(other.sample is None for other in others)
        if waiting >= self._settings.max_waiting:
            # Half of the queue is gone then, so that not all of those who come back are refused.
            soon = self._backlog_seconds(others) / 2
            raise _busy(f"{waiting} pictures wait already.", soon)
        late = self._budget.late_by(entry, others, self._loop.policy)
        if late > 0:
            allowed = self._budget.seconds
            message = f"A picture would take about {late + allowed:.1f} s now; {allowed:g} s are"
            raise _busy(f"{message} allowed.", late)

    def _backlog_seconds(self, entries: Sequence[Entry]) -> float:
        return self._cost.backlog_seconds(remaining(entries), self._loop.policy.full_rows)


def _busy(message: str, seconds: float) -> Busy:
    return Busy(message, "Try again later.", retry_after=max(seconds, SOONEST_RETRY))


@dataclass(frozen=True, slots=True, eq=False)
class _WaitingPicture:
    pixels: Pixels
    index: int | None
    future: Future[Face]


class FaceAnalysis:
    """A thread beside the engines that analyses one picture at a time; `max_waiting` may wait."""

    def __init__(self, fastface: FastFace, max_waiting: int) -> None:
        self._fastface = fastface
        self._max_waiting = max_waiting
        self._changed = threading.Condition()
        self._waiting: deque[_WaitingPicture] = deque()
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="face-analysis", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, pixels: Pixels, index: int | None) -> Future[Face]:
        """The face of a picture, later; the future raises `Busy` where too many wait already."""
        waiting = _WaitingPicture(pixels, index, Future())
        with self._changed:
            error: FastFaceError | None = None
            if self._closed:
                error = Unavailable("This worker takes no more pictures.", "Try another.")
            elif len(self._waiting) >= self._max_waiting:
                error = Busy("Too many pictures wait for face analysis.", "Try again soon.")
            if error is None:
                self._waiting.append(waiting)
                self._changed.notify()
        if error is not None:
            waiting.future.set_exception(error)
        return waiting.future

    def close(self) -> None:
        """Finish the picture at hand and refuse the others with `Unavailable`."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()

    def _serve(self) -> None:
        while (waiting := self._next()) is not None:
            if waiting.future.set_running_or_notify_cancel():
                self._analyze(waiting)
        for left in self._waiting:
            if left.future.set_running_or_notify_cancel():
                left.future.set_exception(Unavailable("This worker was closed.", "Try another."))
        self._waiting.clear()

    def _next(self) -> _WaitingPicture | None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._waiting)
            return None if self._closed else self._waiting.popleft()

    def _analyze(self, waiting: _WaitingPicture) -> None:
        try:
            face = self._fastface.analyze(waiting.pixels, index=waiting.index)
        except FastFaceError as error:
            waiting.future.set_exception(error)
        except Exception:
            _log.exception("Face analysis failed.")
            waiting.future.set_exception(
                EngineFailed("The face could not be analysed.", "Try another picture.")
            )
        else:
            waiting.future.set_result(face)
