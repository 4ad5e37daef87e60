"""ONNX Runtime's GPU providers over the simulated GPU: what is bound, recorded, and in what order.

See `gpu_double` for the session. None of this has run on a GPU but what it says of streams.
"""

import gc
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnxruntime
import pytest

from fastface_trt.engines.cache import EngineCache
from fastface_trt.engines.contract import IMAGE_TOKENS
from fastface_trt.engines.kernels import operator_library
from fastface_trt.engines.manifest import ModuleSpec, TensorSpec
from fastface_trt.engines.onnx import forms
from fastface_trt.engines.ort import cuda_engine as onnxruntime_gpu
from fastface_trt.engines.ort.builder import OnnxRuntimeBuilder
from fastface_trt.engines.ort.cuda_engine import output_shapes
from fastface_trt.engines.ort.session import PROVIDERS
from fastface_trt.errors import (
    BackendUnavailable,
    EngineFailed,
    EngineMismatch,
    InvalidRequest,
    UnknownName,
)
from tests.engines.gpu_double import WARM_UPS, Session, simulated_gpu, simulated_onnxruntime
from tests.engines.tiny_models import WIDTH, expected, write_module

pytestmark = pytest.mark.usefixtures("quick_collections")

GPU_PROVIDERS = [provider for provider in PROVIDERS if provider != "cpu"]


@pytest.fixture
def bench(request, tmp_path):
    """How to open an engine, its builder and the simulated GPU; the parameter is the provider."""
    with simulated_gpu() as (cuda, _), simulated_onnxruntime(cuda):
        builder = OnnxRuntimeBuilder(getattr(request, "param", "cuda"))
        module = write_module(tmp_path / "export")

        def opened():
            return EngineCache(tmp_path / "cache").open(module, tmp_path / "export", builder)

        yield opened, builder, cuda
        gc.collect()
        builder.device().close()
        assert cuda.leaks() == []


every_provider = pytest.mark.parametrize("bench", GPU_PROVIDERS, indirect=True)


def rows(count=3, seed=0):
    return np.random.default_rng(seed).standard_normal((count, WIDTH)).astype(np.float32)


def run(engine, x):
    return engine.device.download(engine(x=x)["y"])


@every_provider
def test_it_computes_between_buffers_on_the_gpu(bench):
    opened, _, cuda = bench
    with opened() as engine:
        device = engine.device
        run(engine, rows()), run(engine, rows(2))
        tensor, start, before = device.upload(rows()), len(cuda.calls), device.copies.to_host
        kept = [engine(x=tensor)["y"], engine(x=device.upload(rows(2, seed=1)))["y"]]
        names = set(cuda.names(start))
        assert not names & {"cuStreamSynchronize", "cuMemcpyDtoHAsync", "cuMemAlloc"}
        assert device.copies.to_host == before
        # Unlike those of other GPU engines, outputs are the caller's.
        np.testing.assert_allclose(device.download(kept[0]), expected(rows()), rtol=1e-5)
        np.testing.assert_allclose(device.download(kept[1]), expected(rows(2, 1)), rtol=1e-5)
        np.testing.assert_allclose(run(engine, rows(seed=2)), expected(rows(seed=2)), rtol=1e-5)
        del kept, tensor


@every_provider
def test_the_session_runs_on_a_stream_of_ours_and_never_on_the_cpu(bench):
    opened, builder, cuda = bench
    with opened() as engine:
        device = engine.device
        run(engine, rows())
        session = Session.made[-1]
        assert session.provider == PROVIDERS[builder.provider]
        stream = int(session.options["user_compute_stream"])
        assert stream != int(device.stream().handle)
        cuda.stream_of(stream)
        compiles = builder.provider != "cuda"
        assert (session.no_cpu_nodes == "1") is compiles
        assert session.records is not compiles
    with pytest.raises(EngineFailed, match="engine of affine is closed"):
        engine(x=rows())
    engine.close()  # twice is harmless


@every_provider
def test_a_run_waits_for_its_inputs_whichever_stream_gets_there_first(bench):
    opened, _, cuda = bench
    with opened() as engine:
        y = engine(x=engine.device.upload(rows()))["y"]
        cuda.cuStreamSynchronize(engine._stream)
        np.testing.assert_allclose(engine.device.download(y), expected(rows()), rtol=1e-5)
        del y


