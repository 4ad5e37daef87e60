"""An export: which folder is meant, what its manifest says, and its modules opened as engines."""

import hashlib
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from fastface_trt.checkpoints import CHECKPOINTS, find_checkpoint
from fastface_trt.engines.cache import EngineCache
from fastface_trt.engines.device import Device
from fastface_trt.engines.engine import Closing, Engine, EngineBuilder, Progress
from fastface_trt.engines.files import unnamed_files, verify_files
from fastface_trt.engines.manifest import (
    EXPORT_MANIFEST,
    EngineManifest,
    ExportManifest,
    ModuleSpec,
    read_manifest,
)
from fastface_trt.engines.onnx.file import check_references
from fastface_trt.errors import ExportIncomplete, Unavailable, UnknownName
from fastface_trt.mini import folders
from fastface_trt.runtime.schedule import Schedule, make_schedule, with_network_of

_TOKENIZERS = ("tokenizer", "tokenizer_2")


@dataclass(frozen=True, slots=True)
class Export:
    """A folder of ONNX modules, and what its manifest says of them."""

    folder: Path
    manifest: ExportManifest

    @classmethod
    def open(
        cls, export: str | os.PathLike[str] = "mini", *, schedule_of: str | None = None
    ) -> "Export":
        """The export that is meant by `find_export`; only its manifest is read.

        `schedule_of` names a checkpoint of the registry whose sampler and steps stand in for the
        export's own. Raises `ExportIncomplete`, `ManifestError`, `UnknownName`.
        """
        folder = find_export(export)
        if not os.path.exists(folder):  # Path.exists raises for a name that is too long
            raise _no_export(str(export))
        manifest = read_manifest(folder / EXPORT_MANIFEST, ExportManifest)
        if schedule_of is not None:
            manifest = with_schedule_of(manifest, schedule_of)
        return cls(folder, manifest)

    @property
    def face_parser(self) -> Path | None:
        """The ONNX file that finds the background around a face for PuLID."""
        parser = self.manifest.face_parser
        return None if parser is None else self.folder / parser

    def verify_small(self) -> None:
        """Check the small files beside the modules: tokenizers, face models.

        Their readers look for files by name or kind, so their folders hold what the manifest names
        and nothing else, and graphs among them read nothing else. Raises `ExportIncomplete`.
        """
        files = self.manifest.extra_files
        named = [file.path for file in files]
        verify_files(self.folder, files)
        for folder in {*_TOKENIZERS, *(name.rpartition("/")[0] for name in named)} - {""}:
            for unnamed in unnamed_files(self.folder, folder, named):
                raise ExportIncomplete(
                    f"{self.folder} holds {unnamed}, which its manifest does not name.",
                    "Move it elsewhere, or export again with it.",
                )
        for name in named:
            if name.endswith(".onnx"):
                check_references(self.folder, name, named)

    def module(self, name: str) -> ModuleSpec:
        """The module `name`; raise `UnknownName` where the export has no such one."""
        if name not in self.manifest.modules:
            raise UnknownName("module", name, self.manifest.modules)
        return self.manifest.modules[name]

    def schedule(self, steps: int) -> Schedule:
        """The scheduler's arithmetic for so many steps."""
        return make_schedule(self.manifest.scheduler, steps)


def find_export(export: str | os.PathLike[str]) -> Path:
    """The folder of an export; the string `mini` means the one that ships with the package.

    A folder of that name in the working directory is `./mini`, or a `Path`.
    """
    return folders.EXPORT if export == "mini" else Path(export)


