"""ONNX Runtime's GPU providers over the simulated GPU: what is bound, on which stream, in order.

The session is a double that computes on the CPU between bound buffers, when its stream gets there;
what it is called with is checked against the signatures of the installed ONNX Runtime.
"""

import gc
import inspect
from concurrent.futures import ThreadPoolExecutor
from math import prod

import numpy as np
import onnxruntime
import pytest
from gpu_double import simulated_gpu
from tiny_models import WIDTH, expected, write_module

from fastface_trt.engines.cache import EngineCache
from fastface_trt.engines.manifest import ModuleSpec, TensorSpec
from fastface_trt.engines.onnxruntime import OnnxRuntimeBuilder
from fastface_trt.engines.onnxruntime_gpu import output_shapes
from fastface_trt.engines.onnxruntime_session import PROVIDERS
from fastface_trt.errors import BackendUnavailable, EngineFailed, EngineMismatch

pytestmark = pytest.mark.usefixtures("quick_collections")

GPU_PROVIDERS = [provider for provider in PROVIDERS if provider != "cpu"]
REAL_SESSION = onnxruntime.InferenceSession


class Binding:
    def __init__(self):
        self.bound = {"in": {}, "out": {}}

    def _bind(self, side, real, arguments):
        call = inspect.signature(real).bind(None, **arguments).arguments
        assert call["device_type"] == "cuda"
        self.bound[side][call["name"]] = call

    def bind_input(self, **arguments):
        self._bind("in", onnxruntime.IOBinding.bind_input, arguments)

    def bind_output(self, **arguments):
        self._bind("out", onnxruntime.IOBinding.bind_output, arguments)


class Session:
    """Runs on the CPU what was bound on the simulated GPU, on the stream of its options."""

    cuda = None
    made = ()

    def __init__(self, graph, options, *, providers, enable_fallback):
        ((self.provider, self.options),) = providers
        self.no_cpu_nodes = _entry(options, "session.disable_cpu_ep_fallback")
        assert enable_fallback == 0
        self.real = REAL_SESSION(graph, providers=["CPUExecutionProvider"])
        self.runs = []
        type(self).made += (self,)

    def get_providers(self):
        return [self.provider, "CPUExecutionProvider"]

    def get_inputs(self):
        return self.real.get_inputs()

    def get_outputs(self):
        return self.real.get_outputs()

    def io_binding(self):
        return Binding()

    def run_with_iobinding(self, binding, run_options):
        entry = "disable_synchronize_execution_providers"
        assert run_options.get_run_config_entry(entry) == "1"
        assert self.options["has_user_compute_stream"] == "1"
        stream = self.cuda.stream_of(int(self.options["user_compute_stream"]))
        self.runs.append(binding)

        def tensor(call):
            size = prod(call["shape"]) * np.dtype(call["element_type"]).itemsize
            content = self.cuda.read(call["buffer_ptr"], size)
            return content.view(call["element_type"]).reshape(call["shape"])

        def run():
            feed = {name: tensor(call).copy() for name, call in binding.bound["in"].items()}
            names = list(binding.bound["out"])
            for name, result in zip(names, self.real.run(names, feed), strict=True):
                tensor(binding.bound["out"][name])[...] = result

        self.cuda.submit(stream, run)


def _entry(options, name):
    try:
        return options.get_session_config_entry(name)
    except RuntimeError:
        return None


@pytest.fixture(params=GPU_PROVIDERS)
def bench(request, tmp_path, monkeypatch):
    with simulated_gpu() as (cuda, _):
        monkeypatch.setattr(Session, "cuda", cuda)
        monkeypatch.setattr(Session, "made", ())
        monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
        monkeypatch.setattr(
            onnxruntime, "get_available_providers", lambda: list(PROVIDERS.values())
        )
        monkeypatch.setattr(
            OnnxRuntimeBuilder, "_optimise", lambda self, graph, options: _optimised(graph, options)
        )
        builder = OnnxRuntimeBuilder(request.param)
        module = write_module(tmp_path / "export")

        def opened():
            return EngineCache(tmp_path / "cache").open(module, tmp_path / "export", builder)

        yield opened, builder, cuda
        gc.collect()
        builder.device().close()
        assert cuda.leaks() == []