@every_provider
def test_threads_take_turns_and_get_their_own(bench):
    opened, _, _ = bench
    with opened() as engine:

        def work(seed):
            for step in range(4):
                x = rows(seed=10 * seed + step)
                np.testing.assert_allclose(run(engine, x), expected(x), rtol=1e-5)

        with ThreadPoolExecutor(3) as pool:
            list(pool.map(work, range(6)))


@every_provider
def test_a_thread_overwrites_nothing_that_anothers_run_still_reads(bench):
    """Its stream may get there first: the one that ran is not waited for before its result is."""
    opened, _, _ = bench
    with opened() as engine, ThreadPoolExecutor(1) as other:
        device = engine.device
        ours = engine(x=rows(seed=1))["y"]
        theirs = other.submit(run, engine, rows(seed=2)).result()
        np.testing.assert_allclose(theirs, expected(rows(seed=2)), rtol=1e-5)
        np.testing.assert_allclose(device.download(ours), expected(rows(seed=1)), rtol=1e-5)
        del ours


@every_provider
def test_a_session_that_does_not_open_leaves_nothing(bench, monkeypatch):
    opened, builder, cuda = bench

    def broken(*arguments, **named):
        raise RuntimeError("no kernel image")

    opened().close()
    held = len(cuda.leaks())
    monkeypatch.setattr(onnxruntime, "InferenceSession", broken)
    with pytest.raises(EngineMismatch, match="no kernel image"):
        opened()
    assert len(cuda.leaks()) == held
    assert builder.backend == f"onnxruntime-{builder.provider}"


def test_a_graph_per_set_of_shapes_is_recorded_once_and_a_change_costs_nothing(bench):
    opened, _, cuda = bench
    with opened() as engine:
        for count in (3, 1, 2):
            run(engine, rows(count))
        session = Session.made[-1]
        made = len(session.runs), len(session.bindings)
        assert made == (3 * (WARM_UPS + 1), 3)
        ids = [graph for _, graph in session.graphs]
        assert sorted(ids) == [1, 2, 3]
        for seed, count in enumerate((1, 3, 2, 3, 1, 1)):
            x = engine.device.upload(rows(count, seed))
            start = len(cuda.calls)
            y = engine(x=x)["y"]
            order = ["cuEventRecord", "cuStreamWaitEvent"]
            assert cuda.names(start) == [
                "cuMemcpyDtoDAsync",  # x into its buffer
                "cuMemAllocFromPoolAsync",
                *order,
                "cuMemcpyDtoDAsync",  # the result out of its own
                *order,
            ]
            np.testing.assert_allclose(
                engine.device.download(y), expected(rows(count, seed)), rtol=1e-5
            )
            del x, y
        assert made == (len(session.runs), len(session.bindings))
        assert engine.device.held_bytes > 0
    assert engine.device.held_bytes == 0


def test_one_thread_makes_all_runs_so_that_graphs_are_recorded_once(bench):
    """ONNX Runtime keeps them per thread, with handles that only the session's end frees."""
    opened, _, _ = bench
    with opened() as engine:
        for _ in range(4):
            with ThreadPoolExecutor(1) as pool:
                pool.submit(run, engine, rows()).result()
        (key,) = Session.made[-1].graphs
        assert key[0] != threading.get_ident()
    assert not [one for one in threading.enumerate() if one.name.startswith("onnxruntime affine")]


def test_other_threads_may_allocate_while_a_graph_is_recorded(bench, monkeypatch):
    opened, _, _ = bench

    with opened() as engine:
        device = engine.device

        def entering():
            with ThreadPoolExecutor(1, initializer=device.enter_thread) as pool:
                pool.submit(device.free, pool.submit(device.allocate, 64).result()).result()

        monkeypatch.setattr(Session, "recording", staticmethod(entering))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            np.testing.assert_allclose(run(engine, rows()), expected(rows()), rtol=1e-5)
        assert len(Session.made[-1].graphs) == 1


