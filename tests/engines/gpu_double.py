"""Puts the simulated GPU in place of the real driver and bindings, for one test.

ONNX Runtime's session on it is a double that computes on the CPU between bound buffers, when its
stream gets there; what it is called with is checked against the signatures of the installed one.
"""

import inspect
import sys
import threading
from contextlib import contextmanager, suppress
from math import prod

import numpy as np
import onnxruntime
import pytest

from fastface_trt.engines import hardware
from fastface_trt.engines.ort.builder import OnnxRuntimeBuilder
from fastface_trt.engines.ort.session import PROVIDERS
from fastface_trt.engines.tensorrt.builder import TensorRTBuilder
from tests.engines.fake_cuda import FakeCuda
from tests.engines.fake_tensorrt import FakeTensorRT, write_stand_in
from tests.engines.onnx.spelled_out import spelled_out

with suppress(ImportError):  # while the simulated driver is in place of the real, it does not
    import cuda.bindings.nvrtc  # noqa: F401


@contextmanager
def simulated_gpu(flavour="tensorrt-rtx", **properties):
    """The simulated driver and the simulated binding of `flavour`; builds write stand-in plans.

    Everything else, from backends to buffers, is the code that runs on a GPU.
    """
    cuda = FakeCuda(**properties)
    trt = FakeTensorRT(cuda, flavour)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "cuda.bindings.driver", cuda)
        patch.setitem(sys.modules, flavour.replace("-", "_"), trt)
        patch.setattr(
            TensorRTBuilder,
            "build",
            lambda self, module, source, target, progress: write_stand_in(
                self.options, module, source, target
            ),
        )
        _forget_hardware()
        try:
            yield cuda, trt
        finally:
            _forget_hardware()


def _forget_hardware():
    for remembered in (
        hardware.cuda_hardware,
        hardware.cuda_driver,
        hardware.cuda_device_count,
    ):
        remembered.cache_clear()


REAL_SESSION = onnxruntime.InferenceSession
WARM_UPS = 2
"""Runs that ONNX Runtime makes before it records one."""


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
    """Runs on the CPU what was bound on the simulated GPU, on the stream of its options.

    With `enable_cuda_graph` it does what the CUDA provider does: graphs belong to the thread that
    runs the session and to `gpu_graph_id`, are recorded in the mode that forbids all other threads
    to allocate, and replay the addresses that were bound when they were recorded.
    """

    cuda = None
    made = ()
    refusal = ""
    """Why a session with `enable_cuda_graph` is refused."""
    recording = staticmethod(lambda: None)
    """Called in the middle of a recording."""

    def __init__(self, graph, options, *, providers, enable_fallback):
        ((self.provider, self.options),) = providers
        self.no_cpu_nodes = _entry(options, "session.disable_cpu_ep_fallback")
        self.session_options = options
        assert enable_fallback == 0
        self.records = self.options.get("enable_cuda_graph") == "1"
        if self.records and self.refusal:
            raise RuntimeError(
                "[ONNXRuntimeError] : 1 : FAIL : This session cannot use the graph capture feature "
                f"as requested by the user  as {self.refusal}"
            )
        # Where the CPU would be refused as a fallback, the options say so.
        real = None if self.no_cpu_nodes else options
        self.real = REAL_SESSION(graph, real, providers=["CPUExecutionProvider"])
        self.runs, self.bindings, self.graphs = [], [], {}
        type(self).made += (self,)

    def get_providers(self):
        return [self.provider, "CPUExecutionProvider"]

    def get_inputs(self):
        return self.real.get_inputs()

    def get_outputs(self):
        return self.real.get_outputs()

    def io_binding(self):
        self.bindings.append(Binding())
        return self.bindings[-1]

    def run_with_iobinding(self, binding, run_options):
        assert run_options.get_run_config_entry("disable_synchronize_execution_providers") == "1"
        assert self.options["has_user_compute_stream"] == "1"
        stream = self.cuda.stream_of(int(self.options["user_compute_stream"]))
        graph = int(run_options.get_run_config_entry("gpu_graph_id")) if self.records else -1
        if graph == -1:
            self._run(binding, stream)
            return
        key = (threading.get_ident(), graph)
        if key not in self.graphs:
            for _ in range(WARM_UPS):
                self._run(binding, stream)
            self.graphs[key] = self._record(binding, stream)
        for work in self.graphs[key]:
            self.cuda.submit(stream, work)

    def _record(self, binding, stream):
        self.cuda.record(stream, strict=True)
        try:
            self._run(binding, stream)
            self.recording()
        finally:
            work, stream.recording, stream.recorder = stream.recording, None, None
        if stream.broken:
            raise RuntimeError("CUDA failure 901: previous error during capture")
        return work

    def _run(self, binding, stream):
        self.runs.append(binding)
        ins, outs = (dict(binding.bound[side]) for side in ("in", "out"))

        def tensor(call):
            size = prod(call["shape"]) * np.dtype(call["element_type"]).itemsize
            content = self.cuda.read(call["buffer_ptr"], size)
            return content.view(call["element_type"]).reshape(call["shape"])

        def run():
            feed = {name: tensor(call).copy() for name, call in ins.items()}
            for name, result in zip(outs, self.real.run(list(outs), feed), strict=True):
                tensor(outs[name])[...] = result

        self.cuda.submit(stream, run)


class EitherSession:
    """What `InferenceSession` is meanwhile: the real one on the CPU, the double elsewhere."""

    def __new__(cls, graph, options=None, *, providers, **named):
        on_cpu = providers[0] in ("CPUExecutionProvider", ("CPUExecutionProvider", {}))
        kind = REAL_SESSION if on_cpu else Session
        return kind(graph, options, providers=providers, **named)


@contextmanager
def simulated_onnxruntime(cuda):
    """ONNX Runtime's GPU providers on the simulated GPU.

    Graphs are optimised for the CPU, with its operators in place of those that only CUDA has.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"cuda": cuda, "made": (), "refusal": ""}.items():
            patch.setattr(Session, name, value)
        patch.setattr(onnxruntime, "InferenceSession", EitherSession)
        patch.setattr(onnxruntime, "get_available_providers", lambda: list(PROVIDERS.values()))
        patch.setattr(OnnxRuntimeBuilder, "_optimise", _optimise)
        yield Session


def _optimise(builder, graph, options):
    model = spelled_out(graph) if isinstance(graph, bytes) else str(graph)
    return REAL_SESSION(model, options, providers=["CPUExecutionProvider"])


def _entry(options, name):
    try:
        return options.get_session_config_entry(name)
    except RuntimeError:
        return None
