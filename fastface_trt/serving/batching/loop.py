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

import numpy as np
from numpy.typing import NDArray

from fastface_trt.errors import FastFaceError, Unavailable
from fastface_trt.pipeline import FastFace
from fastface_trt.serving.batching.cost import CostModel
from fastface_trt.serving.batching.engine_work import EngineWork, shown
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
        preview: Preview | None,
        clock: Clock,
    ) -> None:
        self.tally = Tally()
        self._fastface = fastface
        self._settings = settings
        self._table = table
        self._cost = cost
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
            _log.critical("The engines failed for good.", exc_info=True)
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
        warm_up(self._fastface, self._work, self._policy, self._cost)
        self._table.ready()

    def _round(self, entries: Sequence[Entry]) -> None:
        alive = [entry for entry in entries if not self._ended(entry)]
        for entry in alive:
            if entry.finished:
                self._decode(entry)
                return
        self._call(alive)

    def _ended(self, entry: Entry) -> bool:
        error = entry.ending(self._clock())
        if error is not None:
            self._fail(entry, error)
        return error is not None

    def _call(self, entries: Sequence[Entry]) -> None:
        by_order = {entry.order: entry for entry in entries}
        choice = self._policy.choose([entry.candidate() for entry in entries])
        going = [by_order[one.order] for one in choice.go]
        going = [entry for entry in going if entry.run is not None or self._prepared(entry)]
        if not going:
            return
        for one in choice.passed_over:
            by_order[one.order].passed_over += 1
        now = self._clock()
        for entry in going:
            entry.passed_over = 0
            entry.called = now if entry.called is None else entry.called
        runs = [entry.run for entry in going if entry.run is not None]
        rows = sum(len(run.guidance.branches) for run in runs)
        errors = self._work.step(runs)
        self.tally.calls, self.tally.rows = self.tally.calls + 1, self.tally.rows + rows
        for entry, error in zip(going, errors, strict=True):
            if error is None:
                self._stepped(entry)
            else:
                self._fail(entry, error)
        self._test_suspect_engines()

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

    def _decode(self, entry: Entry) -> None:
        assert entry.run is not None
        assert entry.called is not None
        assert entry.denoised is not None
        try:
            pixels = self._work.decode(entry.run)
        except FastFaceError as error:
            self._fail(entry, error)
            self._test_suspect_engines()
            return
        seconds = {
            "queue": entry.called - entry.submitted,
            "denoise": entry.denoised - entry.called,
            "decode": self._clock() - entry.denoised,
        }
        parameters = self._fastface.parameters(entry.request)
        done = PictureDone(entry.task.id, pixels, parameters, entry.warnings, seconds)
        self._end(entry, done)

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
