"""`CudaDevice` over the simulated driver: tensors, streams of threads, memory, and every error."""

import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from fastface_trt.engines.cuda.device import CudaDevice, SharedDevice
from fastface_trt.engines.cuda.graphs import GraphKey
from fastface_trt.engines.device import DeviceLost, DeviceTensor, HostDevice
from fastface_trt.errors import BackendUnavailable, EngineFailed, EngineMismatch, OutOfMemory
from tests.engines.gpu_double import simulated_gpu

pytestmark = pytest.mark.usefixtures("quick_collections")


def random(*shape, dtype="float32", seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int64", "int32"])
def test_arrays_come_back_as_they_went(device, dtype):
    for shape in ((3, 5), (7,), (), (0, 4)):
        array = (100 * random(*shape)).astype(dtype)
        tensor = device.upload(array)
        assert (tensor.shape, tensor.dtype) == (shape, dtype)
        np.testing.assert_array_equal(device.download(tensor), array)
    strided = (100 * random(6, 4)).astype(dtype).T[::2]
    np.testing.assert_array_equal(device.download(device.upload(strided)), strided)


def test_an_uploaded_array_may_be_changed_at_once(device):
    """The copy to the GPU runs later; only the simulation's queue knows how much later."""
    array = random(8)
    kept = array.copy()
    tensor = device.upload(array)
    array[:] = 0
    np.testing.assert_array_equal(device.download(tensor), kept)


def test_staging_memory_is_not_overwritten_by_later_uploads(device, cuda):
    arrays = [random(300_000, seed=seed) for seed in range(12)]  # more than the first 4 MB
    tensors = [device.upload(array) for array in arrays]
    for tensor, array in zip(tensors, arrays, strict=True):
        np.testing.assert_array_equal(device.download(tensor), array)
    big = random(3_000_000)  # more than all of it
    np.testing.assert_array_equal(device.download(device.upload(big)), big)


def test_every_operation_is_that_of_numpy(device):
    host = HostDevice()
    a, b, c = (random(3, 4, seed=seed) for seed in range(3))
    on = [device.upload(x) for x in (a, b, c)]
    np.testing.assert_array_equal(device.download(device.stack(on)), host.stack([a, b, c]))
    np.testing.assert_array_equal(
        device.download(device.stack([on[0], b, on[0]])), host.stack([a, b, a])
    )
    wide = device.concatenate_last([on[0], b[:, :2], on[2]])
    np.testing.assert_array_equal(device.download(wide), host.concatenate_last([a, b[:, :2], c]))
    np.testing.assert_array_equal(
        device.download(device.zeros((2, 3), "float16")), np.zeros((2, 3))
    )
    np.testing.assert_array_equal(device.download(on[1][2]), b[2])
    assert [t.shape for t in on[1]] == [(4,)] * 3
    assert host.copies.to_host == 0


def test_a_download_fills_what_it_is_given(device):
    array = random(3, 4)
    for at, tensor in ((device, device.upload(array)), (device, array), (HostDevice(), array)):
        memory = np.zeros((3, 4), np.float32)
        assert at.download(tensor, memory) is memory
        np.testing.assert_array_equal(memory, array)
    for wrong in (
        np.zeros((4, 3), np.float32),
        np.zeros((3, 4), np.float64),
        np.zeros((3, 8), np.float32)[:, ::2],
    ):
        with pytest.raises(ValueError, match="is no float32"):
            device.download(device.upload(array), wrong)


def test_a_copy_is_independent(device):
    array = random(4)
    original = device.upload(array)
    copy = device.copy(original)
    device.copy_into(original, np.zeros(4, np.float32))
    np.testing.assert_array_equal(device.download(copy), array)


def test_copies_are_counted_as_the_driver_sees_them(device, cuda):
    start = len(cuda.calls)
    tensor = device.upload(random(10))
    device.download(device.stack([tensor, tensor]))
    names = cuda.names(start)
    counted = device.copies
    assert (counted.to_device, counted.to_device_bytes) == (1, 40)
    assert (counted.to_host, counted.to_host_bytes) == (1, 80)
    assert names.count("cuMemcpyHtoDAsync") == 1
    assert names.count("cuMemcpyDtoHAsync") == 1


def test_dropped_tensors_are_freed_in_the_streams_order_and_nothing_waits(device, cuda):
    tensor = device.upload(random(1000))
    before = cuda.held()
    start = len(cuda.calls)
    doubled = device.stack([tensor, tensor])
    del tensor
    other = device.zeros((1,), "float32")
    names = cuda.names(start)
    assert "cuMemFreeAsync" in names
    assert not {"cuStreamSynchronize", "cuMemAlloc", "cuMemFree"} & set(names)
    assert device.download(doubled).shape == (2, 1000)
    del doubled, other
    device.synchronize()
    device.synchronize()
    assert cuda.held() == before - 4000


def test_dropping_a_tensor_makes_no_call(device, cuda):
    """It may happen on any thread, and while a graph is recorded."""
    tensor = device.upload(random(4))
    device.synchronize()
    start = len(cuda.calls)
    del tensor
    gc.collect()
    assert cuda.names(start) == []


def test_each_thread_has_a_stream_and_results_are_its_own(device):
    barrier = threading.Barrier(4)

    def work(seed):
        barrier.wait()
        mine = [random(64, seed=100 * seed + step) for step in range(20)]
        tensors = [device.upload(array) for array in mine]
        stacked = device.download(device.stack(tensors))
        np.testing.assert_array_equal(stacked, np.stack(mine))
        return device.stream().handle

    with ThreadPoolExecutor(4) as pool:
        streams = list(pool.map(work, range(4)))
    assert len({int(stream) for stream in streams}) == 4


def test_a_new_thread_takes_over_the_stream_of_one_that_ended(device):
    device.synchronize()
    seen = []
    for _ in range(5):
        thread = threading.Thread(target=lambda: seen.append(device.stream()))
        thread.start()
        thread.join()
    assert len(set(seen)) == 1
    assert seen[0] is not device.stream()


def test_a_tensor_of_another_thread_outlives_its_last_name_while_it_is_read(device, cuda):
    """Freed in its own stream's order, it would be gone before the reader's queue gets there."""
    array = random(16)
    with ThreadPoolExecutor(1) as other:
        shared = [other.submit(lambda: (device.upload(array), device.synchronize())[0]).result()]
        copy = device.copy(shared[0])  # queued here
        shared.clear()
        other.submit(device.synchronize).result()
        other.submit(lambda: device.zeros((1,), "float32")).result()
        other.submit(device.synchronize).result()
        np.testing.assert_array_equal(device.download(copy), array)


def test_buffers_of_engines_are_accounted_for(device, cuda):
    address = device.allocate(5000)
    assert device.held_bytes == 5000
    device.free(address)
    device.free(address)  # a second time is harmless
    assert device.held_bytes == 0
    assert cuda.names().count("cuMemFree") == 1


def test_scratch_memory_is_one_piece_as_large_as_the_largest_need(device, cuda):
    scratch = device.stream().scratch
    first, size = scratch.get(1, 1000)
    assert size == 1000
    assert scratch.get(2, 700) == (first, 1000)
    assert scratch.growth(1500) == 500
    second, size = scratch.get(2, 3000)
    assert (size, scratch.get(1, 1000)) == (3000, (second, 3000))
    assert device.held_bytes == 3000
    scratch.release(2)  # nobody needs 3000 any more
    assert scratch.get(1, 1000)[1] == 1000
    scratch.release(1)
    assert scratch.size == 0


def test_too_little_memory_is_said_before_anything_is_allocated():
    with simulated_gpu(memory=8 * 2**30) as (cuda, _):
        device = CudaDevice()
        start = len(cuda.calls)
        with pytest.raises(OutOfMemory) as caught:
            device.require(int(11.2 * 2**30), "The engine of unet", "Use less.")
        assert caught.value.message == (
            "The engine of unet needs 11.2 GB of GPU memory, 8.0 GB are free."
        )
        assert caught.value.hint == "Use less."
        assert not [name for name in cuda.names(start) if "Alloc" in name]
        device.require(2**30, "The engine of unet", "")
        device.close()
        assert cuda.leaks() == []


def test_closing_frees_everything_and_twice_is_harmless(cuda):
    shared = SharedDevice()
    device = shared.get()
    assert shared.get() is device
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: device.download(device.upload(random(9))), range(6)))
    device.allocate(100)
    device.stream().scratch.get(1, 100)
    device.close()
    device.close()
    assert cuda.leaks() == []
    with pytest.raises(EngineFailed, match="closed"):
        device.upload(random(3))
    again = shared.get()
    assert again is not device
    again.close()


