"""The measure of a difference, and the tolerances."""

import json

import numpy as np
import pytest

from fastface_trt.engines.probe import relative_errors
from fastface_trt.errors import UnknownName
from fastface_trt.verify.difference import compare
from fastface_trt.verify.tolerances import TOLERANCES, tolerance_for


def test_numbers_are_those_of_their_definitions():
    one = compare(np.float32([3, 4, 0]), np.float32([3, 0, 0]))
    assert (one.max_abs, one.relative_l2) == (4.0, pytest.approx(4 / 3))
    assert one.error_rms == pytest.approx((16 / 3) ** 0.5)
    assert one.scale == pytest.approx(3**0.5)
    assert one.exceeds(1.0)
    assert not one.exceeds(1.4)


def test_float16_is_compared_in_float64():
    ours, reference = np.full(4, 60000, np.float16), np.full(4, 30000, np.float16)
    assert compare(ours, reference).relative_l2 == 1.0


def test_a_sum_that_cancels_is_judged_by_its_operands():
    one = compare(np.float64([1e-5]), np.float64([0]), [np.float64([2.0]), np.float64([-2.0])])
    assert one.exceeds(1e-3)
    assert one.cancels(1e-3)
    assert not compare(np.float64([1e-5]), np.float64([0])).cancels(1e-3)


@pytest.mark.parametrize(
    ("ours", "reference", "agrees"),
    [
        ([np.nan, 1], [np.nan, 1], True),
        ([np.inf, 1], [np.inf, 1], True),
        ([-np.inf, 1], [np.inf, 1], False),
        ([np.nan, 1], [0, 1], False),
        ([0, 1], [np.nan, 1], False),
        ([1], [1, 1], False),
        ([0, 0], [0, 0], True),
        ([1e-30, 0], [0, 0], False),
        ([], [], True),
    ],
)
def test_not_finite_misshapen_and_empty(ours, reference, agrees):
    one = compare(np.float32(ours), np.float32(reference))
    assert one.exceeds(1.0) is not agrees
    json.dumps(one.as_json(), allow_nan=False)


def test_a_step_of_rounding_is_no_difference():
    ours, reference = np.uint8([1, 255, 7, 0]), np.uint8([2, 254, 7, 4])
    one = compare(ours, reference)
    assert (one.max_abs, one.relative_l2) == (3.0, 3 / np.linalg.norm([2, 254, 7, 4]))
    assert compare(ours[:3], reference[:3]).relative_l2 == 0
    assert relative_errors({"a": ours}, {"a": reference}) == {"a": one.relative_l2}
    assert compare(np.int64([1]), np.int64([2])).max_abs == 1  # codes and indices are not rounded


def test_tolerances():
    assert tolerance_for("fp16", "unet").relative_l2 == 1e-2
    assert tolerance_for("fp8", "unet") is TOLERANCES["fp8"]
    assert tolerance_for("int8", "vae_decoder") is TOLERANCES["fp16"]
    with pytest.raises(UnknownName, match="fp61"):
        tolerance_for("fp61", "unet")
