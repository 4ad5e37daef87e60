"""Opening ONNX Runtime sessions on exactly the provider that was asked for, and its messages.

A provider is built into the installed ONNX Runtime, or comes as a plugin: a package with a library
that is registered with a plain `onnxruntime`, whose sessions then name devices, not providers.

A GPU provider is a shared library that is opened with the first session, and finds what it links to
only where the system's loader looks, or among what the process has open already. NVIDIA's packages
(nvidia-cublas, nvidia-cudnn-cu13, …) lie in neither; so they are opened here by their paths, and no
LD_LIBRARY_PATH is needed. The CPU's provider needs none of this and pays nothing.
"""

import contextlib
import ctypes
import importlib
import importlib.metadata
import importlib.util
import io
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal

from fastface_trt.engines.dtypes import FROM_ONNXRUNTIME
from fastface_trt.engines.hardware import (
    FROM_TURING,
    RTX,
    Capabilities,
    cuda_driver,
    cuda_hardware,
    refused_gpu,
    why_no_gpu,
)
from fastface_trt.engines.manifest import ModuleSpec
from fastface_trt.engines.ort.options import ProviderOptions
from fastface_trt.errors import BackendUnavailable, install_hint

Provider = Literal["cpu", "cuda", "tensorrt", "nv-tensorrt-rtx"]

PROVIDERS: dict[Provider, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "nv-tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
}

PLUGINS: Final[Mapping[str, str]] = MappingProxyType(
    {"nv-tensorrt-rtx": "onnxruntime_ep_nv_tensorrt_rtx"}
)
"""Packages that bring a provider as a plugin, by their import names."""

_OLDEST_CUDA: Final = 12
"""Of builds for it, which GPUs they take is not written down anywhere: a run shows it."""

REINSTALL: Final = "pip install --force-reinstall --no-deps onnxruntime-gpu"
"""`onnxruntime` and `onnxruntime-gpu` install the same files, so the last one counts; this puts the
GPU's on top, which runs the CPU, too. The CPU's stays noted as installed: this package asks for it,
and the next install of anything would bring it back if it were not."""

_PLUGIN: Final = (
    "pip install onnxruntime-ep-nv-tensorrt-rtx, a plugin for a plain onnxruntime (1.24 or later); "
    "or use the backend tensorrt-rtx, which needs no plugin."
)

_TENSORRT = ("libnvinfer.so.10", "libnvonnxparser.so.10")
"""What the provider `tensorrt` of ONNX Runtime 1.20 to 1.31 links to besides: TensorRT 10."""


def open_session(
    graph: str | bytes,
    options: Any,
    provider: Provider,
    provider_options: ProviderOptions | None = None,
) -> Any:
    """An ONNX Runtime session that runs on `provider`; `graph` is a path or a serialised model.

    `options` is a SessionOptions of this session alone: a plugin's devices are added to it. Raises
    `BackendUnavailable` when ONNX Runtime would quietly use another provider instead; ONNX
    Runtime's own exceptions for a graph that it cannot load.
    """
    ort = load_onnxruntime()
    wanted = PROVIDERS[provider]
    source = provider_source(provider)
    if provider != "cpu":
        open_libraries(ort, provider)
    chosen: dict[str, Any] = {"providers": [(wanted, provider_options or {})]}
    if source.startswith("plugin"):
        # Its devices say which GPU; the provider does not know the option.
        own = {k: v for k, v in (provider_options or {}).items() if k != "device_id"}
        options.add_provider_for_devices(_plugin_devices(ort, provider)[:1], own)
        chosen = {}
    # Its fallback would retry on the CPU, when opening and again in the middle of a run.
    session = ort.InferenceSession(graph, options, **chosen, enable_fallback=0)
    actual = session.get_providers()
    if not actual or actual[0] != wanted:
        version = cuda_version(ort)
        missing = missing_libraries(provider, version[0]) if version else []
        raise BackendUnavailable(
            f"ONNX Runtime was asked for {wanted} and took {', '.join(actual) or 'nothing'}"
            + (f": it does not find {', '.join(missing)}." if missing else "."),
            _libraries_hint(missing) if missing else REINSTALL,
        )
    return session


