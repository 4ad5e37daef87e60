"""The registry of backends: which there are, which work on this machine, and why the others do not.

To add one, write its probe and its builder and add an entry to `BACKENDS`.
"""

import importlib
import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from fastface_trt.engines.engine import EngineBuilder
from fastface_trt.engines.hardware import cpu_hardware, cuda_hardware
from fastface_trt.engines.onnxruntime import (
    PROVIDERS,
    REINSTALL,
    OnnxRuntimeBuilder,
    Provider,
    open_session,
)
from fastface_trt.errors import BackendUnavailable, UnknownName

_NOT_YET = "Use the backend onnxruntime or onnxruntime-cuda; a later release builds for it."


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend works here; `mend` says how to make it work, or keep it working.

    `version` is empty when it is not installed.
    """

    name: str
    works: bool
    version: str
    detail: str
    mend: str = ""


@dataclass(frozen=True)
class Backend:
    """A backend that this version knows; `builder` is None when it does not build for it yet."""

    name: str
    probe: Callable[[], BackendStatus]
    builder: Callable[..., EngineBuilder] | None


def builder_for(name: str, **options: Any) -> EngineBuilder:
    """The builder of backend `name`; `options` are those of its class.

    Raises `UnknownName`, or `BackendUnavailable` for a backend that this version does not build
    for. Whether the backend runs here shows when it is used, or in `probe_backends`.
    """
    if name not in BACKENDS:
        raise UnknownName("backend", name, BACKENDS)
    builder = BACKENDS[name].builder
    if builder is None:
        raise BackendUnavailable(f"This version does not build engines for {name}.", _NOT_YET)
    return builder(**options)


def probe_backends() -> list[BackendStatus]:
    """Try every backend on this machine, at most a few seconds in all; raises nothing."""
    return [backend.probe() for backend in BACKENDS.values()]


_IDENTITY_MODEL = bytes.fromhex(
    "08083a370a100a017812017922084964656e746974791201675a0f0a0178120a0a08080112040a020801"
    "620f0a0179120a0a08080112040a02080142040a001011"
)
"""An ONNX model of one Identity, float32 [1] → [1]: the only honest test of a provider."""


def _probe_onnxruntime(name: str, provider: Provider) -> BackendStatus:
    installed = _installed("onnxruntime")
    packages = ", ".join(f"{package} {version}" for package, version in installed.items())
    version = next(iter(installed.values()), "")
    try:
        import onnxruntime

        version = str(onnxruntime.__version__)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # a library that is missing is said below, in one sentence
        open_session(_IDENTITY_MODEL, options, provider)
    except BackendUnavailable as error:
        return BackendStatus(name, False, version, error.message, error.mend)
    except Exception as error:  # whatever a broken installation throws
        detail = f"{PROVIDERS[provider]} does not start: {error}"
        return BackendStatus(name, False, version, detail, REINSTALL)
    hardware = cpu_hardware() if provider == "cpu" else cuda_hardware()
    detail = f"{PROVIDERS[provider]} on {' '.join(hardware.values())}"
    if len(installed) < 2:
        return BackendStatus(name, True, version, detail)
    # It works by luck: the next install or upgrade of either changes which one is imported.
    detail += f"; installed over each other: {packages}"
    return BackendStatus(name, True, version, detail, REINSTALL)


def _probe_import(name: str, module: str, extra: str) -> BackendStatus:
    installed = _installed(name)
    try:
        version = str(importlib.import_module(module).__version__)
    except Exception as error:  # a stub or a missing library may throw anything
        if not installed:
            detail = "not installed; this version does not build engines for it either"
            return BackendStatus(name, False, "", detail, _NOT_YET)
        detail = f"installed, but it cannot be imported: {error}"
        mend = f"pip install --force-reinstall 'fastface-trt[{extra}]'. {_NOT_YET}"
        return BackendStatus(name, False, next(iter(installed.values())), detail, mend)
    detail = "installed and importable, but this version does not build engines for it"
    return BackendStatus(name, False, version, detail, _NOT_YET)


def _installed(prefix: str) -> dict[str, str]:
    """Installed distributions that provide `prefix`, such as onnxruntime-gpu, with versions."""
    found = {}
    for distribution in importlib.metadata.distributions():
        name = (distribution.metadata["Name"] or "").lower().replace("_", "-")
        if name == prefix or name.startswith(_FLAVOURS[prefix]):
            found[name] = distribution.version
    return dict(sorted(found.items()))


_FLAVOURS: dict[str, tuple[str, ...]] = {
    "onnxruntime": (
        "onnxruntime-gpu",
        "onnxruntime-directml",
        "onnxruntime-openvino",
        "onnxruntime-trt-rtx",
        "ort-nightly",
    ),
    "tensorrt": ("tensorrt-cu",),
    "tensorrt-rtx": ("tensorrt-rtx-cu",),
}

BACKENDS: Mapping[str, Backend] = MappingProxyType(
    {
        backend.name: backend
        for backend in (
            Backend(
                "onnxruntime",
                lambda: _probe_onnxruntime("onnxruntime", "cpu"),
                lambda **options: OnnxRuntimeBuilder("cpu", **options),
            ),
            Backend(
                "onnxruntime-cuda",
                lambda: _probe_onnxruntime("onnxruntime-cuda", "cuda"),
                lambda **options: OnnxRuntimeBuilder("cuda", **options),
            ),
            Backend("tensorrt", lambda: _probe_import("tensorrt", "tensorrt", "tensorrt"), None),
            Backend(
                "tensorrt-rtx",
                lambda: _probe_import("tensorrt-rtx", "tensorrt_rtx", "tensorrt-rtx"),
                None,
            ),
        )
    }
)
