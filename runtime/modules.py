"""The modules of an export, opened as engines of one backend on first use."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from threading import Lock

from fastface_trt.engines.cache import EngineCache
from fastface_trt.engines.device import Device
from fastface_trt.engines.engine import Closing, Engine, EngineBuilder, Progress
from fastface_trt.engines.files import verify_files
from fastface_trt.engines.manifest import (
    EXPORT_MANIFEST,
    EngineManifest,
    ExportManifest,
    read_manifest,
)
from fastface_trt.errors import ExportIncomplete


class ModuleSet(Closing, Mapping[str, Engine]):
    """Engines by module name: taken from the cache, built where they are missing, closed together.

    With `build=False` a missing engine is an error instead.

    Reading the export checks its manifest and the small files beside the modules; a module's own
    files are checked when it has to be built. `manifest` stands in for the folder's own while an
    export is still being written.
    """

    def __init__(
        self,
        export: Path,
        builder: EngineBuilder,
        cache: EngineCache,
        progress: Progress = lambda line: None,
        *,
        build: bool = True,
        manifest: ExportManifest | None = None,
    ) -> None:
        self.folder = export
        self.manifest = manifest or read_manifest(export / EXPORT_MANIFEST, ExportManifest)
        verify_files(export, self.manifest.extra_files, ExportIncomplete)
        self.builder = builder
        self._cache = cache
        self._progress = progress
        self._build = build
        self._open: dict[str, Engine] = {}
        self._device: Device | None = None
        self._lock = Lock()

    @property
    def device(self) -> Device:
        """Where the tensors of all these engines live; closed with them."""
        with self._lock:
            self._device = self._device or self.builder.device()
            return self._device

    def __getitem__(self, name: str) -> Engine:
        """The engine of module `name`; raise `ExportIncomplete` when the export lacks it."""
        with self._lock:
            if name not in self._open:
                if name not in self.manifest.modules:
                    raise ExportIncomplete(
                        f"{self.folder} has no module {name}, which {self.builder.backend} needs.",
                        "It comes from an earlier version: export the model again.",
                    )
                spec = self.manifest.modules[name]
                self._open[name] = self._cache.open(
                    spec, self.folder, self.builder, self._progress, build=self._build
                )
            return self._open[name]

    def engine_manifests(self) -> dict[str, EngineManifest]:
        """Manifests of the engines that the cache has for these modules, by module name."""
        found = {
            name: self._cache.find(spec, self.builder)
            for name, spec in self.manifest.modules.items()
        }
        return {name: manifest for name, manifest in found.items() if manifest is not None}

    def __iter__(self) -> Iterator[str]:
        return iter(self.manifest.modules)

    def __len__(self) -> int:
        return len(self.manifest.modules)

    def close(self) -> None:
        """Close every engine that was opened, then their device."""
        with self._lock:
            for engine in self._open.values():
                engine.close()
            self._open.clear()
            if self._device is not None:
                self._device.close()
                self._device = None
