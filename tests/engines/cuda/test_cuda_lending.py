"""Tensors of the simulated GPU in other hands: views, copies, order between streams, lifetimes."""

import gc
import threading

import numpy as np
import pytest

from fastface_trt.engines import dlpack
from fastface_trt.engines.cuda.device import CudaDevice
from fastface_trt.engines.device import DeviceTensor, HostDevice
from fastface_trt.errors import EngineFailed

pytestmark = pytest.mark.usefixtures("quick_collections")

VALUES = np.arange(12, dtype=np.float32).reshape(3, 4)


def content(cuda, address, shape=VALUES.shape):
    """What lies in device memory now, without waiting for anything."""
    return cuda.read(address, 4 * int(np.prod(shape))).view(np.float32).reshape(shape).copy()


def run(cuda, stream):
    """What a consumer's stream does when its turn comes."""
    cuda._drain(cuda.stream_of(int(stream)))


@pytest.mark.parametrize("version", [None, (0, 8), (1, 0), (1, 1)])
def test_a_view_is_the_same_memory(device, version):
    tensor = device.upload(VALUES)
    assert tensor.__dlpack_device__() == (dlpack.CUDA, 0)
    borrowed = dlpack.take(tensor.__dlpack__(max_version=version))
    assert (borrowed.address, borrowed.shape) == (tensor.address, (3, 4))
    assert (borrowed.dtype, borrowed.device) == ("float32", (dlpack.CUDA, 0))
    assert dlpack.is_dense(borrowed.shape, borrowed.strides)


def test_the_consumers_stream_waits_for_our_writes(device, cuda):
    """The upload has not happened when the view is made; the consumer's first work sees it."""
    theirs = cuda.external_stream()
    tensor = device.upload(VALUES)
    borrowed = dlpack.take(tensor.__dlpack__(stream=int(theirs), max_version=(1, 0)))
    assert not np.array_equal(content(cuda, borrowed.address), VALUES)
    run(cuda, theirs)
    np.testing.assert_array_equal(content(cuda, borrowed.address), VALUES)
    cuda._cuStreamDestroy(theirs)


@pytest.mark.parametrize("stream", [None, 1])
def test_without_a_stream_it_is_the_default_stream(device, cuda, stream):
    tensor = device.upload(VALUES)
    tensor.__dlpack__(stream=stream)
    run(cuda, 1)
    np.testing.assert_array_equal(content(cuda, tensor.address), VALUES)


def test_minus_one_asks_for_no_order_and_zero_is_ambiguous(device, cuda):
    tensor = device.upload(VALUES)
    start = len(cuda.calls)
    tensor.__dlpack__(stream=-1)
    assert cuda.names(start) == []
    with pytest.raises(BufferError, match="ambiguous"):
        tensor.__dlpack__(stream=0)


def test_a_copy_is_other_memory_behind_our_writes(device, cuda):
    tensor = device.upload(VALUES)
    borrowed = dlpack.take(tensor.__dlpack__(copy=True, max_version=(1, 0)))
    assert borrowed.address != tensor.address
    run(cuda, 1)
    np.testing.assert_array_equal(content(cuda, borrowed.address), VALUES)


def test_a_view_of_an_engines_buffer_is_not_lent(device):
    buffer = device.allocate(48)
    tensor = DeviceTensor(buffer, (3, 4), "float32")
    with pytest.raises(BufferError, match=r"Device\.copy"):
        tensor.__dlpack__()
    assert not hasattr(tensor, "__cuda_array_interface__")
    with pytest.raises(BufferError, match="download"):
        device.upload(VALUES).__dlpack__(dl_device=(dlpack.HOST, 0))


def test_the_cuda_array_interface(device):
    tensor = device.upload(VALUES)
    described = tensor.__cuda_array_interface__
    assert described == {
        "version": 3,
        "shape": (3, 4),
        "typestr": "<f4",
        "data": (tensor.address, False),
        "strides": None,
        "stream": int(device.stream().handle),
    }
    assert np.dtype(described["typestr"]).itemsize == 4
    assert not hasattr(device.zeros((2,), "bfloat16"), "__cuda_array_interface__")


def test_memory_is_held_by_the_consumer_and_freed_after_it(device, cuda):
    before = cuda.held()
    borrowed = dlpack.take(device.upload(VALUES).__dlpack__())
    device.synchronize()
    assert cuda.held() - before == VALUES.nbytes
    del borrowed
    device.synchronize()
    device.synchronize()
    assert cuda.held() == before


def test_a_capsule_that_nobody_takes_frees_its_memory(device, cuda):
    before = cuda.held()
    device.upload(VALUES).__dlpack__()
    device.synchronize()
    device.synchronize()
    assert cuda.held() == before


@pytest.mark.parametrize("on_another_thread", [False, True])
def test_a_consumer_outlives_the_device(cuda, on_another_thread):
    device = CudaDevice()
    kept = [dlpack.take(device.upload(VALUES).__dlpack__())]
    described = device.upload(VALUES + 1)
    address = described.__cuda_array_interface__["data"][0]
    dropped = device.upload(VALUES)
    device.close()
    del dropped
    np.testing.assert_array_equal(content(cuda, kept[0].address), VALUES)
    np.testing.assert_array_equal(content(cuda, address), VALUES + 1)
    assert cuda.held() == 2 * VALUES.nbytes
    assert cuda.leaks().count("context") == 2

    del described
    let_go = threading.Thread(target=kept.clear) if on_another_thread else None
    if let_go is None:
        kept.clear()
    else:
        let_go.start()
        let_go.join()
    assert cuda.held() == 0  # and the fixture: no context, no stream, no pool


