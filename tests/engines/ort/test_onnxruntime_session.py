"""What is checked before a session is opened, plugins, and libraries that came as packages."""

import importlib.metadata
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import onnxruntime
import pytest

from fastface_trt.engines.ort import (
    session as onnxruntime_session,
)
from fastface_trt.engines.ort.session import PROVIDERS, check_provider, open_session
from fastface_trt.errors import BackendUnavailable

ADA = {"gpu": "NVIDIA RTX 4090", "compute_capability": "8.9"}
HOPPER = {"gpu": "NVIDIA H100", "compute_capability": "9.0"}
VOLTA = {"gpu": "NVIDIA V100", "compute_capability": "7.0"}
NOWHERE = {"gpu": "unknown", "compute_capability": "unknown"}
CUDA13, CUDA12 = "13.0", "12.8"
PLUGIN = "NvTensorRTRTXExecutionProvider"


def machine(monkeypatch, gpu, cuda, driver):
    listed = list(PROVIDERS.values())
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: listed)
    monkeypatch.setattr(onnxruntime, "cuda_version", cuda, raising=False)
    monkeypatch.setattr(onnxruntime_session, "cuda_hardware", lambda: gpu)
    monkeypatch.setattr(onnxruntime_session, "cuda_driver", lambda: driver and {"driver": driver})


@pytest.mark.parametrize(
    ("provider", "gpu", "cuda", "driver"),
    [
        ("cpu", NOWHERE, "", {}),
        ("cuda", ADA, CUDA13, "13.2"),
        ("cuda", HOPPER, CUDA13, "13.0"),
        ("cuda", VOLTA, CUDA12, "12.2"),  # minor versions of CUDA are compatible
        ("cuda", HOPPER, "", "13.0"),
        ("tensorrt", HOPPER, CUDA13, "13.0"),
        ("nv-tensorrt-rtx", ADA, CUDA13, "13.0"),
    ],
)
def test_what_can_run_is_let_through(monkeypatch, provider, gpu, cuda, driver):
    machine(monkeypatch, gpu, cuda, driver)
    check_provider(provider)


@pytest.mark.parametrize(
    ("provider", "gpu", "cuda", "driver", "says"),
    [
        ("cuda", NOWHERE, CUDA13, {}, "is installed, but .* here"),
        ("cuda", VOLTA, CUDA13, "13.0", r"does not take NVIDIA V100 .*7\.0.*; it takes 7\.5"),
        ("cuda", ADA, CUDA13, "12.4", r"built for CUDA 13\.0, and the driver here offers CUDA 12"),
        ("nv-tensorrt-rtx", HOPPER, CUDA13, "13.0", r"does not take NVIDIA H100 .*9\.0.* 8\.9 and"),
    ],
)
def test_what_cannot_run_is_told_in_a_sentence(monkeypatch, provider, gpu, cuda, driver, says):
    machine(monkeypatch, gpu, cuda, driver)
    with pytest.raises(BackendUnavailable, match=says) as caught:
        check_provider(provider)
    assert PROVIDERS[provider] in caught.value.message
    assert caught.value.hint


class Options:
    """SessionOptions that take a plugin's devices."""

    def __init__(self):
        self.added = []

    def add_provider_for_devices(self, devices, options):
        self.added.append((list(devices), dict(options)))


