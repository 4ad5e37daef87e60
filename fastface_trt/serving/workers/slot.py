"""A worker's place in the pool: the process that fills it, and when the next one may."""

from collections.abc import Mapping

from fastface_trt.serving.work import Load, State
from fastface_trt.serving.workers.process import WorkerProcess

MAX_DEATHS = 5
"""Deaths in a row, with no picture between them, after which a slot stays empty."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 10.0


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
