"""What a list of seconds says: percentiles, an interval for the median, and what to doubt in it.

Medians rather than means, because time has a floor and a long tail. Intervals are percentile
bootstraps at 95 %, with resamples drawn from a fixed seed: the same samples give the same interval.
"""

from collections.abc import Sequence
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