def test_a_build_may_allocate_while_a_graph_is_recorded(bench, monkeypatch, tmp_path):
    opened, builder, cuda = bench

    def optimise(self, graph, options):
        error, address = cuda.cuMemAlloc(64)
        assert int(error) == 0
        cuda.cuMemFree(address)
        return real(self, graph, options)

    def building():
        with ThreadPoolExecutor(1) as pool:
            pool.submit(build).result()

    def build():
        module = write_module(tmp_path / "other", factor=3.0)
        EngineCache(tmp_path / "cache").get(module, tmp_path / "other", builder)

    with opened() as engine:
        real = OnnxRuntimeBuilder._optimise
        monkeypatch.setattr(OnnxRuntimeBuilder, "_optimise", optimise)
        monkeypatch.setattr(Session, "recording", staticmethod(building))
        np.testing.assert_allclose(run(engine, rows()), expected(rows()), rtol=1e-5)
        assert len(Session.made[-2].graphs) == 1


def test_a_recording_that_breaks_is_told_and_the_run_made_without(bench, monkeypatch):
    opened, _, cuda = bench
    with opened() as engine:
        device = engine.device

        def foreign():
            """A thread of another library, which knows nothing of recordings."""
            cuda.cuCtxSetCurrent(device._context)
            error, _ = cuda.cuMemAlloc(64)
            assert "CAPTURE" in error.name

        def breaks():
            with ThreadPoolExecutor(1) as pool:
                pool.submit(foreign).result()

        monkeypatch.setattr(Session, "recording", staticmethod(breaks))
        with pytest.warns(RuntimeWarning, match="No CUDA graph of affine.*901"):
            np.testing.assert_allclose(run(engine, rows()), expected(rows()), rtol=1e-5)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # once is enough
            np.testing.assert_allclose(run(engine, rows()), expected(rows()), rtol=1e-5)
            monkeypatch.setattr(Session, "recording", staticmethod(lambda: None))
            np.testing.assert_allclose(run(engine, rows(2)), expected(rows(2)), rtol=1e-5)
        assert len(Session.made[-1].graphs) == 1


def test_a_run_that_fails_says_so_and_frees_its_buffers(bench, monkeypatch):
    opened, _, _ = bench
    with opened() as engine:
        held = engine.device.held_bytes

        def fails(session, binding, run_options):
            raise RuntimeError("CUDA failure 2: out of memory")

        with monkeypatch.context() as patch:
            patch.setattr(Session, "run_with_iobinding", fails)
            with pytest.raises(EngineFailed, match=r"failed in affine.*out of memory"):
                engine(x=rows())
        assert engine.device.held_bytes == held
        np.testing.assert_allclose(run(engine, rows()), expected(rows()), rtol=1e-5)


def test_a_graph_that_cannot_be_recorded_is_told_once_and_opened_without(bench, monkeypatch):
    opened, _, _ = bench
    monkeypatch.setattr(Session, "refusal", "the model has control flow nodes")
    with pytest.warns(RuntimeWarning) as told:
        engine = opened()
    assert [str(one.message) for one in told] == [
        "No CUDA graph of affine, launching kernels one by one: the model has control flow nodes."
    ]
    with engine, warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_allclose(run(engine, rows()), expected(rows()), rtol=1e-5)
        assert not engine.captures
        assert "enable_cuda_graph" not in Session.made[-1].options


def test_only_so_many_sets_of_shapes_keep_a_graph_or_buffers(bench, monkeypatch):
    opened, _, _ = bench
    monkeypatch.setattr(onnxruntime_gpu, "_KEPT", 2)
    with opened() as engine:
        for count in (1, 2):
            run(engine, rows(count))
        held = engine.device.held_bytes
        with pytest.warns(RuntimeWarning, match="it has 2, for as many sets of shapes"):
            run(engine, rows(3))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run(engine, rows(4))
            made = len(Session.made[-1].runs)
            run(engine, rows(2))  # what has a graph stays in preference
            assert len(Session.made[-1].runs) == made
            for count in (4, 5, 1, 3):
                np.testing.assert_allclose(run(engine, rows(count)), expected(rows(count)), 1e-5)
        assert engine.device.held_bytes <= 3 * held
        assert len(engine._bound) == 2
        assert len(Session.made[-1].graphs) == 2


