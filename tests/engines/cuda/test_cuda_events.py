"""Timing events on the simulated driver: read late, used again, destroyed with their device."""

import gc
from concurrent.futures import ThreadPoolExecutor

import pytest

from fastface_trt.engines.cuda.device import CudaDevice
from fastface_trt.engines.device import HostDevice
from fastface_trt.errors import EngineFailed

pytestmark = pytest.mark.usefixtures("quick_collections")


def test_marking_waits_for_nothing_and_reading_waits_for_the_later_mark(device, cuda):
    start = len(cuda.calls)
    earlier = device.mark()
    for _ in range(3):
        device.zeros((4,), "float32")
    later = device.mark()
    assert not [name for name in cuda.names(start) if "Synchronize" in name]
    stream = device.stream().handle
    assert stream.done < stream.submitted
    # Three fills, and frees of two of the tensors before the next allocation, a millisecond each.
    assert later.seconds_since(earlier) == pytest.approx(5 / 1000)


def test_events_take_the_time(device, cuda):
    start = len(cuda.calls)
    device.mark()
    ((_, _, (flags,)),) = [c for c in cuda.calls[start:] if c[1] == "cuEventCreate"]
    assert flags == 0  # the driver's default, with timing


def test_a_mark_that_nobody_holds_is_used_again(device, cuda):
    for _ in range(10):
        device.mark()
        gc.collect()
    assert cuda.names().count("cuEventCreate") == 1
    held = [device.mark() for _ in range(5)]
    assert len({id(mark.handle) for mark in held}) == 5
    assert cuda.names().count("cuEventCreate") == 5


def test_a_thread_that_never_worked_on_the_gpu_reads_times(device):
    earlier, later = device.mark(), device.mark()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(later.seconds_since, earlier).result() == 0


def test_after_the_device_its_times_are_gone(cuda):
    device = CudaDevice()
    earlier, later = device.mark(), device.mark()
    device.close()
    with pytest.raises(EngineFailed, match="closed"):
        later.seconds_since(earlier)


def test_on_the_host_there_is_nothing_to_mark():
    assert HostDevice().mark() is None
