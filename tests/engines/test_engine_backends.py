"""The registry of backends and what `doctor` says about each."""

import importlib.metadata
import subprocess
import sys
import types

import onnxruntime
import pytest

from fastface_trt.engines import backends
from fastface_trt.engines.backends import builder_for, probe_backends
from fastface_trt.engines.ort import session as onnxruntime_session
from fastface_trt.errors import UnknownName, install_hint

ADA = {"gpu": "NVIDIA RTX 4090", "compute_capability": "8.9"}
HOPPER = {"gpu": "NVIDIA H100", "compute_capability": "9.0"}


def status(name):
    return next(status for status in probe_backends() if status.name == name)


class Installed:
    def __init__(self, name, version):
        self.metadata = {"Name": name}
        self.version = version


def pretend(monkeypatch, *names):
    packages = [Installed(name, "9.9") for name in names]
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: packages)


def test_builders_by_name():
    builder = builder_for("onnxruntime", threads=2)
    assert (builder.backend, builder.threads) == ("onnxruntime", 2)
    assert builder_for("onnxruntime-cuda").backend == "onnxruntime-cuda"
    with pytest.raises(UnknownName, match="Did you mean 'onnxruntime'"):
        builder_for("onxruntime")
    for name in ("tensorrt", "tensorrt-rtx"):
        assert builder_for(name).backend == name


def test_every_backend_has_a_status_and_every_failure_a_hint():
    found = probe_backends()
    assert [s.name for s in found] == list(backends.BACKENDS)
    assert all(s.works or s.hint for s in found)
    cpu = status("onnxruntime")
    assert cpu.works
    assert cpu.version == onnxruntime.__version__


class CudaSession:
    """A session of the CUDA provider, as far as a probe looks."""

    providers = ("CUDAExecutionProvider", "CPUExecutionProvider")

    def __init__(self, *_, **__):
        pass

    def get_providers(self):
        return list(self.providers)

    def run(self, names, inputs):
        return [inputs["x"] ** 2]


@pytest.fixture
def with_cuda(monkeypatch):
    """An onnxruntime with the CUDA provider, and a GPU."""
    listed = list(CudaSession.providers)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: listed)
    monkeypatch.setattr(onnxruntime, "InferenceSession", CudaSession)
    for module in (backends, onnxruntime_session):
        monkeypatch.setattr(module, "cuda_hardware", lambda: HOPPER)


def test_cuda_works_when_a_kernel_of_it_ran(with_cuda, monkeypatch):
    assert status("onnxruntime-cuda").works
    assert f"CUDAExecutionProvider (onnxruntime {onnxruntime.__version__}) on NVIDIA H100" in (
        status("onnxruntime-cuda").detail
    )

    def no_kernel(self, names, inputs):
        raise RuntimeError("cudaErrorNoKernelImageForDevice:no kernel image is available")

    monkeypatch.setattr(CudaSession, "run", no_kernel)
    cuda = status("onnxruntime-cuda")
    assert not cuda.works
    assert "no kernel image" in cuda.detail
    assert "no kernels for this GPU" in cuda.hint
    monkeypatch.setattr(CudaSession, "run", lambda self, names, inputs: [inputs["x"] * 2])
    assert not status("onnxruntime-cuda").works


def test_cuda_that_is_listed_but_does_not_start_does_not_work(with_cuda, monkeypatch):
    monkeypatch.setattr(CudaSession, "providers", ("CPUExecutionProvider",))
    cuda = status("onnxruntime-cuda")
    assert not cuda.works
    assert "took CPUExecutionProvider" in cuda.detail
    assert "onnxruntime-gpu" in cuda.hint


def test_two_onnxruntimes_over_each_other_are_noticed(monkeypatch):
    pretend(monkeypatch, "onnxruntime", "numpy")
    assert "over each other" not in status("onnxruntime").detail
    pretend(monkeypatch, "onnxruntime", "onnxruntime_gpu")
    both = status("onnxruntime")
    assert both.works
    assert "installed over each other: onnxruntime 9.9, onnxruntime-gpu 9.9" in both.detail


def test_the_gpu_build_under_the_cpus_is_put_on_top_by_one_command(monkeypatch):
    only_cpu = lambda: ["CPUExecutionProvider"]  # noqa: E731
    monkeypatch.setattr(onnxruntime, "get_available_providers", only_cpu)
    command = "pip install --force-reinstall --no-deps onnxruntime-gpu"
    absent = status("onnxruntime-cuda")
    assert absent.hint == f"{install_hint('gpu')} && {command}"
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.31.1")
    covered = status("onnxruntime-cuda")
    assert "onnxruntime-gpu 1.31.1 is installed, but onnxruntime lies over it" in covered.detail
    assert covered.hint == command


def test_a_broken_onnxruntime_is_a_status_not_a_traceback(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", types.ModuleType("onnxruntime"))
    assert not status("onnxruntime").works
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    broken = status("onnxruntime")
    assert not broken.works
    assert broken.hint


def test_tensorrt_that_does_not_import_and_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    pretend(monkeypatch, "tensorrt_rtx_cu13")
    broken = status("tensorrt-rtx")
    assert "cannot be imported" in broken.detail
    assert broken.version == "9.9"
    pretend(monkeypatch)
    assert "not installed" in status("tensorrt-rtx").detail
    module = types.ModuleType("tensorrt_rtx")
    module.__version__, module.Logger = "1.2.3", object
    pretend(monkeypatch, "tensorrt_rtx_cu13")
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", module)
    assert "older than 1.5" in status("tensorrt-rtx").detail


def test_tensorrt_rtx_without_a_gpu_says_what_it_can_do(monkeypatch):
    pytest.importorskip("tensorrt_rtx")
    nowhere = {"gpu": "unknown", "compute_capability": "unknown"}
    monkeypatch.setattr(backends, "cuda_hardware", lambda: nowhere)
    assert not status("tensorrt-rtx").works
    assert "builds engines here" in status("tensorrt-rtx").detail
    monkeypatch.setattr(backends, "cuda_hardware", lambda: ADA)
    assert status("tensorrt-rtx").works


def test_tensorrt_rtx_on_a_gpu_that_it_refuses_does_not_work(monkeypatch):
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(backends, "cuda_hardware", lambda: HOPPER)
    refused = status("tensorrt-rtx")
    assert not refused.works
    assert "does not take NVIDIA H100 (compute capability 9.0)" in refused.detail
    assert "7.5, 8.0, 8.6, 8.9 and 12.0 or later" in refused.detail
    assert "onnxruntime-cuda" in refused.hint


def test_what_opens_engines_does_without_the_package_onnx():
    code = "import fastface_trt.engines.backends, sys; assert 'onnx' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
