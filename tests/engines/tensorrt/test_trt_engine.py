"""`TensorRTEngine` over the simulated GPU: numbers, order of calls, memory, threads, refusals."""

import gc
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from fastface_trt.engines.device import DeviceTensor
from fastface_trt.engines.hardware import cuda_hardware
from fastface_trt.engines.manifest import TensorSpec
from fastface_trt.engines.tensorrt.options import TensorRTOptions
from fastface_trt.engines.tensorrt.plan import PLAN
from fastface_trt.errors import (
    BackendUnavailable,
    EngineFailed,
    EngineMismatch,
    InvalidRequest,
    OutOfMemory,
)
from tests.engines.gpu_double import simulated_gpu
from tests.engines.tensorrt.trt_bench import Bench, rows, run, unet_like
from tests.engines.tiny_models import OUT, expected, write_module

pytestmark = pytest.mark.usefixtures("quick_collections")

FLAVOURS = ["tensorrt", "tensorrt-rtx"]


@pytest.fixture(params=FLAVOURS)
def bench(request, tmp_path):
    with simulated_gpu(request.param) as (cuda, trt):
        made = Bench(tmp_path, request.param, cuda, trt)
        yield made
        gc.collect()
        made.builder.device().close()
        assert cuda.leaks() == []


@pytest.fixture
def rtx(tmp_path):
    with simulated_gpu("tensorrt-rtx") as (cuda, trt):
        yield Bench(tmp_path, "tensorrt-rtx", cuda, trt)


@pytest.fixture
def datacentre(tmp_path):
    with simulated_gpu("tensorrt") as (cuda, trt):
        yield Bench(tmp_path, "tensorrt", cuda, trt)


def test_it_computes_what_the_module_says(bench):
    with bench.open() as engine:
        for seed in range(4):
            x = rows(seed=seed)
            np.testing.assert_allclose(run(engine, x), expected(x), rtol=1e-5)
            on_gpu = engine.device.upload(x)
            np.testing.assert_allclose(run(engine, on_gpu), expected(x), rtol=1e-5)


def test_a_call_waits_for_nothing_and_copies_nothing_back(bench):
    with bench.open() as engine:
        x = engine.device.upload(rows())
        engine(x=x)
        for _ in range(3):
            start = len(bench.cuda.calls)
            engine(x=x)
            names = set(bench.cuda.names(start))
            assert not names & {"cuStreamSynchronize", "cuMemAlloc", "cuMemcpyDtoHAsync"}
            assert "cuMemcpyHtoDAsync" not in names
        assert engine.device.copies.to_host == 0


def test_the_order_of_calls(bench):
    with bench.open() as engine:
        run(engine, rows())
        names = [name for name, _ in bench.trt.calls]
    order = [
        "Runtime.deserialize_cuda_engine",
        "ICudaEngine.create_runtime_config",
        "IRuntimeConfig.set_execution_context_allocation_strategy",
        "ICudaEngine.create_execution_context",
        "IExecutionContext.set_optimization_profile_async",
        "IExecutionContext.set_tensor_address",
        "IExecutionContext.set_device_memory",
        "IExecutionContext.execute_async_v3",
    ]
    places = [names.index(name) for name in order]
    assert places == sorted(places)
    assert names.index("IExecutionContext.set_input_shape") < names.index(
        "IExecutionContext.infer_shapes"
    )


def test_everything_runs_on_the_threads_own_stream(bench):
    with bench.open() as engine:
        run(engine, rows())
        stream = int(engine.device.stream().handle)
    for name, arguments in bench.trt.calls:
        if name.endswith(("execute_async_v3", "set_optimization_profile_async")):
            assert arguments[-1] == stream


def test_tensorrt_is_recorded_once_and_then_replayed(datacentre):
    with datacentre.open() as engine:
        for seed in range(6):
            x = rows(seed=seed)
            np.testing.assert_allclose(run(engine, x), expected(x), rtol=1e-5)
        counts = engine.device.stream().graphs.counts
        assert (counts.captured, counts.replayed, counts.refused) == (1, 5, 0)
    # Once by itself, once into the recording; the replays do not pass through TensorRT.
    assert datacentre.trt.counts()["IExecutionContext.execute_async_v3"] == 2
    assert datacentre.cuda.names().count("cuGraphLaunch") == 5


def test_tensorrt_rtx_records_its_own_graph(rtx):
    with rtx.open() as engine:
        for _ in range(4):
            run(engine, rows())
        assert engine.device.stream().graphs.counts.captured == 0
    strategies = [a for name, a in rtx.trt.calls if name == "IRuntimeConfig.cuda_graph_strategy ="]
    assert strategies == [(rtx.trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE,)]
    assert "cuStreamBeginCapture" not in rtx.cuda.names()


