"""The numbers that say how far one tensor is from another.

Polygraphy's comparators judge per element or by a mean or median, with an absolute and a relative
threshold for each tensor; the measure used throughout this project is one relative L2 number, which
does not depend on how large a tensor's values are.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import inf, isfinite, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastface_trt.engines.probe import beyond_rounding

Array = NDArray[Any]


@dataclass(frozen=True)
class Difference:
    """How far a tensor is from its reference.

    max_abs: largest |ours − reference|. relative_l2: ‖ours − reference‖₂ / ‖reference‖₂. error_rms:
    root mean square of the difference. scale: that of the reference, or of the largest operand
    where operands cancel. A tensor of another shape, or not finite where its reference is, is
    infinitely far.
    """

    max_abs: float
    relative_l2: float
    error_rms: float
    scale: float

    def exceeds(self, tolerance: float) -> bool:
        """Whether the relative error is above `tolerance`."""
        return not self.relative_l2 <= tolerance

    def cancels(self, tolerance: float) -> bool:
        """Whether the error is within `tolerance` of the operands that it is a sum of."""
        return self.error_rms <= tolerance * self.scale

    def as_json(self) -> dict[str, float | None]:
        """The numbers as JSON has them: null for what is not finite."""
        return {name: v if isfinite(v) else None for name, v in asdict(self).items()}


_INFINITE = Difference(inf, inf, inf, 0.0)


def compare(ours: Array, reference: Array, operands: Iterable[Array] = ()) -> Difference:
    """The difference of two arrays, computed in float64; `operands` as for `Difference.scale`.

    Of unsigned numbers, which are rounded ones, a step of 1 is none.
    """
    rounded = reference.dtype.kind == "u"
    ours, reference = ours.astype(np.float64), reference.astype(np.float64)
    if ours.shape != reference.shape:
        return _INFINITE
    finite = np.isfinite(reference)
    # The same infinity or NaN at the same place is agreement.
    if not np.array_equal(np.isfinite(ours), finite) or not np.array_equal(
        ours[~finite], reference[~finite], equal_nan=True
    ):
        return _INFINITE
    error = ours[finite] - reference[finite]
    if rounded:
        error = beyond_rounding(error)
    if not error.size:
        return Difference(0.0, 0.0, 0.0, 0.0)
    error_norm = float(np.linalg.norm(error))
    norm = float(np.linalg.norm(reference[finite]))
    root = sqrt(error.size)
    scales = [norm / root, *(_rms(operand) for operand in operands)]
    relative = 0.0 if error_norm == 0 else error_norm / norm if norm else inf
    return Difference(float(np.abs(error).max()), relative, error_norm / root, max(scales))


def _rms(array: Array) -> float:
    values = array.astype(np.float64)
    values = values[np.isfinite(values)]
    return float(np.sqrt(np.mean(values**2))) if values.size else 0.0
