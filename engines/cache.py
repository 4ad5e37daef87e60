"""Where built engines are kept: by content, verified before use, built once.

    ROOT/KEY/engine.json + the backend's files     one engine; KEY is a hash of all that changes it
    ROOT/locks/KEY.lock                            held by the process that builds KEY
    ROOT/quarantine/KEY-TIME/                      entries that failed verification

Nothing in an entry is opened before its size and SHA-256 were compared with the manifest, and the
manifest is compared with its own key.

What an engine is: all that would change it, and the hash of that, which is its name.

Engines that can become the engine of another module by taking its weights.

Engines that are nearly the one that is wanted: what differs, and how long they took to build.
"""

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from platformdirs import user_cache_path

from fastface_trt.engines.engine import Engine, EngineBuilder, Progress
from fastface_trt.engines.files import (
    describe_file,
    finished_folder,
    storage_errors,
    sweep,
    verify_files,
)
from fastface_trt.engines.hardware import topology
from fastface_trt.engines.manifest import (
    ENGINE_MANIFEST,
    SCHEMA_VERSION,
    BuildReport,
    EngineManifest,
    ModuleSpec,
    read_manifest,
)
from fastface_trt.engines.onnx.file import OnnxFile
from fastface_trt.engines.weight_map import has_map, read_map
from fastface_trt.errors import BuildFailed, EngineMismatch, FastFaceError, UnknownName


def module_content(module: ModuleSpec) -> dict[str, Any]:
    """What a module is, wherever its files lie."""
    graph, *data = (file.sha256 for file in module.files)
    return {
        "module": module.name,
        "inputs": [tensor.model_dump() for tensor in module.inputs],
        "outputs": [tensor.model_dump() for tensor in module.outputs],
        "graph": graph,
        "data": sorted(data),
    }


def identity_of(manifest: EngineManifest) -> dict[str, Any]:
    """What `EngineBuilder.identity` said when the engine was built."""
    return manifest.model_dump(include={"backend", "backend_version", "options", "hardware"})


def engine_key(module: ModuleSpec, identity: Mapping[str, Any]) -> str:
    """The name of a module's engine by a builder's identity: SHA-256, 64 hexadecimal digits."""
    content = {
        "schema": SCHEMA_VERSION,
        **module_content(module),
        "builder": {"options": {}, "hardware": {}} | dict(identity),
    }
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


_IDENTITY = {"backend", "backend_version", "options", "hardware"}


def find_donors(
    engines: Iterable[EngineManifest],
    root: Path,
    module: ModuleSpec,
    source: Path,
    builder: EngineBuilder,
) -> list[EngineManifest]:
    """Those of `engines` in cache folder `root` that were built like `module` would be.

    Options and hardware that `builder` accepts, the same inputs and outputs, and the same graph but
    for its weights; in the order given. Whether every changed weight can be replaced shows later.
    """
    alike = [one for one in engines if may_donate(one, module, builder)]
    if not alike:
        return []
    donors = []
    try:
        with OnnxFile(source / module.files[0].path) as onnx:
            wanted = topology(onnx)
    except FastFaceError:
        return []  # whoever reads the file next says what is wrong with it
    for one in alike:
        try:
            if read_map(one, root / one.key).topology == wanted:
                donors.append(one)
        except FastFaceError:
            continue
    return donors


def may_donate(donor: EngineManifest, module: ModuleSpec, builder: EngineBuilder) -> bool:
    """Whether `builder` would use an engine of `module` that is built like `donor`."""
    same_module = (
        donor.module.name == module.name
        and donor.module.inputs == module.inputs
        and donor.module.outputs == module.outputs
    )
    if not same_module or not has_map(donor):
        return False
    same_build = {"options": {}, "hardware": {}} | dict(builder.identity(module))
    return build_identity(donor) == same_build or builder.takes(
        donor.model_copy(update=build_identity(donor))
    )