class PluginRuntime:
    """What of onnxruntime plugins use: a registry of libraries, and devices once registered."""

    def __init__(self, monkeypatch, devices=2, error=None):
        self.registered, self.sessions = [], []
        cpu = SimpleNamespace(ep_name="CPUExecutionProvider")
        gpus = [SimpleNamespace(ep_name=PLUGIN, number=n) for n in range(devices)]

        def register(name, path):
            if error:
                raise RuntimeError(error)
            self.registered.append((name, path))

        runtime = self

        class Session:
            def __init__(self, graph, options, **named):
                self.named = named
                runtime.sessions.append(self)

            def get_providers(self):
                return [PLUGIN, "CPUExecutionProvider"]

        patches = {
            "register_execution_provider_library": register,
            "get_ep_devices": lambda: [cpu, *(gpus if self.registered else [])],
            "get_available_providers": lambda: ["CPUExecutionProvider"],
            "InferenceSession": Session,
        }
        for name, value in patches.items():
            monkeypatch.setattr(onnxruntime, name, value, raising=False)
        module = ModuleType("onnxruntime_ep_nv_tensorrt_rtx")
        module.get_library_path = lambda: "/somewhere/libplugin.so"
        monkeypatch.setitem(sys.modules, module.__name__, module)
        module.__spec__ = SimpleNamespace(name=module.__name__)
        monkeypatch.setattr(onnxruntime_session, "cuda_hardware", lambda: ADA)


def test_a_plugin_is_registered_once_and_its_first_gpu_taken(monkeypatch):
    runtime = PluginRuntime(monkeypatch)
    check_provider("nv-tensorrt-rtx")
    assert runtime.registered == []  # a check opens nothing
    options = {"device_id": "0", "has_user_compute_stream": "1", "user_compute_stream": "7"}
    for _ in range(2):
        given = Options()
        open_session(b"graph", given, "nv-tensorrt-rtx", options)
        ((devices, passed),) = given.added
        assert [device.number for device in devices] == [0]
        assert passed == {"has_user_compute_stream": "1", "user_compute_stream": "7"}
    assert runtime.registered == [(PLUGIN, "/somewhere/libplugin.so")]
    assert [session.named for session in runtime.sessions] == [{"enable_fallback": 0}] * 2


def test_where_a_plugin_comes_from(monkeypatch):
    PluginRuntime(monkeypatch)
    package = SimpleNamespace(
        metadata={"Name": "onnxruntime_ep_nv_tensorrt_rtx_cu13"}, version="0.5.0"
    )
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: [package])
    source = onnxruntime_session.provider_source("nv-tensorrt-rtx")
    assert source.startswith("plugin onnxruntime-ep-nv-tensorrt-rtx-cu13 0.5.0 with onnxruntime ")


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (
            {"error": "libcuda.so.1: cannot open shared object file"},
            "cannot be registered: libcuda",
        ),
        ({"devices": 0}, "finds no GPU that it takes"),
    ],
)
def test_a_plugin_that_does_not_start_says_why(monkeypatch, broken, says):
    PluginRuntime(monkeypatch, **broken)
    with pytest.raises(BackendUnavailable, match=says):
        open_session(b"graph", Options(), "nv-tensorrt-rtx", {})


def test_an_onnxruntime_from_before_plugins_says_so(monkeypatch):
    PluginRuntime(monkeypatch)
    monkeypatch.delattr(onnxruntime, "register_execution_provider_library")
    with pytest.raises(BackendUnavailable, match="takes no plugins"):
        check_provider("nv-tensorrt-rtx")


# Libraries that came as packages, in a process of its own: what is open stays open.

LAYOUTS = {
    "13.0": {"": "cu13"},
    "12.8": {"cublas": "cublas", "cudart": "cuda_runtime", "nvrtc": "cuda_nvrtc"},
}
PROBE = """
import sys, types, ctypes
sys.path.insert(0, sys.argv[1])
from fastface_trt.engines.ort import session as libraries
runtime = types.ModuleType("onnxruntime")
runtime.cuda_version = sys.argv[2]
if sys.argv[3] == "own":
    def preload_dlls():
        print("noise: Failed to load")
        raise RuntimeError("and then it fails")
    runtime.preload_dlls = preload_dlls
major = int(sys.argv[2].split(".")[0])
before = libraries.missing_libraries("cuda", major)
libraries.open_libraries(runtime, "cpu")
assert libraries.missing_libraries("cuda", major) == before
libraries.open_libraries(runtime, "cuda")
print(",".join(libraries.missing_libraries("cuda", major)))
# Global: a provider finds symbols of what it does not link to.
print(ctypes.CDLL(None).fake_cublas() if not libraries.missing_libraries("cuda", major) else "")
"""