def _optimised(graph, options):
    """The CUDA provider optimises with a session of its own; here the CPU's writes the graph."""
    return REAL_SESSION(str(graph), options, providers=["CPUExecutionProvider"])


def rows(count=3, seed=0):
    return np.random.default_rng(seed).standard_normal((count, WIDTH)).astype(np.float32)


def test_it_computes_between_buffers_on_the_gpu(bench):
    opened, _, cuda = bench
    with opened() as engine:
        device = engine.device
        tensor = device.upload(rows())
        start = len(cuda.calls)
        kept = [engine(x=tensor)["y"], engine(x=device.upload(rows(2, seed=1)))["y"]]
        names = set(cuda.names(start))
        assert not names & {"cuStreamSynchronize", "cuMemcpyDtoHAsync", "cuMemAlloc"}
        assert device.copies.to_host == 0
        # Unlike those of other GPU engines, outputs are the caller's.
        np.testing.assert_allclose(device.download(kept[0]), expected(rows()), rtol=1e-5)
        np.testing.assert_allclose(device.download(kept[1]), expected(rows(2, 1)), rtol=1e-5)
        np.testing.assert_allclose(
            device.download(engine(x=rows(seed=2))["y"]), expected(rows(seed=2)), rtol=1e-5
        )
        del kept, tensor


def test_the_session_runs_on_a_stream_of_ours_and_never_on_the_cpu(bench):
    opened, builder, cuda = bench
    with opened() as engine:
        device = engine.device
        device.download(engine(x=rows())["y"])
        session = Session.made[-1]
        assert session.provider == PROVIDERS[builder.provider]
        stream = int(session.options["user_compute_stream"])
        assert stream != int(device.stream().handle)
        cuda.stream_of(stream)
        compiles = builder.provider != "cuda"
        assert (session.no_cpu_nodes == "1") is compiles
    with pytest.raises(EngineFailed, match="engine of affine is closed"):
        engine(x=rows())
    engine.close()  # twice is harmless


def test_a_run_waits_for_its_inputs_whichever_stream_gets_there_first(bench):
    opened, _, cuda = bench
    with opened() as engine:
        y = engine(x=engine.device.upload(rows()))["y"]
        cuda.cuStreamSynchronize(engine._stream)
        np.testing.assert_allclose(engine.device.download(y), expected(rows()), rtol=1e-5)
        del y


def test_threads_take_turns_and_get_their_own(bench):
    opened, _, _ = bench
    with opened() as engine:

        def work(seed):
            for step in range(4):
                x = rows(seed=10 * seed + step)
                y = engine.device.download(engine(x=x)["y"])
                np.testing.assert_allclose(y, expected(x), rtol=1e-5)

        with ThreadPoolExecutor(3) as pool:
            list(pool.map(work, range(6)))


def test_a_session_that_does_not_open_leaves_nothing(bench, monkeypatch):
    opened, builder, cuda = bench

    def broken(*arguments, **named):
        raise RuntimeError("no kernel image")

    manifest_made = opened()
    manifest_made.close()
    held = len(cuda.leaks())
    monkeypatch.setattr(onnxruntime, "InferenceSession", broken)
    with pytest.raises(EngineMismatch, match="no kernel image"):
        opened()
    assert len(cuda.leaks()) == held
    assert builder.backend == f"onnxruntime-{builder.provider}"


@pytest.mark.parametrize("provider", GPU_PROVIDERS)
def test_a_provider_that_is_not_there_says_so(provider, tmp_path):
    if PROVIDERS[provider] in onnxruntime.get_available_providers():
        pytest.skip("this machine has it")
    module = write_module(tmp_path / "export")
    with pytest.raises(BackendUnavailable, match=f"has no {PROVIDERS[provider]}") as caught:
        EngineCache(tmp_path).open(module, tmp_path / "export", OnnxRuntimeBuilder(provider))
    assert caught.value.mend


def test_output_shapes_follow_from_named_sizes():
    spec = ModuleSpec.model_construct(
        name="vae",
        inputs=(TensorSpec(name="x", dtype="float32", shape=("batch", 4, "height", "width")),),
        outputs=(TensorSpec(name="y", dtype="float32", shape=("batch", 3, "8*height", "8*width")),),
        files=(),
    )
    assert output_shapes(spec, {"x": (2, 4, 5, 6)}) == {"y": (2, 3, 40, 48)}
