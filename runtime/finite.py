"""What counts as a number in a request."""

from numbers import Real

_LARGEST = 3.4028234e38
"""The engines compute in float32: what is beyond becomes infinite there."""


def is_number(value: object) -> bool:
    """Whether `value` is a number that is finite in float32; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool) and abs(value) <= _LARGEST