def _no_export(name: str) -> ExportIncomplete:
    """The error for a folder that does not exist, with what its name may have meant."""
    path = Path(name)
    what, hint = "", "Check the path of the export."
    if "#" in name or "://" in name:
        address = name if "#" in name else f"{name}#TAG"
        what = "; it looks like a release"
        hint = f"Obtain it first: fastface-trt obtain {shlex.quote(address)}"
    elif path.name in CHECKPOINTS:
        target = path if path.parent.name else Path("exports", name)
        what = f"; {path.name} is a checkpoint"
        hint = f"Export it first: fastface-trt export --checkpoint {path.name} {target}"
    # With one slash: OWNER/NAME, unless the first is a folder here.
    elif re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) and not path.parent.exists():
        what = "; it looks like a repository of the hub"
        command = f"fastface-trt export --checkpoint hyper --base {name} exports/{path.name}"
        hint = f"Export it first: {command}"
    return ExportIncomplete(f"There is no folder {name:.200}{what}.", hint)


def with_schedule_of(manifest: ExportManifest, checkpoint: str) -> ExportManifest:
    """`manifest` with the sampler and the steps of another checkpoint of the registry.

    What the network was trained with stays. Nothing of this is in an engine, so none is built.
    Raises `UnknownName`.
    """
    entry = find_checkpoint(checkpoint)
    return manifest.model_copy(
        update={
            "scheduler": with_network_of(entry.scheduler, manifest.scheduler),
            "steps": entry.steps,
            "allowed_steps": entry.allowed_steps,
        }
    )


class ModuleSet(Closing, Mapping[str, Engine]):
    """An export's engines by module name, opened at first use and closed together.

    They are taken from the cache, and built where they are missing; with `build=False` a missing
    engine is an error instead. The small files beside the modules are checked at once, a module's
    own files when it has to be built.
    """

    def __init__(
        self,
        export: Export,
        builder: EngineBuilder,
        cache: EngineCache,
        progress: Progress = lambda line: None,
        *,
        build: bool = True,
    ) -> None:
        export.verify_small()
        self.export = export
        self.builder = builder
        self._cache = cache
        self._progress = progress
        self._build = build
        self._open: dict[str, Engine] = {}
        self._device: Device | None = None
        self._hash: str | None = None
        self._closed = False
        self._lock = Lock()

    @property
    def manifest(self) -> ExportManifest:
        """The manifest of the export."""
        return self.export.manifest

    @property
    def device(self) -> Device:
        """Where the tensors of all these engines live; closed with them."""
        with self._lock:
            self._device = self._device or self.builder.device()
            return self._device

    def __getitem__(self, name: str) -> Engine:
        """The engine of module `name`; raise `ExportIncomplete` when the export lacks it."""
        self.require_open()
        with self._lock:
            if name not in self._open:
                spec = self.manifest.modules.get(name)
                if spec is None:
                    raise ExportIncomplete(
                        f"{self.export.folder} has no module {name}, "
                        f"which {self.builder.backend} needs.",
                        "It comes from an earlier version: export the model again.",
                    )
                self._open[name] = self._cache.open(
                    spec, self.export.folder, self.builder, self._progress, build=self._build
                )
            return self._open[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.manifest.modules)

    def __len__(self) -> int:
        return len(self.manifest.modules)

    def engine_manifests(self) -> dict[str, EngineManifest]:
        """Manifests of the engines that the cache has for these modules, by module name."""
        found = {
            name: self._cache.find(spec, self.builder)
            for name, spec in self.manifest.modules.items()
        }
        return {name: manifest for name, manifest in found.items() if manifest is not None}

    @property
    def export_hash(self) -> str:
        """Of the manifest, which has the hashes of all files."""
        if self._hash is None:
            self._hash = hashlib.sha256(self.manifest.model_dump_json().encode()).hexdigest()
        return self._hash

    def require_open(self) -> None:
        """Raise `Unavailable` after `close`: what was freed does not come back by itself."""
        if self._closed:
            raise Unavailable(
                f"The export {self.export.folder.name} was closed.",
                "Load it again, or make pictures inside the with block.",
            )

    def close(self) -> None:
        """Close every engine that was opened, then their device."""
        with self._lock:
            self._closed = True
            for engine in self._open.values():
                engine.close()
            self._open.clear()
            if self._device is not None:
                self._device.close()
                self._device = None