def build_identity(donor: EngineManifest) -> dict[str, Any]:
    """The builder's identity of an engine that a refit makes from `donor`.

    A stripped plan is a full one whose weights are missing, and a refit puts them in.
    """
    identity = donor.model_dump(include=_IDENTITY)
    identity["options"] = {k: v for k, v in donor.options.items() if k != "strip_weights"}
    return identity


_KEY = re.compile("[0-9a-f]{64}")
_QUARANTINED_AT_MOST = 2
_REBUILD = "It is set aside and built again on the next load."


@dataclass(frozen=True)
class CacheEntry:
    """One folder of the cache; `manifest` is None and `problem` says why when it is unreadable.

    `used` is when it was last opened or built, in seconds since 1970. Reading an entry verifies
    nothing but the manifest: see `EngineCache.verify`.
    """

    key: str
    folder: Path
    bytes: int
    used: float
    manifest: EngineManifest | None
    problem: str = ""


class EngineCache:
    """Engines by content. Safe for any number of threads and processes on one folder.

    `root` defaults to `engines` in `$FASTFACE_CACHE`, or in the user's cache folder.
    """

    def __init__(self, root: Path | None = None) -> None:
        if root is None:
            home = os.environ.get("FASTFACE_CACHE")
            cache = Path(home) if home else user_cache_path("fastface-trt", appauthor=False)
            root = cache / "engines"
        self.root = root.expanduser().absolute()

    def key(self, module: ModuleSpec, builder: EngineBuilder) -> str:
        """What `module` built by `builder` is called: 64 hexadecimal digits (SHA-256).

        It depends on the module's name, inputs, outputs and file contents, on
        `builder.identity(module)` and on the schema version; not on where anything lies.
        """
        return engine_key(module, builder.identity(module))

    def get(
        self,
        module: ModuleSpec,
        source: Path,
        builder: EngineBuilder,
        progress: Progress = lambda line: None,
        *,
        build: bool = True,
    ) -> tuple[EngineManifest, Path]:
        """The verified engine of `module`, built from its ONNX files in `source` if need be.

        Returns its manifest and its folder: the engine that `builder` would make, or one of the
        same module that it takes instead. An entry that fails verification is quarantined and built
        again. While another process builds the same engine, this waits for it. `source` is read
        only when something has to be built.

        Raises `ExportIncomplete` for a missing, truncated or changed ONNX file, `BuildFailed` from
        the builder, `StorageError` for a full or unwritable disk, `BackendUnavailable`, and with
        `build=False` `EngineMismatch` when there is no engine, naming what the nearest one differs
        in.
        """
        key = self.key(module, builder)
        # Without the lock, so that engines on a read-only disk serve, and readers never queue.
        for known in (key, *self._taken(module, builder)):
            with suppress(FastFaceError):
                manifest = self._checked(known, progress)
                _note_use(self.root / known)
                return manifest, self.root / known
        relatives = find_relatives(self.entries(), module, builder.identity(module))
        if not build:
            raise EngineMismatch(
                f"There is no engine of {module.name} for {builder.backend} in {self.root}."
                + (f" {relatives[0].words()}" if relatives else ""),
                f"Build it first: fastface-trt build --backend {builder.backend} --export FOLDER.",
            )
        if relatives:
            progress(relatives[0].words())
        with self._locked(key, f"{module.name} for {builder.backend}", progress):
            folder = self.root / key
            if (whole := self._whole(key, progress)) is not None:
                return whole, folder

            def write(target: Path) -> BuildReport:
                self._mention_refit(module, source, builder, progress)
                progress(f"Building {module.name} for {builder.backend}")
                return builder.build(module, source, target, progress)

            return self._make(key, module, source, builder, write, progress), folder

    def make(
        self,
        module: ModuleSpec,
        source: Path,
        builder: EngineBuilder,
        write: Callable[[Path], BuildReport],
        progress: Progress = lambda line: None,
    ) -> tuple[EngineManifest, Path]:
        """The verified engine of `module`, written by `write` instead of built where it is missing.

        `write` fills an empty folder with what `builder.open` reads; an exception in it leaves the
        cache as it was. Otherwise as `get`, with the same key: what it writes must be as good.
        """
        key = self.key(module, builder)
        folder = self.root / key
        with self._locked(key, f"{module.name} for {builder.backend}", progress):
            if (whole := self._whole(key, progress)) is not None:
                return whole, folder
            return self._make(key, module, source, builder, write, progress), folder

    def adopt(
        self,
        manifest: EngineManifest,
        write: Callable[[Path], None],
        progress: Progress = lambda line: None,
    ) -> Path:
        """The folder of an engine that another machine built; `write` fills an empty one with it.

        Raises `EngineMismatch` when the manifest or the files are not what the key says.
        """
        key, folder = manifest.key, self.root / manifest.key
        if key != engine_key(manifest.module, identity_of(manifest)):
            raise EngineMismatch(f"An engine called {key[:12]} is another one.", "Build it here.")
        with self._locked(key, manifest.module.name, progress):
            if self._whole(key, progress) is not None:
                return folder
            with finished_folder(folder, ENGINE_MANIFEST) as draft:
                write(draft.path)
                verify_files(draft.path, manifest.files, EngineMismatch, "Build it here.")
                return draft.finish(manifest)

    def open(
        self,
        module: ModuleSpec,
        source: Path,
        builder: EngineBuilder,
        progress: Progress = lambda line: None,
        *,
        build: bool = True,
    ) -> Engine:
        """`get`, then `builder.open`: an engine that can be called. Close it after use.

        Raises `BackendUnavailable` before anything is built when it could not run here.
        """
        builder.check_runs_here()
        manifest, folder = self.get(module, source, builder, progress, build=build)
        progress(f"Opening {module.name} with {builder.backend}")
        return builder.open(manifest, folder)

    def find(self, module: ModuleSpec, builder: EngineBuilder) -> EngineManifest | None:
        """The manifest of the engine that `get` would return without building, or None.

        Its files are not verified.
        """
        for known in (self.key(module, builder), *self._taken(module, builder)):
            if (manifest := self._entry(known).manifest) is not None:
                return manifest
        return None

    def entries(self) -> list[CacheEntry]:
        """All engines in the cache, in the order of their keys; their files are not verified."""
        if not self.root.is_dir():
            return []
        return [
            self._entry(folder.name)
            for folder in sorted(self.root.iterdir())
            if folder.is_dir() and _KEY.fullmatch(folder.name)
        ]

    def manifests(self) -> list[EngineManifest]:
        """Manifests of all readable engines, newest first; their files are not verified."""
        found = [entry for entry in self.entries() if entry.manifest is not None]
        found.sort(key=lambda entry: _last_use(entry.folder), reverse=True)
        return [entry.manifest for entry in found if entry.manifest is not None]

    def verify(self, key: str) -> EngineManifest:
        """Check every file of engine `key` and return its manifest; nothing is changed.

        Raises `UnknownName` when there is no such engine, `EngineMismatch`, `ExportIncomplete` or
        `ManifestError` saying which file is missing, truncated or changed.
        """
        self._require(key)
        return self._checked(key, lambda line: None)

    def remove(self, key: str) -> int:
        """Delete engine `key` and return the bytes freed; raise `UnknownName` without one.

        Waits for a process that is building it. Engines that are open stay usable.
        """
        self._require(key)
        with self._locked(key, key[:12], lambda line: None):
            size = _folder_bytes(self.root / key)
            doomed = self._quarantine(key)
            if doomed is not None:
                shutil.rmtree(doomed, ignore_errors=True)
        return size

    def sweep(self) -> int:
        """Delete what was set aside or left by processes that died; returns the bytes freed."""
        place = self.root / "quarantine"
        before = _folder_bytes(self.root)
        sweep(self.root)
        shutil.rmtree(place, ignore_errors=True)
        return before - _folder_bytes(self.root)

    def _taken(self, module: ModuleSpec, builder: EngineBuilder) -> list[str]:
        """Keys of other engines of exactly this module that `builder` takes, newest first."""
        wanted = module_content(module)
        found = [
            entry
            for entry in self.entries()
            if entry.manifest is not None
            and module_content(entry.manifest.module) == wanted
            and builder.takes(entry.manifest)
        ]
        return [entry.key for entry in sorted(found, key=lambda entry: -entry.used)]

    def _require(self, key: str) -> None:
        if not _KEY.fullmatch(key) or not (self.root / key).is_dir():
            raise UnknownName("engine", key, (entry.key for entry in self.entries()))

    def _entry(self, key: str) -> CacheEntry:
        folder = self.root / key
        size, used = _folder_bytes(folder), _last_use(folder)
        try:
            manifest = read_manifest(folder / ENGINE_MANIFEST, EngineManifest)
        except FastFaceError as error:
            return CacheEntry(key, folder, size, used, None, error.message)
        return CacheEntry(key, folder, size, used, manifest)

    def _checked(self, key: str, progress: Progress) -> EngineManifest:
        """The manifest of `key` after comparing it with its key and its files with it."""
        folder = self.root / key
        manifest = read_manifest(folder / ENGINE_MANIFEST, EngineManifest)
        if not key == manifest.key == engine_key(manifest.module, identity_of(manifest)):
            raise EngineMismatch(f"{folder / ENGINE_MANIFEST} describes another engine.", _REBUILD)
        progress(f"Verifying {manifest.module.name} for {manifest.backend}")
        verify_files(folder, manifest.files, EngineMismatch, _REBUILD)
        return manifest

    def _whole(self, key: str, progress: Progress) -> EngineManifest | None:
        """`_checked`, or None where there is nothing; what is damaged is set aside."""
        if not (self.root / key).exists():
            return None
        try:
            return self._checked(key, progress)
        except FastFaceError as problem:
            progress(f"Engine {key[:12]} is set aside: {problem.message}")
            self._quarantine(key)
            return None

    def _mention_refit(
        self, module: ModuleSpec, source: Path, builder: EngineBuilder, progress: Progress
    ) -> None:
        donors = find_donors(self.manifests(), self.root, module, source, builder)
        if donors:
            progress(
                f"Without a build, from engine {donors[0].key[:12]}: fastface-trt refit "
                f"--backend {builder.backend} --export {source} --module {module.name}"
            )

    def _make(
        self,
        key: str,
        module: ModuleSpec,
        source: Path,
        builder: EngineBuilder,
        write: Callable[[Path], BuildReport],
        progress: Progress,
    ) -> EngineManifest:
        progress(f"Verifying the ONNX files of {module.name}")
        verify_files(source, module.files)
        # Leftovers of other keys too: nobody may ever ask for those keys again.
        sweep(self.root)
        began = time.monotonic()
        with finished_folder(self.root / key, ENGINE_MANIFEST) as draft:
            report = write(draft.path)
            written = sorted(path for path in draft.path.rglob("*") if path.is_file())
            if not written:
                raise BuildFailed(f"The {builder.backend} builder wrote nothing for {module.name}.")
            manifest = EngineManifest(
                key=key,
                module=module,
                files=tuple(describe_file(draft.path, path) for path in written),
                build_seconds=time.monotonic() - began,
                report=report,
                **builder.identity(module),
            )
            progress(f"Storing {module.name} for {builder.backend}")
            draft.finish(manifest)
        return manifest

    def _quarantine(self, key: str) -> Path | None:
        """Move entry `key` out of the way, keep only the newest few; None when it is gone."""
        place = self.root / "quarantine"
        with storage_errors(self.root):
            place.mkdir(parents=True, exist_ok=True)
            aside = place / f"{key}-{time.time_ns()}"
            try:
                os.rename(self.root / key, aside)
            except FileNotFoundError:
                return None
        kept = sorted(place.iterdir(), key=lambda path: path.name.rpartition("-")[2])
        for old in kept[:-_QUARANTINED_AT_MOST]:
            shutil.rmtree(old, ignore_errors=True)
        return aside

    @contextmanager
    def _locked(self, key: str, what: str, progress: Progress) -> Iterator[None]:
        """Hold the lock of `key`, an operating-system lock that ends with the process."""
        with storage_errors(self.root):
            (self.root / "locks").mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.root / "locks" / f"{key}.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                progress(f"Waiting for another process that builds {what}")
                lock.acquire(poll_interval=0.2)
        try:
            yield
        finally:
            lock.release()


