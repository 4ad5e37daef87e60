"""Make the engine of a module out of a built engine of the same graph with other weights.

A changed LoRA scale, another LoRA, another distilled checkpoint: the graph is the same and so is
everything that a builder worked out for it, only bytes differ. The result is a new entry of the
cache under the key that a build would have had; the engine that it was made from stays as it is.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol, runtime_checkable

from fastface_trt.engines.cache import EngineCache, refit_base, refitted_identity
from fastface_trt.engines.engine import EngineBuilder, Progress
from fastface_trt.engines.manifest import (
    BuildReport,
    EngineManifest,
    FileEntry,
    ModuleSpec,
)
from fastface_trt.engines.onnx.file import verify_module
from fastface_trt.engines.probe import check_probe
from fastface_trt.engines.weight_map import Change
from fastface_trt.errors import EngineMismatch

_BUILD = "Build it instead: fastface-trt build."


@runtime_checkable
class RefittingBuilder(EngineBuilder, Protocol):
    """A builder whose engines can take other weights."""

    def refit(
        self, base: EngineManifest, folder: Path, module: ModuleSpec, source: Path, target: Path
    ) -> Change:
        """Write the engine of `module` (ONNX in `source`) into `target`, from that in `folder`.

        `folder` is only read. Raises `EngineMismatch` when it cannot be done.
        """
        ...


@dataclass(frozen=True)
class RefitReport:
    """How a refit went. `base` is the key of the engine used, None when there was nothing to do.

    changed: names of the initialisers replaced, changed_bytes of them. probe_errors: relative L2
    error per output against the PyTorch module, None for an export without a probe.
    """

    module: str
    key: str
    base: str | None
    changed: tuple[str, ...] = ()
    changed_bytes: int = 0
    seconds: float = 0.0
    probe_errors: Mapping[str, float] | None = None


def refit(
    cache: EngineCache,
    module: ModuleSpec,
    source: Path,
    builder: EngineBuilder,
    progress: Progress = lambda line: None,
    base: ModuleSpec | None = None,
) -> RefitReport:
    """Make the engine of `module` from one in `cache`; its ONNX files lie in `source`.

    `base` is the module whose engine is used, by default that of the last used one that fits. The
    probe of the export runs on the new engine before it appears in the cache.

    Raises `EngineMismatch` when no engine fits, naming what differs, when a changed weight cannot
    be replaced, or the probe fails; `ExportIncomplete`, `StorageError`. The cache is as before
    then.
    """
    began = perf_counter()
    with suppress(EngineMismatch):
        there, _ = cache.get(module, source, builder, progress, build=False)
        return RefitReport(module.name, there.key, None, seconds=perf_counter() - began)
    if not isinstance(builder, RefittingBuilder):
        raise EngineMismatch(f"Engines of {builder.backend} cannot be refitted.", _BUILD)
    near = cache.near_matches(module, builder)
    if base is not None:
        near = [one for one in near if one.manifest.key == cache.key(base, builder)]
        if not near:
            raise EngineMismatch(
                f"{base.name} of the export to start from has no engine for {builder.backend} "
                f"in {cache.root}.",
                "Build it first: fastface-trt build.",
            )
    verify_module(source, module, hashes=False)  # `make` compares them, later
    chosen = refit_base(near, module, source).manifest
    progress(f"Verifying {chosen.key[:12]}, the engine that gives the graph")
    cache.verify(chosen.key)
    alike = _BuiltLike(builder, chosen)
    key = cache.key(module, alike)
    change: Change | None = None
    errors: dict[str, float] | None = None

    def write(target: Path) -> BuildReport:
        nonlocal change, errors
        progress(f"Putting the weights of {module.name} into a copy of {chosen.key[:12]}")
        change = builder.refit(chosen, cache.root / chosen.key, module, source, target)
        if module.probe is None:
            progress(f"{module.name} has no probe: the new engine is not compared with PyTorch")
        else:
            progress(f"Comparing {module.name} with PyTorch on the export's probe")
            with builder.open(_provisional(key, module, alike), target) as engine:
                errors = check_probe(engine, module, source)
        return chosen.report.model_copy(update={"refitted_from": chosen.key})

    cache.make(module, source, alike, write, progress)
    if change is None:  # another process made it meanwhile
        return RefitReport(module.name, key, None, seconds=perf_counter() - began)
    return RefitReport(
        module.name,
        key,
        chosen.key,
        change.changed,
        change.bytes,
        perf_counter() - began,
        errors,
    )


class _BuiltLike:
    """A builder with the options of an engine that exists: what a refit keeps of it."""

    def __init__(self, builder: RefittingBuilder, base: EngineManifest) -> None:
        self.backend = builder.backend
        self.build = builder.build
        self.open = builder.open
        self.takes = builder.takes
        self.check_runs_here = builder.check_runs_here
        self.device = builder.device
        self._identity: dict[str, Any] = refitted_identity(base)

    def identity(self, module: ModuleSpec) -> Mapping[str, Any]:
        """That of the engine, with weights in it."""
        return self._identity


def _provisional(key: str, module: ModuleSpec, builder: EngineBuilder) -> EngineManifest:
    """A manifest to open an unfinished engine with; it is never stored."""
    identity: Mapping[str, Any] = builder.identity(module)
    nothing = FileEntry(path="engine", bytes=0, sha256="0" * 64)
    return EngineManifest(key=key, module=module, files=(nothing,), build_seconds=0, **identity)