def fake_library(folder, soname, needs=None):
    """A library with one function; with `needs` it links to another, which it cannot find."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = soname.removeprefix("lib").split(".")[0].lower()
    source = folder / f"{stem}.c"
    call = f"int fake_{needs[0]}(void);" if needs else ""
    value = f"1 + fake_{needs[0]}()" if needs else "1"
    source.write_text(f"{call} int fake_{stem}(void) {{ return {value}; }}")
    link = [str(needs[1])] if needs else []
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-o", folder / soname, source, f"-Wl,-soname,{soname}", *link],
        check=True,
    )
    source.unlink()
    return folder / soname


@pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None, reason="needs a C compiler on Linux"
)
@pytest.mark.parametrize("own", ["own", "none"])
@pytest.mark.parametrize("cuda", LAYOUTS)
def test_libraries_in_packages_are_found_without_a_path(tmp_path, cuda, own):
    major = int(cuda.split(".")[0])
    names = onnxruntime_session.library_names("cuda", major)
    for number, name in enumerate(names):
        part = name.removeprefix("lib").split(".")[0].lower()
        package = LAYOUTS[cuda].get("", LAYOUTS[cuda].get(part, part))
        folder = tmp_path / "nvidia" / ("cudnn" if part == "cudnn" else package) / "lib"
        needs = None
        if part == "cublas":  # not in the order of the names: a first try of it fails
            needs = ("cufft", fake_library(tmp_path / "nvidia" / "zz" / "lib", names[5]))
        elif number == 5:
            continue
        fake_library(folder, name, needs)
    # Another CUDA lies beside it and is left alone: its names differ.
    fake_library(tmp_path / "nvidia" / "aa" / "lib", f"libcublas.so.{major + 1}")
    command = [sys.executable, "-c", PROBE, str(tmp_path), cuda, own]
    found = subprocess.run(command, check=True, capture_output=True, text=True, env=_plain())
    assert found.stdout.split("\n")[:2] == ["", "2"]
    assert found.stderr == ""
    (tmp_path / "nvidia" / "zz" / "lib" / names[5]).unlink()
    found = subprocess.run(command, check=True, capture_output=True, text=True, env=_plain())
    missing = found.stdout.split("\n")[0].split(",")
    assert {f"libcublas.so.{major}", names[5]} == set(missing)


def _plain():
    root = str(Path(__file__).parents[3])
    return {"PYTHONPATH": root, "PATH": "/usr/bin:/bin"}


def test_a_cpu_build_opens_no_library(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a CPU build has none")

    monkeypatch.setattr(onnxruntime_session.ctypes, "CDLL", refuse)
    for version in ("", None):
        runtime = SimpleNamespace(cuda_version=version)
        onnxruntime_session.open_libraries.__wrapped__(runtime, "cuda")
    runtime = SimpleNamespace(cuda_version="13.0")
    onnxruntime_session.open_libraries.__wrapped__(runtime, "cpu")


def test_libraries_that_are_missing_are_named(monkeypatch):
    machine(monkeypatch, ADA, CUDA13, "13.0")
    monkeypatch.setattr(onnxruntime_session, "open_libraries", lambda *_: None)
    monkeypatch.setattr(
        onnxruntime_session, "missing_libraries", lambda provider, major: ["libcudnn.so.9"]
    )
    on_the_cpu = SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: on_the_cpu)
    with pytest.raises(BackendUnavailable, match=r"does not find libcudnn\.so\.9") as caught:
        open_session(b"graph", onnxruntime.SessionOptions(), "cuda")
    assert "onnxruntime-gpu[cuda,cudnn]" in caught.value.hint
    assert "libcudnn.so.9: pip install" in onnxruntime_session.libraries_status()
    monkeypatch.setattr(onnxruntime, "cuda_version", "")
    assert onnxruntime_session.libraries_status() is None
