"""The registry of backends: which there are, which work on this machine, and why the others do not.

`make_builder` leads from a backend's name and an export to the builder of its engines. To add a
backend, write its probe and its builder and add an entry to `BACKENDS`.
"""

import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from fastface_trt.engines.cache import EngineCache
from fastface_trt.engines.engine import EngineBuilder
from fastface_trt.engines.hardware import cpu_hardware, cuda_hardware, why_no_gpu
from fastface_trt.engines.manifest import ExportManifest
from fastface_trt.engines.ort.builder import OnnxRuntimeBuilder
from fastface_trt.engines.ort.session import (
    PROVIDERS,
    REINSTALL,
    Provider,
    check_provider,
    open_session,
    provider_source,
    short_message,
)
from fastface_trt.engines.tensorrt.builder import TensorRTBuilder
from fastface_trt.engines.tensorrt.flavour import FLAVOURS, FlavourName, find_flavour
from fastface_trt.engines.tensorrt.options import RUNTIME_OPTIONS, TensorRTOptions
from fastface_trt.engines.tensorrt.plan import Event
from fastface_trt.errors import BackendUnavailable, InvalidRequest, UnknownName


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend works here; `hint` says how to make it work, or keep it working.

    `version` is empty when it is not installed.
    """

    name: str
    works: bool
    version: str
    detail: str
    hint: str = ""


@dataclass(frozen=True)
class Backend:
    """A backend: how to find out whether it works here, and its builder."""

    name: str
    probe: Callable[[], BackendStatus]
    builder: Callable[..., EngineBuilder]


def builder_for(name: str, **options: Any) -> EngineBuilder:
    """The builder of backend `name`; `options` are those of its class.

    Raises `UnknownName`. Whether the backend runs here shows when it is used, or in
    `probe_backends`.
    """
    if name not in BACKENDS:
        raise UnknownName("backend", name, BACKENDS)
    return BACKENDS[name].builder(**options)


def probe_backends() -> list[BackendStatus]:
    """Try every backend on this machine, at most a few seconds in all; raises nothing."""
    return [backend.probe() for backend in BACKENDS.values()]


_SQUARE_MODEL = bytes.fromhex(
    "08083a350a0e0a01780a017812017922034d756c1201675a0f0a0178120a0a08080112040a020801620f0a0179"
    "120a0a08080112040a02080142040a001011"
)
"""An ONNX model of one Mul, float32 [1] → [1], y = x·x: opening it shows whether a provider starts,
running it whether there is a kernel for this GPU in it."""


def _probe_onnxruntime(name: str, provider: Provider) -> BackendStatus:
    installed = _installed("onnxruntime")
    version = next(iter(installed.values()), "")
    try:
        import onnxruntime

        version = str(onnxruntime.__version__)
        source = provider_source(provider)
        check_provider(provider)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # a library that is missing is said below, in one sentence
        session = open_session(_SQUARE_MODEL, options, provider)
        if provider in ("cpu", "cuda"):  # the others compile first, for seconds
            (square,) = session.run(None, {"x": np.array([3], dtype=np.float32)})
            if square.tolist() != [9]:
                raise RuntimeError(f"3 times 3 is {square.tolist()} there")
    except BackendUnavailable as error:
        return BackendStatus(name, False, version, error.message, error.hint)
    except Exception as error:  # whatever a broken installation throws
        detail = f"{PROVIDERS[provider]} does not work: {short_message(error)}"
        return BackendStatus(name, False, version, detail, _hint(str(error)))
    hardware = cpu_hardware() if provider == "cpu" else cuda_hardware()
    detail = f"{PROVIDERS[provider]} ({source}) on {' '.join(hardware.values())}"
    if len(installed) > 1:
        # The next install or upgrade of either changes which one is imported.
        packages = ", ".join(f"{package} {number}" for package, number in installed.items())
        detail += f"; installed over each other: {packages}"
    return BackendStatus(name, True, version, detail)


def _hint(reason: str) -> str:
    if "no kernel image" in reason or "NoKernelImage" in reason:
        return "This onnxruntime-gpu has no kernels for this GPU: try its newest, or tensorrt."
    return REINSTALL


def _probe_tensorrt(name: FlavourName) -> BackendStatus:
    flavour = find_flavour(name)
    try:
        version = flavour.version()
    except BackendUnavailable as error:
        if not _installed(name):
            return BackendStatus(name, False, "", "not installed", error.hint)
        version = next(iter(_installed(name).values()))
        return BackendStatus(name, False, version, error.message, error.hint)
    gpu = cuda_hardware()
    if gpu["gpu"] == "unknown":
        why, hint = why_no_gpu()
        builds = "builds_without_gpu" in flavour.supports
        detail = f"{flavour.label}: {why}; " + (
            "it builds engines here" if builds else "it needs one to build, too"
        )
        return BackendStatus(name, False, version, detail, f"{hint} It runs on {flavour.gpus}.")
    try:
        flavour.check_gpu(gpu)
    except BackendUnavailable as error:
        return BackendStatus(name, False, version, error.message, error.hint)
    return BackendStatus(name, True, version, f"{flavour.label} on {' '.join(gpu.values())}")


def _installed(prefix: str) -> dict[str, str]:
    """Installed distributions that provide `prefix`, such as onnxruntime-gpu, with versions."""
    found = {}
    for distribution in importlib.metadata.distributions():
        name = (distribution.metadata["Name"] or "").lower().replace("_", "-")
        if name.endswith("-bindings"):
            continue  # without their libraries they are not an installation
        half = name.endswith(("-bindings", "-libs"))  # parts of a package, useless alone
        if name == prefix or (name.startswith(_FLAVOURS[prefix]) and not half):
            found[name] = distribution.version
    return dict(sorted(found.items()))


def _onnxruntime_backend(provider: Provider) -> Backend:
    name = "onnxruntime" if provider == "cpu" else f"onnxruntime-{provider}"
    return Backend(
        name,
        lambda: _probe_onnxruntime(name, provider),
        lambda **options: OnnxRuntimeBuilder(provider, **options),
    )


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
            *map(_onnxruntime_backend, PROVIDERS),
            Backend(
                "tensorrt",
                lambda: _probe_tensorrt("tensorrt"),
                lambda **options: TensorRTBuilder("tensorrt", **options),
            ),
            Backend(
                "tensorrt-rtx",
                lambda: _probe_tensorrt("tensorrt-rtx"),
                lambda **options: TensorRTBuilder("tensorrt-rtx", **options),
            ),
        )
    }
)


def make_builder(
    manifest: ExportManifest,
    backend: str,
    *,
    threads: int | None = None,
    options: Mapping[str, Any] | None = None,
    cache: EngineCache | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
) -> EngineBuilder:
    """The builder of `backend` for an export's engines.

    `threads` is for ONNX Runtime on the CPU. `options` are those of the backend: `optimization` for
    ONNX Runtime, `provider_options` for its CUDA provider, the fields of `TensorRTOptions` for
    TensorRT and TensorRT-RTX, whose latent sizes default to the export's own. Without options a
    TensorRT engine that was built with others serves too. `cache` is where TensorRT's timing cache
    lies. Raises `UnknownName`, `InvalidRequest`.
    """
    given = dict(options or {})
    if backend not in FLAVOURS:
        if threads is not None:
            given["threads"] = threads
        try:
            return builder_for(backend, **given)
        except TypeError:
            raise InvalidRequest(
                f"The backend {backend} does not take the build options {', '.join(given)}.",
                "See `fastface-trt build --help`.",
            ) from None
    flavour = find_flavour(backend)
    sizes = {"latent_sizes": (manifest.latent_shape()[1:],)}
    return builder_for(
        backend,
        options=TensorRTOptions.checked(flavour, **(sizes | given)),
        exact=not RUNTIME_OPTIONS.issuperset(given),
        timing_cache=None if cache is None else timing_cache_file(cache, backend),
        on_event=on_event,
    )


def timing_cache_file(cache: EngineCache, backend: str) -> Path:
    """Where TensorRT keeps what it measured: one file per cache, it tells GPUs apart itself."""
    return cache.root / "timing" / f"{backend}.cache"
