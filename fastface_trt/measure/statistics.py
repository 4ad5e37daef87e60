"""What a list of seconds says: percentiles, an interval for the median, and what to doubt in it.

Medians rather than means, because time has a floor and a long tail. Intervals are percentile
bootstraps at 95 %, with resamples drawn from a fixed seed: the same samples give the same interval.

Means with bootstrap intervals, and differences between settings pair by pair.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

Samples = Sequence[float] | NDArray[np.float64]

CONFIDENCE: Final = 0.95
_RESAMPLES: Final = 2000
_SEED: Final = 20260
_FENCE: Final = 1.5


def percentile(samples: Samples, percent: float) -> float:
    """The percentile by linear interpolation between order statistics, as numpy's default."""
    return float(np.percentile(np.asarray(samples, dtype=np.float64), percent))


def resampled_medians(
    samples: Samples, generator: np.random.Generator, resamples: int = _RESAMPLES
) -> NDArray[np.float64]:
    """Medians of `resamples` draws with replacement, each as large as `samples`."""
    values = np.asarray(samples, dtype=np.float64)
    drawn = generator.integers(0, len(values), (resamples, len(values)))
    medians: NDArray[np.float64] = np.median(values[drawn], axis=1)
    return medians


def median_interval(samples: Samples) -> tuple[float, float]:
    """The 95 % bootstrap interval of the median."""
    return _interval(resampled_medians(samples, np.random.default_rng(_SEED)))


def ratio_interval(first: Samples, second: Samples) -> tuple[float, float]:
    """The 95 % bootstrap interval of median(second) / median(first).

    Both are resampled, independently of each other; they need not be equally long.
    """
    generator = np.random.default_rng(_SEED)
    below = resampled_medians(first, generator)
    above = resampled_medians(second, generator)
    return _interval(above / below)


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


def _interval(estimates: NDArray[np.float64]) -> tuple[float, float]:
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(estimates, [tail, 100 - tail])
    return float(low), float(high)


RESAMPLES = 2000
_BLOCK = 1 << 22
"""Numbers resampled at once: it bounds memory, and changes no result."""


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
        array = np.asarray(values, dtype=np.float64)
        if array.size == 0:
            raise ValueError("a mean needs values")
        rng = np.random.default_rng(0)
        rows = max(1, min(RESAMPLES, _BLOCK // len(array)))
        means = np.concatenate(
            [
                array[rng.integers(len(array), size=(min(rows, RESAMPLES - at), len(array)))].mean(
                    1
                )
                for at in range(0, RESAMPLES, rows)
            ]
        )
        low, high = (float(x) for x in np.percentile(means, [2.5, 97.5]))
        return cls(float(array.mean()), low, high, len(array))

    @property
    def excludes_zero(self) -> bool:
        """Whether a difference is one: 0 lies outside the interval, and it is of several pairs."""
        return self.n > 1 and (self.low > 0 or self.high < 0)

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