def check_provider(provider: Provider) -> None:
    """Raise `BackendUnavailable` unless `provider` can run here, before anything is built.

    Looks at what is installed, at the GPU's compute capability and at the driver's CUDA version,
    and opens nothing.
    """
    source = provider_source(provider)
    if provider == "cpu":
        return
    name = f"{PROVIDERS[provider]} ({source})"
    gpu = cuda_hardware()
    if gpu["gpu"] == "unknown":
        why, hint = why_no_gpu()
        raise BackendUnavailable(f"{name} is installed, but {why}.", hint)
    built_for = cuda_version(load_onnxruntime())
    takes = _takes(provider, built_for)
    refused = refused_gpu(takes, gpu) if takes else None
    if refused is not None:
        raise BackendUnavailable(
            f"{name} does not take {refused}; it takes {takes}.",
            "Use the backend onnxruntime-cuda or tensorrt on this GPU."
            if provider == "nv-tensorrt-rtx"
            else "Use another GPU, or the backend onnxruntime.",
        )
    offered = cuda_driver().get("driver", "")
    if built_for and offered and int(offered.split(".")[0]) < built_for[0]:
        raise BackendUnavailable(
            f"{name} is built for CUDA {'.'.join(map(str, built_for))}, and the driver here offers "
            f"CUDA {offered}.",
            "Update NVIDIA's driver (580 or later for CUDA 13, 525 for CUDA 12), or install an "
            "onnxruntime-gpu that was built for the older CUDA.",
        )


def provider_source(provider: Provider) -> str:
    """Where a provider comes from, such as "onnxruntime-gpu 1.31.1 for CUDA 13.0".

    Begins with "plugin" if it is one. Raises `BackendUnavailable` with the hint when this ONNX
    Runtime has no such provider, which is also so when the CPU's build lies over the GPU's.
    """
    ort = load_onnxruntime()
    build = f"{getattr(ort, 'package_name', 'onnxruntime')} {ort.__version__}"
    version = cuda_version(ort)
    build += f" for CUDA {'.'.join(map(str, version))}" if version else ""
    available = ort.get_available_providers()
    if PROVIDERS[provider] in available:
        return build
    plugin = PLUGINS.get(provider)
    if plugin is None or importlib.util.find_spec(plugin) is None:
        raise lacks_provider(provider, available)
    if not hasattr(ort, "register_execution_provider_library"):
        raise BackendUnavailable(
            f"{build} takes no plugins, so {plugin} is of no use to it.",
            "pip install -U onnxruntime (1.24 or later).",
        )
    return f"plugin {_distribution(plugin)} with {build}"


def libraries_status() -> str | None:
    """Whether the libraries of the CUDA provider are found, for `doctor`; None for a CPU build."""
    ort = load_onnxruntime()
    version = cuda_version(ort)
    if not version:
        return None
    open_libraries(ort, "cuda")
    missing = missing_libraries("cuda", version[0])
    if not missing:
        return "found"
    return f"missing {', '.join(missing)}: {_libraries_hint(missing)}"


def lacks_provider(provider: Provider, available: Sequence[str]) -> BackendUnavailable:
    """The error that says that this ONNX Runtime has no such provider, and the hint."""
    ort = load_onnxruntime()
    lacks = (
        f"ONNX Runtime {ort.__version__} has no {PROVIDERS[provider]} here, only "
        f"{', '.join(available)}"
    )
    if provider == "nv-tensorrt-rtx":
        return BackendUnavailable(f"{lacks}.", _PLUGIN)
    try:
        gpu = importlib.metadata.version("onnxruntime-gpu")
    except importlib.metadata.PackageNotFoundError:
        return BackendUnavailable(f"{lacks}.", f"{install_hint('gpu')} && {REINSTALL}")
    return BackendUnavailable(
        f"{lacks}: onnxruntime-gpu {gpu} is installed, but onnxruntime lies over it.", REINSTALL
    )


def _takes(provider: Provider, built_for: tuple[int, ...]) -> Capabilities | None:
    """Which GPUs a provider takes; None where only a run shows it."""
    if provider == "nv-tensorrt-rtx":
        return RTX
    return None if built_for and built_for[0] <= _OLDEST_CUDA else FROM_TURING


def _libraries_hint(missing: Sequence[str]) -> str:
    if any(name.startswith("libnv") and "nvrtc" not in name for name in missing):
        return "Install the TensorRT version that this ONNX Runtime was built with: 10, not 11."
    return "pip install 'onnxruntime-gpu[cuda,cudnn]' (it brings NVIDIA's libraries, 1.2 GB)."


def _plugin_devices(ort: Any, provider: Provider) -> list[Any]:
    """The devices of a plugin's provider, which is registered once per process."""
    wanted = PROVIDERS[provider]

    def devices() -> list[Any]:
        return [device for device in ort.get_ep_devices() if device.ep_name == wanted]

    if found := devices():
        return found
    try:
        plugin = importlib.import_module(PLUGINS[provider])
        ort.register_execution_provider_library(wanted, plugin.get_library_path())
    except Exception as error:  # whatever loading a foreign library throws
        raise BackendUnavailable(
            f"The plugin of {wanted} cannot be registered: {short_message(error)}",
            "See that its CUDA version fits the driver; it is made for onnxruntime 1.24 or later.",
        ) from error
    if found := devices():
        return found
    raise BackendUnavailable(f"The plugin of {wanted} finds no GPU that it takes.", _PLUGIN)