def test_kernels_are_specialised_as_the_builder_was_told(rtx):
    name = "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy ="
    with rtx.open():
        assert name not in rtx.trt.counts()
    rtx.builder.options = TensorRTOptions(kernel_specialization="eager")
    with rtx.open() as engine:
        np.testing.assert_allclose(run(engine, rows()), expected(rows()), rtol=1e-5)
    strategies = rtx.trt.DynamicShapesKernelSpecializationStrategy
    assert [a for called, a in rtx.trt.calls if called == name] == [(strategies.EAGER,)]


def test_every_runtime_has_an_error_recorder(bench):
    with bench.open():
        assert bench.trt.counts()["Runtime.error_recorder ="] == 1


def test_a_run_that_cannot_be_recorded_is_launched_plainly_and_said_once(datacentre):
    datacentre.trt.refuse_capture = True
    with datacentre.open() as engine:
        run(engine, rows())
        with pytest.warns(RuntimeWarning, match="No CUDA graph"):
            np.testing.assert_allclose(run(engine, rows()), expected(rows()), rtol=1e-5)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # once is enough
            np.testing.assert_allclose(run(engine, rows()), expected(rows()), rtol=1e-5)
        assert engine.device.stream().graphs.counts.refused == 1
        assert datacentre.cuda.names().count("cuStreamEndCapture") == 1


def test_a_context_per_profile_and_a_graph_per_shape(datacentre):
    module = unet_like(datacentre.folder / "export")
    p = np.full((1, 3), 2.0, np.float32)
    with datacentre.open(module) as engine:
        for _ in range(3):
            for count in (2, 3, 3, 2):  # the branches of the four steps of a picture
                x = rows(count, seed=count)
                y = engine.device.download(engine(x=x, p=p)["y"])
                np.testing.assert_allclose(y, 6 * x, rtol=1e-6)
        assert datacentre.trt.counts()["ICudaEngine.create_execution_context"] == 2
        assert len(engine.device.stream().graphs) == 2
        assert engine.device.stream().graphs.counts.captured == 2


def test_outputs_are_overwritten_by_the_next_call_and_copies_are_not(bench):
    with bench.open() as engine:
        first = engine(x=rows(seed=1))["y"]
        kept = engine.device.copy(first)
        engine(x=rows(seed=2))
        np.testing.assert_allclose(engine.device.download(kept), expected(rows(seed=1)), rtol=1e-5)
        np.testing.assert_allclose(engine.device.download(first), expected(rows(seed=2)), rtol=1e-5)


def test_shapes_that_were_not_built_say_what_was_and_how_to_build(bench):
    module = unet_like(bench.folder / "export")
    with bench.open(module) as engine, pytest.raises(InvalidRequest) as caught:
        engine(x=rows(6), p=np.zeros((2, 3), np.float32))
    assert "does not run x 6 x 16" in caught.value.message
    assert "x 1 x 16; x 2 x 16; x 3 x 16" in caught.value.message
    assert f"--backend {bench.builder.backend} --requests 2 --branches 3" in caught.value.hint


def test_a_device_tensor_of_another_type_is_refused(bench):
    with bench.open() as engine:
        half = engine.device.upload(rows().astype(np.float16))
        with pytest.raises(EngineMismatch, match=r"float32 and was given float16") as caught:
            engine(x=half)
        assert "Export the model again" in caught.value.hint
        with pytest.raises(InvalidRequest, match=r"shape \(1, 15\)"):
            engine(x=DeviceTensor(0, (1, 15), "float32"))


def test_threads_run_side_by_side(bench):
    with bench.open() as engine:

        def work(seed):
            for step in range(5):
                x = rows(seed=10 * seed + step)
                np.testing.assert_allclose(run(engine, x), expected(x), rtol=1e-5)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(8)))
        assert bench.trt.counts()["ICudaEngine.create_execution_context"] <= 4


def test_engines_of_a_thread_share_one_scratch_memory(bench):
    other = write_module(bench.folder / "export", name="other", factor=3.0)
    with bench.open() as first, bench.open(other) as second:
        for seed in range(3):
            x = rows(seed=seed)
            np.testing.assert_allclose(run(first, x), expected(x), rtol=1e-5)
            np.testing.assert_allclose(run(second, x), expected(x, 3.0), rtol=1e-5)
        assert first.device.stream().scratch.size == 1000
        first.close()
        assert second.device.stream().scratch.size == 1000
        np.testing.assert_allclose(run(second, rows()), expected(rows(), 3.0), rtol=1e-5)
    assert second.device.stream().scratch.size == 0