def test_types_that_no_engine_takes_are_named(device):
    with pytest.raises(EngineMismatch, match="float64"):
        device.upload(random(3).astype("float64"))
    with pytest.raises(EngineMismatch, match="float16 and float32"):
        device.concatenate_last([random(3, dtype="float16"), random(3)])


@pytest.mark.parametrize(
    ("code", "error", "words"),
    [
        ("CUDA_ERROR_ILLEGAL_ADDRESS", DeviceLost, "no further call in this process"),
        ("CUDA_ERROR_LAUNCH_FAILED", DeviceLost, "Restart the process"),
        ("CUDA_ERROR_OUT_OF_MEMORY", OutOfMemory, "out of memory"),
        ("CUDA_ERROR_INVALID_VALUE", EngineFailed, "CUDA_ERROR_INVALID_VALUE in cuMemcpyHtoD"),
    ],
)
def test_errors_are_sentences(device, cuda, code, error, words):
    cuda.fail["cuMemcpyHtoDAsync"] = code
    with pytest.raises(error, match=words) as caught:
        device.upload(random(3))
    assert type(caught.value) is error
    assert caught.value.hint


def test_without_a_driver_or_a_gpu(monkeypatch):
    with simulated_gpu() as (cuda, _):
        cuda.fail["cuDeviceGet"] = "CUDA_ERROR_NO_DEVICE"
        with pytest.raises(EngineFailed, match="NO_DEVICE"):
            CudaDevice()
        cuda.fail["cuInit"] = "CUDA_ERROR_NO_DEVICE"
        with pytest.raises(BackendUnavailable, match="NO_DEVICE") as caught:
            CudaDevice()
        assert "onnxruntime" in caught.value.hint