def test_a_closed_device_lends_nothing(cuda):
    device = CudaDevice()
    tensor = device.upload(VALUES)
    device.close()
    for lend in (tensor.__dlpack__, lambda: tensor.__cuda_array_interface__):
        with pytest.raises(EngineFailed, match="closed"):
            lend()


class Foreign:
    """A tensor of another library: memory that its own stream is still writing."""

    def __init__(self, cuda, shape=VALUES.shape, ordinal=0):
        self.cuda, self.shape, self.ordinal = cuda, shape, ordinal
        self.address, self.stream = cuda.allocate(VALUES.nbytes), cuda.external_stream()
        cuda.submit(self.stream, self.fill)
        self.event = cuda.external_event()

    def fill(self):
        self.cuda.read(self.address, VALUES.nbytes).view(np.float32)[:] = VALUES.reshape(-1)

    def free(self):
        self.cuda._cuEventDestroy(self.event)
        self.cuda._cuStreamDestroy(self.stream)
        self.cuda.release(self.address)


class ByDlpack(Foreign):
    def __dlpack_device__(self):
        return dlpack.CUDA, self.ordinal

    def __dlpack__(self, *, stream, max_version=None):
        self.cuda._cuEventRecord(self.event, self.stream)
        self.cuda._cuStreamWaitEvent(self.cuda.stream_of(stream), self.event, 0)
        place = (dlpack.CUDA, self.ordinal)
        return dlpack.lend(self.address, self.shape, "float32", place, self, versioned=True)


class ByInterface(Foreign):
    strides = None
    read_only = False

    @property
    def __cuda_array_interface__(self):
        return {
            "version": 3,
            "shape": self.shape,
            "typestr": "<f4",
            "data": (self.address, self.read_only),
            "strides": self.strides,
            "stream": int(self.stream),
        }


@pytest.mark.parametrize("kind", [ByDlpack, ByInterface])
def test_foreign_memory_is_read_after_its_stream_has_written_it(device, cuda, kind):
    foreign = kind(cuda)
    borrowed = device.borrow(foreign)
    assert borrowed.address == foreign.address
    np.testing.assert_array_equal(device.download(device.copy(borrowed)), VALUES)
    del borrowed
    foreign.free()


def test_foreign_memory_is_held_until_our_work_on_it_is_done(device, cuda):
    foreign = ByDlpack(cuda)
    copy = device.copy(device.borrow(foreign))
    held = [holder for holder in gc.get_referrers(foreign) if type(holder).__name__ == "_Owned"]
    assert held  # nobody but our stream has it
    del held
    np.testing.assert_array_equal(device.download(copy), VALUES)
    assert not [h for h in gc.get_referrers(foreign) if type(h).__name__ == "_Owned"]
    foreign.free()


def test_what_does_not_fit_is_refused(device, cuda):
    elsewhere, strided, read_only = ByDlpack(cuda, ordinal=1), ByInterface(cuda), ByInterface(cuda)
    strided.strides, read_only.read_only = (64, 4), True
    for source, options, message in (
        (elsewhere, {}, "not on GPU 0"),
        (strided, {}, "dense"),
        (read_only, {"writable": True}, "read-only"),
        (VALUES, {}, "DLPack device"),
        ("text", {}, "neither"),
    ):
        with pytest.raises(BufferError, match=message):
            device.borrow(source, **options)
    with pytest.raises(BufferError, match="GPU"):
        HostDevice().borrow(strided)
    for foreign in (elsewhere, strided, read_only):
        foreign.free()


def test_writing_into_foreign_memory_is_done_when_it_returns(device, cuda):
    foreign = ByInterface(cuda)
    target = device.borrow(foreign, writable=True)
    device.write(target, VALUES * 2)
    np.testing.assert_array_equal(content(cuda, foreign.address), VALUES * 2)
    with pytest.raises(BufferError):
        device.write(target, VALUES[:2])
    del target
    foreign.free()


class Wrapped:
    """A stream as cuda.core gives it."""

    def __init__(self, number):
        self.number = number

    def __cuda_stream__(self):
        return 0, self.number


@pytest.mark.parametrize("how", ["stream", "wrapped", "event"])
def test_waiting_for_others(device, cuda, how):
    foreign = Foreign(cuda)
    if how == "event":
        cuda._cuEventRecord(foreign.event, foreign.stream)
        device.wait(event=int(foreign.event))
    else:
        number = int(foreign.stream)
        device.wait(stream=number if how == "stream" else Wrapped(number))
    copy = device.copy(DeviceTensor(foreign.address, VALUES.shape, "float32"))
    np.testing.assert_array_equal(device.download(copy), VALUES)
    foreign.free()


@pytest.mark.parametrize("how", ["stream", "event"])
def test_others_wait_for_us(device, cuda, how):
    theirs, event = cuda.external_stream(), cuda.external_event()
    tensor = device.upload(VALUES)
    if how == "stream":
        device.signal(stream=int(theirs))
    else:
        device.signal(event=int(event))
        cuda._cuStreamWaitEvent(theirs, event, 0)
    run(cuda, theirs)
    np.testing.assert_array_equal(content(cuda, tensor.address), VALUES)
    cuda._cuEventDestroy(event)
    cuda._cuStreamDestroy(theirs)


def test_order_costs_no_wait_and_leaves_no_event(device, cuda):
    theirs = cuda.external_stream()
    device.upload(VALUES)
    start = len(cuda.calls)
    device.wait(stream=int(theirs))
    device.signal(stream=int(theirs))
    names = cuda.names(start)
    assert not [name for name in names if "Synchronize" in name]
    assert names.count("cuEventCreate") == names.count("cuEventDestroy") == 2
    cuda._cuStreamDestroy(theirs)


def test_on_the_host_there_is_no_order_to_keep():
    host = HostDevice()
    assert host.wait(stream=7, event=8) is None
    assert host.signal(stream=7, event=8) is None
