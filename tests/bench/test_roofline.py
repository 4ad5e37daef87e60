"""The machine's rates by a clock of our own, and the least time that follows from them."""

from itertools import count

import pytest

from fastface_trt.bench import roofline
from fastface_trt.bench.flops import OperationCount
from fastface_trt.bench.roofline import MachineRates, floor, measure_rates, sum_floors
from fastface_trt.engines.backends import builder_for
from tests.engines.gpu_double import simulated_gpu


def operations(flops, moved):
    return OperationCount(
        convolution=flops - 2,
        linear=1,
        attention=1,
        elementwise=10**9,
        weight_bytes=moved - 3,
        input_bytes=1,
        output_bytes=2,
        activation_bytes=10**9,
        operators={},
    )


RATES = MachineRates("onnxruntime", "float32", 100.0, 10.0, "", {})


@pytest.mark.parametrize(
    ("flops", "moved", "seconds", "bound"),
    [(1000, 20, 10.0, "operations"), (1000, 200, 20.0, "bytes"), (1000, 100, 10.0, "operations")],
)
def test_the_longer_of_the_two_is_the_floor(flops, moved, seconds, bound):
    found = floor(operations(flops, moved), RATES)
    assert (found.seconds, found.bound) == (pytest.approx(seconds), bound)
    assert (found.operation_seconds, found.byte_seconds) == pytest.approx((10.0, moved / 10))


def test_floors_of_a_stage_add_up_module_by_module():
    """10 s bound by operations and 20 s by bytes are 30 s, not the longer of the sums."""
    first, second = (floor(operations(*one), RATES) for one in ((1000, 20), (100, 200)))
    both = sum_floors([first, second])
    assert both.seconds == pytest.approx(30.0)
    assert both.bound == "bytes"
    assert (both.flops, both.bytes) == (1100, 220)
    assert sum_floors([]).seconds == 0


@pytest.fixture
def clock(monkeypatch):
    """Every look at the clock is half a second later; what is between two looks takes that."""
    ticks = count()
    monkeypatch.setattr(roofline, "perf_counter", lambda: next(ticks) / 2)


SMALL = ((8, 16, 4), (32, 8, 8))


def test_rates_of_the_cpu_are_operations_over_time(clock):
    rates = measure_rates(builder_for("onnxruntime"), shapes=SMALL, copy_bytes=2**16)
    assert rates.products == {
        "onnxruntime 8×16×4": 2 * 2 * 8 * 16 * 4,
        "numpy 8×16×4": 2 * 2 * 8 * 16 * 4,
        "onnxruntime 32×8×8": 2 * 2 * 32 * 8 * 8,
        "numpy 32×8×8": 2 * 2 * 32 * 8 * 8,
    }
    assert rates.flops_per_second == rates.products[rates.best] == 2 * 2 * 32 * 8 * 8
    assert rates.bytes_per_second == pytest.approx(2 * 2 * 2**16, rel=1e-3)  # whole shares of it


def test_a_gpu_multiplies_and_copies_in_its_own_memory(clock):
    with simulated_gpu("tensorrt-rtx") as (_cuda, _trt):
        builder = builder_for("tensorrt-rtx")
        rates = measure_rates(builder, dtype="float16", shapes=SMALL, copy_bytes=2**16)
        copies = builder.device().copies
        builder.device().close()
    assert rates.products == {
        "tensorrt-rtx 8×16×4": 2 * 2 * 8 * 16 * 4,
        "tensorrt-rtx 32×8×8": 2 * 2 * 32 * 8 * 8,
    }
    assert rates.bytes_per_second == 2 * 2 * 2**16
    # Once each: two factors and the array to copy; no result comes back.
    assert copies.to_device_bytes == 2 * (8 * 16 + 32 * 8) + 2**16
    assert copies.to_host_bytes == 0