def test_the_double_refuses_what_the_real_binding_does_not_have(cuda):
    with pytest.raises(AttributeError):
        cuda.cuMemcpyHtoDAsynch  # noqa: B018
    with pytest.raises(TypeError, match="takes 4 arguments"):
        cuda.cuMemcpyHtoDAsync(1, 2, 3)
    with pytest.raises(NotImplementedError):
        cuda.cuTexRefCreate()


def test_the_double_notices_wrong_addresses(device):
    wild = DeviceTensor(0x1234, (4,), "float32")
    with pytest.raises(EngineFailed, match="ILLEGAL_ADDRESS"):
        device.copy(wild)


def test_a_graph_is_recorded_replayed_and_forgotten_before_its_memory_goes(device, cuda):
    stream = device.stream()
    source, target = device.upload(random(4)), device.zeros((4,), "float32")
    key = GraphKey(7, 0, ((4,),), (source.address, target.address))
    assert not stream.graphs.replay(key)
    assert stream.graphs.capture(key, lambda: device.copy_into(target, source))
    np.testing.assert_array_equal(device.download(target), device.download(source))
    device.copy_into(source, np.ones(4, np.float32))
    assert stream.graphs.replay(key)
    np.testing.assert_array_equal(device.download(target), 1)
    assert cuda.names().count("cuGraphLaunch") == 2
    stream.graphs.forget(address=target.address)
    assert not stream.graphs.replay(key)
    assert len(stream.graphs) == 0
