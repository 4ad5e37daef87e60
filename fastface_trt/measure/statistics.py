"""What samples say: percentiles, bootstrap intervals, and what to doubt in them.

Times get medians rather than means, because time has a floor and a long tail; scores get means, and
differences between settings are taken pair by pair. Intervals are percentile bootstraps at 95 %
whose resamples are drawn from a fixed seed: the same samples give the same interval.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Samples = Sequence[float] | NDArray[np.float64]

CONFIDENCE: Final = 0.95
RESAMPLES: Final = 2000
_TIMES_SEED, _SCORES_SEED = 20260, 0
_BLOCK: Final = 1 << 22
"""Numbers resampled at once: it bounds memory, and changes no result."""
_FENCE: Final = 1.5


def percentile(samples: Samples, percent: float) -> float:
    """The percentile by linear interpolation between order statistics, as numpy's default."""
    return float(np.percentile(np.asarray(samples, dtype=np.float64), percent))


def resampled(
    samples: Samples,
    statistic: Callable[..., Any],
    generator: np.random.Generator,
    resamples: int = RESAMPLES,
) -> NDArray[np.float64]:
    """`statistic(draws, axis=1)` of `resamples` draws with replacement, as large as `samples`."""
    values = np.asarray(samples, dtype=np.float64)
    rows = max(1, min(resamples, _BLOCK // len(values)))
    return np.concatenate(
        [
            statistic(
                values[
                    generator.integers(len(values), size=(min(rows, resamples - at), len(values)))
                ],
                axis=1,
            )
            for at in range(0, resamples, rows)
        ]
    )


def interval_of(estimates: Samples) -> tuple[float, float]:
    """The middle 95 % of resampled estimates."""
    tail = 100 * (1 - CONFIDENCE) / 2
    return percentile(estimates, tail), percentile(estimates, 100 - tail)


def median_interval(samples: Samples) -> tuple[float, float]:
    """The 95 % bootstrap interval of the median."""
    return interval_of(resampled(samples, np.median, np.random.default_rng(_TIMES_SEED)))


def ratio_interval(first: Samples, second: Samples) -> tuple[float, float]:
    """The 95 % bootstrap interval of median(second) / median(first).

    Both are resampled, independently of each other; they need not be equally long.
    """
    generator = np.random.default_rng(_TIMES_SEED)
    below = resampled(first, np.median, generator)
    above = resampled(second, np.median, generator)
    return interval_of(above / below)


@dataclass(frozen=True)
class Ratio:
    """A ratio of times with its 95 % bootstrap interval."""

    median: float
    low: float
    high: float

    @classmethod
    def paired(cls, above: Samples, below: Samples) -> "Ratio":
        """Median of above / below within each round, so that what slowed both down cancels."""
        ratios = np.asarray(above, np.float64) / np.asarray(below, np.float64)
        return cls(float(np.median(ratios)), *median_interval(ratios))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def outliers(samples: Samples) -> tuple[int, ...]:
    """Places of the samples outside Tukey's fences, 1.5 quartile distances beyond the quartiles.

    Of fewer than five samples none is called an outlier.
    """
    values = np.asarray(samples, dtype=np.float64)
    if len(values) < 5:
        return ()
    low, high = np.percentile(values, [25, 75])
    reach = _FENCE * (high - low)
    outside = (values < low - reach) | (values > high + reach)
    return tuple(int(index) for index in np.flatnonzero(outside))


def drift(samples: Samples) -> tuple[float, float, float]:
    """Median of the second half over that of the first, and the 95 % interval of this ratio.

    An interval without 1 says that the machine did not stay what it was: it warmed up, or it
    throttled. The interval is (1, 1) for fewer than eight samples, of which nothing can be said.
    """
    values = np.asarray(samples, dtype=np.float64)
    half = len(values) // 2
    if half < 4:
        return 1.0, 1.0, 1.0
    first, second = values[:half], values[half:]
    return float(np.median(second) / np.median(first)), *ratio_interval(first, second)


FEWEST_PAIRS = 6
"""Of fewer, all have one sign by chance in more than 5 % of runs without any difference (2/2⁵), and
a bootstrap interval then excludes 0."""
FEW_PAIRS = 30
"""Of fewer, percentile bootstrap intervals come out too narrow."""


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % bootstrap interval over pairs, and the number of pairs."""

    mean: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Interval":
        """Mean of `values` (at least one), percentile bootstrap with a fixed seed."""
        if len(values) == 0:
            raise ValueError("a mean needs values")
        means = resampled(values, np.mean, np.random.default_rng(_SCORES_SEED))
        return cls(float(np.mean(values)), *interval_of(means), len(values))

    @property
    def excludes_zero(self) -> bool:
        """Whether a difference is one: 0 lies outside the interval, of `FEWEST_PAIRS` or more."""
        return self.n >= FEWEST_PAIRS and (self.low > 0 or self.high < 0)

    def text(self, scale: float = 1.0, digits: int = 3, sign: str = "-") -> str:
        """`mean (low to high)`; `sign` as in format specifications."""
        low, mean, high = (
            f"{scale * x:{sign}.{digits}f}" for x in (self.low, self.mean, self.high)
        )
        return f"{mean} ({low} to {high})"


def paired_difference(
    values: Mapping[int, float | None], baseline: Mapping[int, float | None]
) -> Interval | None:
    """Mean of value − baseline over the pairs where both are known; None when there is none."""
    differences = [
        value - reference
        for pair, value in values.items()
        if value is not None and (reference := baseline.get(pair)) is not None
    ]
    return Interval.of(differences) if differences else None