def test_how_a_session_is_opened(bench):
    opened, builder, _ = bench
    opened().close()
    options, session_options = Session.made[-1].options, Session.made[-1].session_options
    assert options["cudnn_conv_algo_search"] == "HEURISTIC"
    assert options["arena_extend_strategy"] == "kSameAsRequested"
    assert options["use_tf32"] == "0"
    entry = "session.use_device_allocator_for_initializers"
    assert session_options.get_session_config_entry(entry) == "1"
    assert not session_options.enable_mem_pattern
    builder.provider_options = {"use_tf32": "1", "gpu_mem_limit": "9000000000"}
    opened().close()
    changed = Session.made[-1].options
    assert (changed["use_tf32"], changed["gpu_mem_limit"]) == ("1", "9000000000")
    assert changed["cudnn_conv_algo_search"] == "HEURISTIC"
    builder.provider_options = {"enable_cuda_graph": "0"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # who asks for it need not be told
        with opened() as engine:
            np.testing.assert_allclose(run(engine, rows()), expected(rows()), rtol=1e-5)
    assert "enable_cuda_graph" not in Session.made[-1].options


def test_provider_options_are_checked_before_anything_is_built():
    given = {"cudnn_conv_algo_search": "DEFAULT", "use_tf32": True, "gpu_mem_limit": 5}
    assert OnnxRuntimeBuilder("cuda", provider_options=given).provider_options == {
        "cudnn_conv_algo_search": "DEFAULT",
        "use_tf32": "1",
        "gpu_mem_limit": "5",
    }
    for provider, options, error, match in (
        (
            "cuda",
            {"cudnn_conv_algo_serch": "DEFAULT"},
            UnknownName,
            "mean 'cudnn_conv_algo_search'",
        ),
        ("cuda", {"user_compute_stream": "1"}, InvalidRequest, "set by the engine itself"),
        ("cuda", {"cudnn_conv_algo_search": "BEST"}, InvalidRequest, "EXHAUSTIVE, HEURISTIC"),
        ("cuda", {"gpu_mem_limit": "8 GB"}, InvalidRequest, "whole number"),
        ("cpu", {"use_tf32": "1"}, InvalidRequest, "onnxruntime takes no provider options"),
    ):
        with pytest.raises(error, match=match):
            OnnxRuntimeBuilder(provider, provider_options=options)


@pytest.fixture
def unet(tmp_path):
    """The spec of a module with image tokens, whatever it computes."""
    module = write_module(tmp_path / "unet")
    tokens = TensorSpec(name=IMAGE_TOKENS, dtype="float16", shape=("batch", 4, 16))
    return module.model_copy(update={"inputs": (*module.inputs, tokens)})


def status(available):
    return lambda architecture=None: operator_library.LibraryStatus(available, "", "")


def test_what_makes_another_engine(unet, monkeypatch):
    builder = OnnxRuntimeBuilder("cuda")
    affine = unet.model_copy(update={"inputs": unet.inputs[:1]})

    def options(module=unet, **given):
        return OnnxRuntimeBuilder("cuda", provider_options=given).identity(module)["options"]

    monkeypatch.setattr(operator_library, "library_status", status(True))
    with_operator = options()
    assert with_operator["manipulation"] == "operator"
    assert options(prefer_nhwc="1") != with_operator
    assert options(cudnn_conv_algo_search="DEFAULT", enable_cuda_graph="0") == with_operator
    assert "manipulation" not in options(affine)
    for name, value in (("LIBRARY_VERSION", "another"), ("library_status", status(False))):
        with monkeypatch.context() as patch:
            patch.setattr(operator_library, name, value)
            assert options() != with_operator
            assert options(affine) == builder.identity(affine)["options"]
    monkeypatch.setattr(forms, "VERSION", -1)
    assert options() != with_operator
    assert options(affine)["form"] == -1


@pytest.mark.parametrize("provider", GPU_PROVIDERS)
def test_a_provider_that_is_not_there_says_so(provider, tmp_path):
    if PROVIDERS[provider] in onnxruntime.get_available_providers():
        pytest.skip("this machine has it")
    module = write_module(tmp_path / "export")
    with pytest.raises(BackendUnavailable, match=f"has no {PROVIDERS[provider]}") as caught:
        EngineCache(tmp_path).open(module, tmp_path / "export", OnnxRuntimeBuilder(provider))
    assert caught.value.hint


def test_output_shapes_follow_from_named_sizes():
    spec = ModuleSpec.model_construct(
        name="vae",
        inputs=(TensorSpec(name="x", dtype="float32", shape=("batch", 4, "height", "width")),),
        outputs=(TensorSpec(name="y", dtype="float32", shape=("batch", 3, "8*height", "8*width")),),
        files=(),
    )
    assert output_shapes(spec, {"x": (2, 4, 5, 6)}) == {"y": (2, 3, 40, 48)}
