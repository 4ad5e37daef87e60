"""A worker inside one process: strangers' pictures in the same UNet calls, continuously."""

import itertools
import logging
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from fastface_trt.engines.engine import Closing
from fastface_trt.engines.manifest import ExportManifest
from fastface_trt.errors import Busy, EngineFailed, FastFaceError, Unavailable
from fastface_trt.measure.memory import resident_bytes
from fastface_trt.runtime.face import Face
from fastface_trt.runtime.pipeline import FastFace
from fastface_trt.serving.batching.cost import CostModel, Remaining
from fastface_trt.serving.batching.entry import (
    Demand,
    Entry,
    LatencyBudget,
    check_deadline,
    check_output,
    check_price,
)
from fastface_trt.serving.batching.fairness import FairQueue, too_many
from fastface_trt.serving.batching.loop import (
    Clock,
    EngineLoop,
    OnCall,
    OnDead,
    Preview,
    TaskTable,
)
from fastface_trt.serving.settings import WorkerSettings
from fastface_trt.serving.work import Load, OnEvent, Pixels, State, Task

_log = logging.getLogger(__name__)

SOONEST_RETRY = 0.1
"""Seconds that a refused client should wait at least."""


class Batcher(Closing):
    """A `Worker` over one `FastFace`: `start` it, or use it in a `with` block.

    With `owns_fastface` closing it closes `fastface` too. `preview` makes the pictures of
    `StepDone` for tasks that ask for them. `clock` gives the seconds that deadlines are in.
    `on_call` and `on_dead` are called on the engine thread.
    """

    def __init__(
        self,
        fastface: FastFace,
        settings: WorkerSettings,
        *,
        preview: Preview | None = None,
        owns_fastface: bool = False,
        clock: Clock = time.monotonic,
        on_call: OnCall | None = None,
        on_dead: OnDead | None = None,
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
            fastface,
            settings,
            self._table,
            self._cost,
            self._budget,
            preview,
            clock,
            on_call,
            on_dead,
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

    def submit(self, task: Task, on_event: OnEvent, *, alone: bool = False) -> None:
        """Queue a task; `alone` keeps others out of its UNet calls. See `Worker.submit`.

        Raises `InvalidRequest` too for what this export cannot do.
        """
        manifest, settings = self._fastface.manifest, self._settings
        check_output(task.request, manifest, settings.max_output_pixels)
        request = task.request.for_adapter(manifest.adapter_kind)
        self._fastface.stages.check_size(request)
        demand = Demand.of(request, manifest, self._fastface.stages.text_positions(request))
        price = self._cost.seconds_alone(Remaining(demand.rows, demand.area))
        now = self._clock()
        entry = Entry(next(self._orders), task, on_event, request, now, demand, price, alone)
        if self._cost.fresh:
            check_price(price, settings.max_request_seconds)
            check_deadline(entry, now)
        self._table.add(entry, lambda others: self._admit(entry, others))

    def cancel(self, task_id: str) -> None:
        """End a task with `Cancelled` before its next step; unknown and ended ones are ignored."""
        self._table.cancel(task_id)

    def analyze(self, pixels: Pixels, index: int | None = None, owner: str = "") -> "Future[Face]":
        """Find a face on a thread beside the engines.

        The future also raises `Busy`, where the owner's share of `max_waiting` waits.
        """
        return self._analysis.submit(pixels, index, owner)

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
        waiting = [other for other in others if other.sample is None and other.refused is None]
        held = Counter(other.owner for other in waiting)
        most = self._settings.max_waiting
        refusal = too_many(entry.owner, held, most, "pictures wait")
        if refusal is None and len(waiting) >= most:
            # Who has less than its share comes in, and whoever has most gives a place.
            owner = max(held, key=lambda one: held[one])
            if held[owner] <= held[entry.owner] + 1:
                refusal = f"{len(waiting)} pictures wait already."
        if refusal is not None:
            # Half of the queue is gone then, so that not all of those who come back are refused.
            raise _busy(refusal, self._backlog_seconds(others) / 2)
        late = self._budget.late_by(entry, others, self._loop.policy)
        if late > 0:
            allowed = self._budget.seconds
            message = f"A picture would take about {late + allowed:.1f} s now; {allowed:g} s are"
            raise _busy(f"{message} allowed.", late)
        if len(waiting) >= most:
            newest = max((o for o in waiting if o.owner == owner), key=lambda one: one.order)
            newest.refused = _busy(
                "The queue is full, and others came who had less in it.",
                self._backlog_seconds(others) / 2,
            )

    def _backlog_seconds(self, entries: Sequence[Entry]) -> float:
        left = [entry.remaining() for entry in entries]
        return self._cost.backlog_seconds(left, self._loop.policy.full_rows)


def _busy(message: str, seconds: float) -> Busy:
    return Busy(message, "Try again later.", retry_after=max(seconds, SOONEST_RETRY))


@dataclass(frozen=True, slots=True, eq=False)
class _WaitingPicture:
    pixels: Pixels
    index: int | None
    future: Future[Face]


class FaceAnalysis:
    """A thread beside the engines that analyses one picture at a time; `max_waiting` may wait,
    and owners take turns."""

    def __init__(self, fastface: FastFace, max_waiting: int) -> None:
        self._fastface = fastface
        self._changed = threading.Condition()
        self._waiting: FairQueue[_WaitingPicture] = FairQueue(max_waiting, "pictures wait")
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="face-analysis", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, pixels: Pixels, index: int | None, owner: str = "") -> Future[Face]:
        """The face of a picture, later; the future raises `Busy` where too many wait already."""
        waiting = _WaitingPicture(pixels, index, Future())
        with self._changed:
            try:
                if self._closed:
                    raise Unavailable("This worker takes no more pictures.", "Try another.")
                self._waiting.put(owner, waiting)
                self._changed.notify()
            except FastFaceError as error:
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
        while self._waiting:
            left = self._waiting.pop()
            if left.future.set_running_or_notify_cancel():
                left.future.set_exception(Unavailable("This worker was closed.", "Try another."))

    def _next(self) -> _WaitingPicture | None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._waiting)
            return None if self._closed else self._waiting.pop()

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
