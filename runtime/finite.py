"""What counts as a number in a request."""

import numpy as np

_LARGEST = 3.4028234e38
"""The engines compute in float32: what is beyond becomes infinite there."""


def is_number(value: object) -> bool:
    """Whether `value` is a number that is finite in float32; True and False are none."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        return False
    return bool(-_LARGEST <= value <= _LARGEST)
