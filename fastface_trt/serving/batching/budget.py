"""The latency budget: asked at the door, and once more when a task would begin.

An estimate at the door may turn out wrong: the machine becomes slower, or others take more than
was measured. Whoever would be late then is refused before work goes into the picture, which also
brings those behind back into their time.
"""

from collections.abc import Callable, Sequence
from math import inf

from fastface_trt.serving.batching.cost import CostModel, Remaining
from fastface_trt.serving.batching.entry import Entry
from fastface_trt.serving.batching.policy import Policy


class LatencyBudget:
    """Estimates against the seconds that a task may take from `submit` on; None allows any time."""

    def __init__(self, seconds: float | None, cost: CostModel, clock: Callable[[], float]) -> None:
        self.seconds = inf if seconds is None else seconds
        self._cost = cost
        self._clock = clock

    def late_by(self, entry: Entry, ahead: Sequence[Entry], policy: Policy) -> float:
        """Seconds that a task would come too late behind `ahead`; 0 or less for in time."""
        own = entry.remaining()
        if self.seconds == inf or own is None:
            return -inf
        expected = self._cost.seconds_behind(
            own, remaining(ahead), policy.full_rows, company=policy.max_running
        )
        return self._clock() - entry.submitted + expected - self.seconds


def remaining(entries: Sequence[Entry]) -> list[Remaining]:
    """What is left to do for all of them."""
    return [left for entry in entries if (left := entry.remaining()) is not None]
