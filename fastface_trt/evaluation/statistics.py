"""Means with bootstrap intervals, and differences between settings pair by pair."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

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
