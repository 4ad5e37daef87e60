"""The engine thread: it owns every call of the engines and tells every event.

One thread for both, so that a task's events come in order and its last one once, whatever is
cancelled, late or closed meanwhile. As long as there are tasks, it

1. ends those that are cancelled, late or refused;
2. decodes one finished picture, if there is one;
3. otherwise prepares the tasks that the policy begins, and makes one UNet call.

Decoding goes before UNet calls: it is the shortest way to a picture in somebody's hands, and it
frees the room that a waiting task needs, so that the next call is fuller. It cannot starve the
steps, since between two UNet calls no more is decoded than the first one finished.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from fastface_trt.errors import Busy, FastFaceError, Unavailable
from fastface_trt.pipeline import FastFace
from fastface_trt.runtime.run import Run
from fastface_trt.serving.batching.budget import LatencyBudget
from fastface_trt.serving.batching.cost import CostModel
from fastface_trt.serving.batching.engine_work import EngineWork, latent_area, shown
from fastface_trt.serving.batching.entry import Entry
from fastface_trt.serving.batching.policy import Policy
from fastface_trt.serving.batching.table import TaskTable
from fastface_trt.serving.batching.warm_up import self_test, warm_up
from fastface_trt.serving.settings import WorkerSettings
from fastface_trt.serving.work import Event, PictureDone, Pixels, StepDone, TaskFailed

Preview = Callable[[NDArray[np.float32]], Pixels]
"""Latents [C,h,w] to a small RGB picture, uint8 [H,W,3]."""

Clock = Callable[[], float]
"""Seconds, never going back."""

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Tally:
    """UNet calls and the rows in them; written by the engine thread."""

    calls: int = 0
    rows: int = 0


class EngineLoop:
    """What the engine thread does from the first engine to the last event."""

    def __init__(
        self,
        fastface: FastFace,
        settings: WorkerSettings,
        table: TaskTable,
        cost: CostModel,
        budget: LatencyBudget,
        preview: Preview | None,
        clock: Clock,
    ) -> None:
        self.tally = Tally()
        self._fastface = fastface
        self._settings = settings
        self._table = table
        self._cost = cost
        self._budget = budget
        self._work = EngineWork(fastface, cost)
        self._preview = preview
        self._clock = clock
        self._policy = Policy(settings.max_running, settings.max_passed_over)

    @property
    def policy(self) -> Policy:
        """Who goes into a call; with the engines' limits once they are open."""
        return self._policy

    def run(self) -> None:
        """The body of the thread; returns when the table is closed or the engines are dead."""
        try:
            self._start()
            while entries := self._table.wait_for_work():
                self._round(entries)
        except Exception as error:
            # What a user can mend has a sentence; only a surprise needs a traceback.
            surprise = not isinstance(error, FastFaceError)
            _log.critical("The engines failed for good: %s", error, exc_info=surprise)
            self._table.dead(shown(error))
        finally:
            for entry in self._table.entries():
                self._fail(entry, Unavailable("The worker stopped.", "Try again later."))

    def _start(self) -> None:
        self._fastface.warm_up()
        self._policy = Policy(
            self._settings.max_running,
            self._settings.max_passed_over,
            self._fastface.stages.request_counts,
            self._settings.max_rows,
            self._cost.call_seconds,
        )
        self._policy = warm_up(self._fastface, self._work, self._policy, self._cost)
        self._table.ready()

    def _round(self, entries: Sequence[Entry]) -> None:
        alive = [entry for entry in entries if not self._ended(entry)]
        started = perf_counter()
        finished = next((entry for entry in alive if entry.finished), None)
        expected = self._call(alive) if finished is None else self._decode(finished)
        self._cost.observe_round(expected, perf_counter() - started)

    def _ended(self, entry: Entry) -> bool:
        error = entry.ending(self._clock())
        if error is not None:
            self._fail(entry, error)
        return error is not None

    def _call(self, entries: Sequence[Entry]) -> float:
        """One UNet call; the seconds that it was expected to take."""
        by_order = {entry.order: entry for entry in entries}
        choice = self._policy.choose([e.candidate(self._budget.seconds) for e in entries])
        running = [entry for entry in entries if entry.run is not None]
        going, expected = [], 0.0
        for entry in (by_order[one.order] for one in choice.go):
            if entry.run is None:
                if not self._in_time(entry, running) or not self._prepared(entry):
                    continue
                expected += self._cost.preparation_seconds()
            going.append(entry)
        if not going:
            return expected
        for one in choice.passed_over:
            by_order[one.order].passed_over += 1
        now = self._clock()
        for entry in going:
            entry.passed_over = 0
            entry.called = now if entry.called is None else entry.called
        runs = [entry.run for entry in going if entry.run is not None]
        expected += sum(self._expected_seconds(run) for run in runs)
        rows = sum(len(run.guidance.branches) for run in runs)
        stepped = self._work.step(runs)
        if stepped.out_of_memory:
            self._policy = self._policy.with_fewer_rows(rows)
            _log.warning("UNet calls have %d rows at most now.", self._policy.max_rows)
        self.tally.calls, self.tally.rows = self.tally.calls + 1, self.tally.rows + rows
        for entry, error in zip(going, stepped.errors, strict=True):
            if error is None:
                self._stepped(entry)
            else:
                self._fail(entry, error)
        self._test_suspect_engines()
        return expected

    def _expected_seconds(self, run: Run) -> float:
        rows = len(run.guidance.branches)
        full = self._policy.full_rows(rows, not run.shares_statistics)
        return self._cost.step_seconds(latent_area(run), rows, full)

    def _in_time(self, entry: Entry, running: Sequence[Entry]) -> bool:
        late = self._budget.late_by(entry, running, self._policy)
        if late > 0:
            message = "The picture waited longer than was expected, and would come too late."
            self._fail(entry, Busy(message, "Try again later.", retry_after=late))
        return late <= 0

    def _prepared(self, entry: Entry) -> bool:
        try:
            entry.run, entry.warnings = self._work.prepare(entry.task, entry.request)
        except FastFaceError as error:
            self._fail(entry, error)
            self._test_suspect_engines()
            return False
        return True

    def _stepped(self, entry: Entry) -> None:
        run = entry.run
        assert run is not None
        if run.finished:
            entry.denoised = self._clock()
        preview = None
        if entry.task.previews and self._preview is not None:
            try:
                preview = self._preview(self._work.download(run.latents))
            except Exception:
                _log.exception("A preview failed; the picture goes on without it.")
        self._tell(entry, StepDone(entry.task.id, run.step, len(run.job.schedule), preview))

    def _decode(self, entry: Entry) -> float:
        """Decode a finished picture; the seconds that it was expected to take."""
        assert entry.run is not None
        assert entry.called is not None
        assert entry.denoised is not None
        expected = self._cost.decoding_seconds(latent_area(entry.run))
        try:
            pixels = self._work.decode(entry.run)
        except FastFaceError as error:
            self._fail(entry, error)
            self._test_suspect_engines()
            return expected
        seconds = {
            "queue": entry.called - entry.submitted,
            "denoise": entry.denoised - entry.called,
            "decode": self._clock() - entry.denoised,
        }
        parameters = self._fastface.parameters(entry.request)
        done = PictureDone(entry.task.id, pixels, parameters, entry.warnings, seconds)
        self._end(entry, done)
        return expected

    def _test_suspect_engines(self) -> None:
        """Raise what a picture of nobody fails with, once too much failed to be the requests."""
        if self._work.suspect:
            _log.error("Too many failures in a row: the engines are put to the test.")
            self_test(self._fastface, self._work)

    def _fail(self, entry: Entry, error: FastFaceError) -> None:
        self._end(entry, TaskFailed(entry.task.id, error))

    def _end(self, entry: Entry, event: Event) -> None:
        self._tell(entry, event)
        self._table.remove(entry)

    def _tell(self, entry: Entry, event: Event) -> None:
        try:
            entry.on_event(event)
        except Exception:
            _log.exception("Telling the events of a task failed.")
