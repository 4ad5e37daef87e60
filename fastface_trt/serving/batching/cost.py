"""What things cost on this machine, measured while it works: the ground of every estimate.

Seconds are kept per number of rows and size of the picture, as exponentially weighted means, since
a machine's speed drifts with its clocks and its neighbours.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import exp
from time import monotonic
from typing import Any

WEIGHT = 0.2
"""Of the newest measurement: the mean follows a change within about five calls."""

_OUTLIER = 2.0
"""Times the mean: a measurement above it counts as this much, since requests are refused by these
numbers, and one call during which the machine stood still must not refuse the next ones."""

MOST_SIZES = 64
"""Sizes of pictures that are remembered, the last ones: strangers may ask for thousands of them,
and every estimate looks through those that are known."""

FRESH_SECONDS = 30.0
"""How old the newest measurement may be for a request to be refused by it; an older one lets a
request in, which measures anew."""

SLOWDOWN_SECONDS = 2.0
"""Over how long the slowdown is averaged: work of this age counts e times less than the newest."""

FullRows = Callable[[int], int]
"""Rows per step of a task to the rows of the fullest call that it can be in."""


@dataclass(frozen=True, slots=True)
class Remaining:
    """What is left of a task: rows of each step to come, latent pixels of a row, and whether its
    prompt and face are still to be encoded.
    """

    rows: tuple[int, ...]
    area: int
    unprepared: bool = True


class CostModel:
    """Measured seconds of UNet calls, decodings and preparations, and estimates from them.

    `area` is the number of latent pixels of a row. Everything is 0 before the first measurement.
    Threads may share it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: dict[int, dict[int, float]] = {}
        self._decodings: dict[int, float] = {}
        self._preparation: float | None = None
        self._spent = self._expected = 0.0
        self._measured = -FRESH_SECONDS

    @property
    def fresh(self) -> bool:
        """Whether a call was measured not long ago."""
        return monotonic() - self._measured < FRESH_SECONDS

    def observe_call(self, area: int, rows: int, seconds: float) -> None:
        """A UNet call of that many rows took so long."""
        with self._lock:
            known = self._calls.pop(area, {})
            self._calls[area] = known
            _drop_oldest(self._calls)
            known[rows] = _mean(known.get(rows), seconds)
            self._measured = monotonic()

    def observe_decoding(self, area: int, seconds: float) -> None:
        """Decoding a picture took so long."""
        with self._lock:
            self._decodings[area] = _mean(self._decodings.pop(area, None), seconds)
            _drop_oldest(self._decodings)

    def observe_preparation(self, seconds: float) -> None:
        """Encoding a prompt and a face took so long; little where both were known."""
        with self._lock:
            self._preparation = _mean(self._preparation, seconds)

    def observe_round(self, expected: float, seconds: float) -> None:
        """Work of so many expected seconds, as `seconds_shared` adds them up, took so long."""
        fade = exp(-seconds / SLOWDOWN_SECONDS)
        with self._lock:
            self._expected = fade * self._expected + expected
            self._spent = fade * self._spent + seconds

    @property
    def slowdown(self) -> float:
        """Seconds that pass for each second that is expected of full calls.

        Above 1 where calls are not full, where there is work between them, and where the machine
        has become slower than when full calls were measured.
        """
        with self._lock:
            return self._spent / self._expected if self._expected > 0 else 1.0

    def clear(self) -> None:
        """Forget every measurement."""
        with self._lock:
            self._spent = self._expected = 0.0
            self._calls.clear()
            self._decodings.clear()
            self._preparation = None

    def call_seconds(self, area: int, rows: int) -> float:
        """A UNet call: measured, or interpolated between the nearest numbers of rows.

        Fewer rows than any measured cost what the fewest did, more go on as the last two did. A
        size that was never seen costs as much more than the nearest as it has more pixels.
        """
        with self._lock:
            nearest = _nearest(self._calls, area)
            if nearest is None:
                return 0.0
            return _interpolate(self._calls[nearest], rows) * area / nearest

    def decoding_seconds(self, area: int) -> float:
        """Decoding one picture."""
        with self._lock:
            nearest = _nearest(self._decodings, area)
            return 0.0 if nearest is None else self._decodings[nearest] * area / nearest

    def seconds_alone(self, task: Remaining) -> float:
        """Until a task is done when every step is a call of its own."""
        return sum(self.call_seconds(task.area, rows) for rows in task.rows) + self._around(task)

    def seconds_shared(self, task: Remaining, full_rows: FullRows) -> float:
        """A task's part of the machine's time when all its calls are full."""
        steps = sum(self.step_seconds(task.area, rows, full_rows(rows)) for rows in task.rows)
        return steps + self._around(task)

    def step_seconds(self, area: int, rows: int, full: int) -> float:
        """The part of so many rows in a call of `full` rows."""
        return rows * self.call_seconds(area, full) / full

    def preparation_seconds(self) -> float:
        """Encoding a prompt and a face."""
        with self._lock:
            return self._preparation or 0.0

    def backlog_seconds(self, tasks: Iterable[Remaining], full_rows: FullRows) -> float:
        """Until all tasks are done: their parts in full calls, or the longest one by itself."""
        shared = longest = 0.0
        # Strangers often ask for the same: this is asked at every request and must not cost much.
        for task, count in Counter(tasks).items():
            shared += count * self.seconds_shared(task, full_rows)
            longest = max(longest, self.seconds_alone(task))
        return self.slowdown * max(shared, longest)

    def seconds_behind(
        self,
        task: Remaining,
        ahead: Iterable[Remaining],
        full_rows: FullRows,
        company: int = 1,
        others: Iterable[Iterable[Remaining]] = (),
    ) -> float:
        """Until a new task is done behind those of its owner that are there.

        Their parts come first, then its own steps, which it does by itself or in turns with as
        many others as `company` says, itself among them. `others` are the tasks of each other
        owner, who takes turns: as long as all of these take, and no longer than its own.
        """

        def shared(tasks: Iterable[Remaining]) -> float:
            return sum(n * self.seconds_shared(one, full_rows) for one, n in Counter(tasks).items())

        own = shared(ahead)
        own += max(self.seconds_alone(task), company * self.seconds_shared(task, full_rows))
        return self.slowdown * (own + sum(min(own, shared(tasks)) for tasks in others))

    def _around(self, task: Remaining) -> float:
        preparation = self.preparation_seconds() if task.unprepared else 0.0
        return preparation + self.decoding_seconds(task.area)


def _mean(known: float | None, newest: float) -> float:
    if known is None:
        return newest
    return known + WEIGHT * (min(newest, _OUTLIER * known) - known)


def _drop_oldest(known: dict[int, Any]) -> None:
    if len(known) > MOST_SIZES:
        del known[next(iter(known))]


def _nearest(known: Mapping[int, object], area: int) -> int | None:
    return min(known, key=lambda other: abs(other - area), default=None)


def _interpolate(known: Mapping[int, float], rows: int) -> float:
    points = sorted(known.items())
    below = [point for point in points if point[0] <= rows]
    above = [point for point in points if point[0] >= rows]
    if not below:
        return points[0][1]
    (low, seconds) = below[-1]
    if above:
        (high, more) = above[0]
        return seconds if high == low else seconds + (more - seconds) * (rows - low) / (high - low)
    per_row = seconds / low
    if len(below) > 1:
        (before, less) = below[-2]
        # Noise may bend the last piece: a row more costs something from nothing to the mean row.
        per_row = min(max((seconds - less) / (low - before), 0.0), per_row)
    return seconds + per_row * (rows - low)