def _distribution(module: str) -> str:
    """The installed distribution that an import name stems from, with its version."""
    prefix = module.replace("_", "-")
    for distribution in importlib.metadata.distributions():
        name = (distribution.metadata["Name"] or "").lower().replace("_", "-")
        if name.startswith(f"{prefix}-cu"):  # the one without -cu13 or -cu12 only names another
            return f"{name} {distribution.version}"
    return prefix


def cuda_version(onnxruntime: Any) -> tuple[int, ...]:
    """The CUDA version that this ONNX Runtime was built with, such as (13, 0); () for a CPU one."""
    text = str(getattr(onnxruntime, "cuda_version", "") or "")
    return tuple(int(part) for part in text.split(".") if part.isdigit())


def library_names(provider: str, cuda_major: int) -> tuple[str, ...]:
    """The libraries of CUDA, cuDNN and TensorRT that a provider opens, in order of dependence."""
    names = (
        f"libcudart.so.{cuda_major}",
        f"libnvrtc.so.{cuda_major}",
        f"libcublasLt.so.{cuda_major}",
        f"libcublas.so.{cuda_major}",
        "libcurand.so.10",
        f"libcufft.so.{cuda_major - 1}",
        "libcudnn.so.9",
    )
    return names + (_TENSORRT if provider == "tensorrt" else ())


@lru_cache
def open_libraries(onnxruntime: Any, provider: str) -> None:
    """Open the libraries of a GPU provider wherever they came as packages; raises nothing.

    ONNX Runtime's own way is tried first (it has one from 1.21 on, and prints what it does not
    find); what that leaves is looked for in the packages' folders. Once per process.
    """
    version = cuda_version(onnxruntime)
    if provider == "cpu" or not version:
        return
    with contextlib.suppress(Exception), contextlib.redirect_stdout(io.StringIO()):
        onnxruntime.preload_dlls()
    left = missing_libraries(provider, version[0])
    while left:
        after = [name for name in left if not _open(name)]
        if len(after) == len(left):
            return
        left = after  # one that needed another may open now


def missing_libraries(provider: str, cuda_major: int) -> list[str]:
    """Which of a provider's libraries neither are open nor lie where the loader looks."""
    if sys.platform != "linux":
        return []
    return [name for name in library_names(provider, cuda_major) if not _opens((name,))]


def _open(name: str) -> bool:
    return _opens([str(folder / name) for folder in _folders() if (folder / name).is_file()])


def _opens(candidates: Sequence[str]) -> bool:
    for candidate in candidates:
        with contextlib.suppress(OSError):
            # Global, because a provider refers to symbols of libraries that it does not name.
            ctypes.CDLL(candidate, mode=ctypes.RTLD_GLOBAL)
            return True
    return False


def _folders() -> Iterator[Path]:
    """Where packages keep shared libraries: nvidia/*/lib, and TensorRT's own."""
    for package, pattern in (("nvidia", "*/lib"), ("tensorrt_libs", ".")):
        spec = importlib.util.find_spec(package)
        for root in (spec and spec.submodule_search_locations) or ():
            yield from sorted(Path(root).glob(pattern)) if pattern != "." else (Path(root),)


def load_onnxruntime() -> Any:
    """The package `onnxruntime`; raises `BackendUnavailable` when it is not whole."""
    try:
        import onnxruntime

        # A half-removed installation imports as an empty package.
        onnxruntime.InferenceSession  # noqa: B018
    except (ImportError, AttributeError) as error:
        raise BackendUnavailable(
            f"ONNX Runtime cannot be imported: {error}.",
            "pip install --force-reinstall --no-deps onnxruntime (or onnxruntime-gpu, not both).",
        ) from error
    return onnxruntime


def interface_problem(session: Any, module: ModuleSpec) -> str | None:
    """What differs between the session's inputs and outputs and the module's, None if nothing."""
    for side, actual, wanted in (
        ("inputs", session.get_inputs(), module.inputs),
        ("outputs", session.get_outputs(), module.outputs),
    ):
        found = {node.name: FROM_ONNXRUNTIME.get(node.type, node.type) for node in actual}
        expected = {tensor.name: tensor.dtype for tensor in wanted}
        if found != expected:
            return f"its {side} are {found}, expected {expected}"
        if "bfloat16" in found.values():
            return f"its {side} hold bfloat16, which this backend cannot pass; use fp16 or fp32"
    return None


def lacks_a_kernel(error: Exception) -> bool:
    """Whether a graph was refused because no kernel of the provider takes one of its types."""
    return "NOT_IMPLEMENTED" in str(error)


def short_message(error: Exception) -> str:
    """The message of an ONNX Runtime exception without its code prefix and C++ signature."""
    text = " ".join(str(error).split())
    return re.sub(r".*\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)[:300]