def _note_use(folder: Path) -> None:
    """The manifest's time is when the engine was last used; a read-only disk keeps the old one."""
    with suppress(OSError):
        os.utime(folder / ENGINE_MANIFEST)


def _last_use(folder: Path) -> float:
    with suppress(OSError):
        return (folder / ENGINE_MANIFEST).stat().st_mtime
    return 0.0


def _folder_bytes(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total


if TYPE_CHECKING:
    pass

_FIELDS = ("backend_version", "hardware", "options")


@dataclass(frozen=True)
class Relative:
    """An engine of the same module name and backend, and the fields in which it differs.

    `differences` maps a field (`onnx` for the module itself) to its value there and here.
    """

    manifest: EngineManifest
    differences: Mapping[str, tuple[str, str]]

    def words(self) -> str:
        """One sentence that names the fields."""
        parts = [
            f"{field} {there}, here {here}" if there else f"another {field}"
            for field, (there, here) in self.differences.items()
        ]
        name, key = self.manifest.module.name, self.manifest.key[:12]
        return f"An engine of {name} ({key}) was built with {'; '.join(parts)}."


def find_relatives(
    entries: Iterable["CacheEntry"], module: ModuleSpec, identity: Mapping[str, Any]
) -> list[Relative]:
    """Engines of the module called `module.name` for the same backend, the nearest first."""
    found = [
        Relative(entry.manifest, _differences(entry.manifest, module, identity))
        for entry in entries
        if entry.manifest is not None
        and entry.manifest.module.name == module.name
        and entry.manifest.backend == identity["backend"]
    ]
    return sorted(found, key=lambda relative: len(relative.differences))


def expected_seconds(
    entries: Iterable["CacheEntry"], module: ModuleSpec, identity: Mapping[str, Any]
) -> float | None:
    """How long building `module` will take, judged by an earlier build; None without one.

    The most alike engine's time, scaled by the module's size and the number of profiles, which
    each are compiled by themselves.
    """
    relatives = [
        one for one in find_relatives(entries, module, identity) if _bytes(one.manifest.module)
    ]
    if not relatives:
        return None
    like = relatives[0].manifest
    profiles = [
        max(1, len(options.get("profiles", ())))
        for options in (identity.get("options", {}), like.options)
    ]
    return like.build_seconds * _bytes(module) / _bytes(like.module) * profiles[0] / profiles[1]


def _differences(
    manifest: EngineManifest, module: ModuleSpec, identity: Mapping[str, Any]
) -> dict[str, tuple[str, str]]:
    differences: dict[str, tuple[str, str]] = {}
    for field in _FIELDS:
        there, here = getattr(manifest, field), identity.get(field, {})
        if there == here:
            continue
        if not isinstance(there, Mapping):
            differences[field] = (there, here)
            continue
        for name in sorted(there.keys() | here.keys()):
            if there.get(name) != here.get(name):
                # Profiles are tables, too long for a sentence.
                simple = not isinstance(there.get(name, here.get(name)), list | dict)
                values = (str(there.get(name, "none")), str(here.get(name, "none")))
                differences[name] = values if simple else ("", "")
    if [file.sha256 for file in manifest.module.files] != [file.sha256 for file in module.files]:
        differences["ONNX file"] = ("", "")
    return differences


def _bytes(module: ModuleSpec) -> int:
    return sum(file.bytes for file in module.files)