def test_graphs_go_with_the_scratch_memory_that_they_use(datacentre):
    with datacentre.open() as engine:
        for _ in range(3):
            run(engine, rows())
        stream = engine.device.stream()
        assert len(stream.graphs) == 1
        stream.scratch.get(99, 5000)  # another engine needs more
        assert len(stream.graphs) == 0
        for seed in range(3):
            x = rows(seed=seed)
            np.testing.assert_allclose(run(engine, x), expected(x), rtol=1e-5)
        assert len(stream.graphs) == 1
        stream.scratch.release(99)


def test_loading_twenty_times_gives_all_memory_back(bench):
    device = bench.builder.device()
    held = []
    for seed in range(20):
        with bench.open() as engine:
            for step in range(3):
                run(engine, rows(seed=seed + step))
        gc.collect()
        held.append(bench.cuda.held())
    assert set(held) == {0}
    assert device.held_bytes == 0
    engine.close()  # twice is harmless
    with pytest.raises(EngineFailed, match="engine of affine is closed"):
        engine(x=rows())


def test_closing_from_another_thread_while_calls_run(bench):
    engine = bench.open()

    def call(seed):
        try:
            for step in range(50):
                x = rows(seed=seed + step)
                np.testing.assert_allclose(run(engine, x), expected(x), rtol=1e-5)
        except EngineFailed as error:
            assert "is closed" in error.message  # noqa: PT017
            return "closed"
        return "done"

    # What a call returned is the engine's: a download that loses the race fails, it never crashes.
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(call, 0)
        assert first.result() == "done"
        engine.close()
        assert pool.submit(call, 0).result() == "closed"


def test_too_little_memory_is_said_before_loading(tmp_path):
    with simulated_gpu("tensorrt-rtx", memory=100) as (cuda, trt):
        bench = Bench(tmp_path, "tensorrt-rtx", cuda, trt)
        with pytest.raises(OutOfMemory, match=r"engine of affine needs .* are free") as caught:
            bench.open()
        assert "--weight-streaming" in caught.value.hint
        assert "Runtime.deserialize_cuda_engine" not in trt.counts()


def test_memory_that_runs_out_while_running_is_a_sentence(bench):
    with bench.open() as engine:
        bench.cuda.fail["cuMemAlloc"] = "CUDA_ERROR_OUT_OF_MEMORY"
        with pytest.raises(OutOfMemory, match="out of memory"):
            engine(x=rows())
        np.testing.assert_allclose(run(engine, rows()), expected(rows()), rtol=1e-5)


def test_sticky_errors_say_that_the_process_must_restart(bench):
    with bench.open() as engine:
        run(engine, rows())
        bench.cuda.sticky = "CUDA_ERROR_ILLEGAL_ADDRESS"
        with pytest.raises(EngineFailed, match="no further call in this process") as caught:
            run(engine, rows())
        assert caught.value.hint.startswith("Restart the process")
        bench.cuda.sticky = None


def test_weights_that_may_stream_get_a_budget_before_the_first_context(bench):
    bench.builder.options = TensorRTOptions(weight_streaming=True)
    with bench.open() as engine:
        run(engine, rows())
        names = [name for name, _ in bench.trt.calls]
    budget = names.index("ICudaEngine.weight_streaming_budget_v2 =")
    assert budget < names.index("ICudaEngine.create_execution_context")
    assert ("ICudaEngine.weight_streaming_budget_v2 =", (12345,)) in bench.trt.calls


def test_host_code_stays_forbidden(bench):
    with bench.open():
        pass
    assert not [name for name, _ in bench.trt.calls if "host_code" in name]


def test_a_plan_that_tensorrt_refuses_or_that_does_not_fit(bench):
    manifest, folder = bench.cache.get(bench.module, bench.folder / "export", bench.builder)
    wrong = manifest.module.model_copy(
        update={"outputs": (TensorSpec(name="z", dtype="float16", shape=("batch", OUT)),)}
    )
    with pytest.raises(EngineMismatch, match=r"its outputs are \{'y': 'float32'\}"):
        bench.builder.open(manifest.model_copy(update={"module": wrong}), folder)
    fewer = manifest.model_copy(update={"options": {"profiles": []}})
    with pytest.raises(EngineMismatch, match="it has 1 profiles, expected 0"):
        bench.builder.open(fewer, folder)
    (folder / PLAN).write_bytes(b"not a plan")
    with pytest.raises(EngineMismatch, match="cannot open the engine of affine: magicTag"):
        bench.builder.open(manifest, folder)


def test_without_a_gpu_there_is_one_sentence(bench):
    manifest, folder = bench.cache.get(bench.module, bench.folder / "export", bench.builder)
    cuda_hardware.cache_clear()
    bench.cuda.fail["cuInit"] = "CUDA_ERROR_NO_DEVICE"
    with pytest.raises(BackendUnavailable, match="finds no NVIDIA GPU"):
        bench.builder.open(manifest, folder)
