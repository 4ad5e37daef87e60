"""From a backend's name and an export to the builder of its engines."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastface_trt.engines.backends import builder_for
from fastface_trt.engines.cache import EngineCache
from fastface_trt.engines.engine import EngineBuilder
from fastface_trt.engines.manifest import ExportManifest
from fastface_trt.engines.tensorrt.flavour import FLAVOURS, find_flavour
from fastface_trt.engines.tensorrt.options import RUNTIME_OPTIONS, TensorRTOptions
from fastface_trt.engines.tensorrt.plan import Event
from fastface_trt.errors import InvalidRequest


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
    factor = manifest.vae_scale_factor
    sizes = {"latent_sizes": ((manifest.height // factor, manifest.width // factor),)}
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
