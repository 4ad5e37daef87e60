"""Means with bootstrap intervals, and paired differences between settings.

Every setting of a run sees the same pairs of face and prompt with the same noise, so settings are
compared pair by pair: what differs between pairs cancels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import isnan, nan
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean of `n` values with its 95 % percentile bootstrap interval.

    All three are NaN without values; the ends are NaN for a single one, which says nothing about
    its spread.
    """

    mean: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Interval":
        """Mean of `values` and its interval, the same on every call."""
        array = np.asarray(values, dtype=np.float64)
        if len(array) < 2:
            return cls(float(array[0]) if len(array) else nan, nan, nan, len(array))
        means = array[_resamples(len(array))].mean(1)
        low, high = (float(x) for x in np.percentile(means, [2.5, 97.5]))
        return cls(float(array.mean()), low, high, len(array))

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 lies outside; False where there is no interval."""
        return self.low > 0 or self.high < 0

    def text(self, digits: int = 3, *, sign: bool = False) -> str:
        """`mean (low to high)`, with + before positive numbers when `sign`."""
        form = f"{'+' if sign else ''}.{digits}f"
        if isnan(self.mean):
            return "no value"
        if isnan(self.low):
            return f"{self.mean:{form}} (n = 1)"
        return f"{self.mean:{form}} ({self.low:{form}} to {self.high:{form}})"


@lru_cache(maxsize=8)
def _resamples(count: int) -> NDArray[Any]:
    """Which values each resample draws, [RESAMPLES, count]."""
    return np.random.default_rng(0).integers(count, size=(RESAMPLES, count))


def paired_difference(ours: Mapping[int, float], baseline: Mapping[int, float]) -> Interval:
    """Mean of ours − baseline over the pairs (keys) that have both."""
    common = sorted(ours.keys() & baseline.keys())
    return Interval.of([ours[pair] - baseline[pair] for pair in common])
