"""The modules of an export, opened as engines of one backend on first use."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from threading import Lock

from fastface_trt.engines.cache import EngineCache
from fastface_trt.engines.closing import Closing
from fastface_trt.engines.engine import Engine, EngineBuilder, Progress
from fastface_trt.engines.files import verify_files
from fastface_trt.engines.manifest import EXPORT_MANIFEST, ExportManifest, read_manifest
from fastface_trt.errors import ExportIncomplete


class ModuleSet(Closing, Mapping[str, Engine]):
    """Engines by module name: taken from the cache, built where they are missing, closed together.

    With `build=False` a missing engine is an error instead.

    Reading the export checks its manifest and the small files beside the modules; a module's own
    files are checked when it has to be built.
    """

    def __init__(
        self,
        export: Path,
        builder: EngineBuilder,
        cache: EngineCache,
        progress: Progress = lambda line: None,
        *,
        build: bool = True,
    ) -> None:
        self.folder = export
        self.manifest = read_manifest(export / EXPORT_MANIFEST, ExportManifest)
        verify_files(export, self.manifest.extra_files, ExportIncomplete)
        self.builder = builder
        self._cache = cache
        self._progress = progress
        self._build = build
        self._open: dict[str, Engine] = {}
        self._lock = Lock()

    def __getitem__(self, name: str) -> Engine:
        with self._lock:
            if name not in self._open:
                spec = self.manifest.modules[name]
                self._open[name] = self._cache.open(
                    spec, self.folder, self.builder, self._progress, build=self._build
                )
            return self._open[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.manifest.modules)

    def __len__(self) -> int:
        return len(self.manifest.modules)

    def close(self) -> None:
        """Close every engine that was opened."""
        with self._lock:
            for engine in self._open.values():
                engine.close()
            self._open.clear()
