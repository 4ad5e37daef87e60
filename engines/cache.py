"""Where built engines are kept: by content, verified before use, built once.

    ROOT/KEY/engine.json + the backend's files     one engine; KEY is a hash of all that changes it
    ROOT/locks/KEY.lock                            held by the process that builds KEY
    ROOT/quarantine/KEY-TIME/                      entries that failed verification

Nothing in an entry is opened before its size and SHA-256 were compared with the manifest, and the
manifest is compared with its own key. Of an export's module, nothing is opened that its manifest
does not name, whatever its graph says.

Whoever wants an engine computes its key and opens that entry. Only where there is none are the
others read, as `near_matches`: one of them may serve as it is, or take the module's weights (see
`refit`), or say what it differs in and how long a build takes.
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
from pathlib import Path, PurePosixPath
from typing import Any

from filelock import FileLock, Timeout
from platformdirs import user_cache_path

from fastface_trt.engines.engine import Engine, EngineBuilder, Progress
from fastface_trt.engines.files import (
    describe_file,
    finished_folder,
    possible_folder,
    storage_errors,
    sweep,
    unnamed_files,
    verify_files,
)
from fastface_trt.engines.manifest import (
    ENGINE_MANIFEST,
    SCHEMA_VERSION,
    BuildReport,
    EngineManifest,
    ModuleSpec,
    read_manifest,
)
from fastface_trt.engines.onnx.file import OnnxFile, verify_module
from fastface_trt.engines.weight_map import first_difference, has_map, read_map, topology
from fastface_trt.errors import BuildFailed, EngineMismatch, FastFaceError, UnknownName


def engine_key(module: ModuleSpec, identity: Mapping[str, Any]) -> str:
    """The name of a module's engine by a builder's identity: SHA-256, 64 hexadecimal digits."""
    content = {
        "schema": SCHEMA_VERSION,
        **_module_content(module),
        "builder": {"options": {}, "hardware": {}} | dict(identity),
    }
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def identity_of(manifest: EngineManifest) -> dict[str, Any]:
    """What `EngineBuilder.identity` said when the engine was built."""
    return manifest.model_dump(include={"backend", "backend_version", "options", "hardware"})


def refitted_identity(base: EngineManifest) -> dict[str, Any]:
    """What a builder that makes engines like `base` by a refit says.

    A stripped plan is a full one whose weights are missing, and a refit puts them in.
    """
    identity = identity_of(base)
    identity["options"] = {k: v for k, v in base.options.items() if k != "strip_weights"}
    return identity


def _module_content(module: ModuleSpec) -> dict[str, Any]:
    """What a module is, wherever its files lie."""
    graph, *data = module.files
    hashes = sorted(file.sha256 for file in data)
    # The graph says what one data file is called; of several, which is which.
    place = PurePosixPath(graph.path).parent
    names = sorted(os.path.relpath(file.path, place) + ":" + file.sha256 for file in data)
    return {
        "module": module.name,
        "inputs": [tensor.model_dump() for tensor in module.inputs],
        "outputs": [tensor.model_dump() for tensor in module.outputs],
        "graph": graph.sha256,
        "data": hashes if len(data) < 2 else names,
    }


@dataclass(frozen=True)
class NearMatch:
    """An engine of a module of this name for this backend; see `EngineCache.near_matches`.

    `differences` maps a field (`ONNX file` for the module itself) to its value there and here.
    `serves` says that the builder takes it as it is, for the very same module; `refits` that it
    would take it with the weights of the module, which needs the same graph.
    """

    manifest: EngineManifest
    folder: Path
    differences: Mapping[str, tuple[str, str]]
    serves: bool
    refits: bool

    def __str__(self) -> str:
        """One sentence that names the differences."""
        parts = [
            f"{field} {there}, here {here}" if there else f"another {field}"
            for field, (there, here) in self.differences.items()
        ]
        name, key = self.manifest.module.name, self.manifest.key[:12]
        return f"An engine of {name} ({key}) was built with {'; '.join(parts)}."


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

    `root` defaults to `engines` in `$FASTFACE_CACHE`, or in the user's cache folder. Raises
    `StorageError` where it cannot be the name of a folder.
    """

    def __init__(self, root: Path | None = None) -> None:
        if root is None:
            home = os.environ.get("FASTFACE_CACHE")
            cache = Path(home) if home else user_cache_path("fastface-trt", appauthor=False)
            root = cache / "engines"
        self.root = possible_folder(root)

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
        if (ready := self._ready(key, progress)) is not None:
            return ready
        near = self.near_matches(module, builder)
        for match in near:
            if match.serves and (ready := self._ready(match.folder.name, progress)) is not None:
                return ready
        others = [match for match in near if match.differences]
        nearest = min(others, key=lambda match: len(match.differences), default=None)
        if not build:
            raise EngineMismatch(
                f"There is no engine of {module.name} for {builder.backend} in {self.root}."
                + (f" {nearest}" if nearest else ""),
                f"Build it first: fastface-trt build --backend {builder.backend} --export FOLDER.",
            )
        if nearest:
            progress(str(nearest))
        with self._locked(key, f"{module.name} for {builder.backend}", progress):
            folder = self.root / key
            if (whole := self._whole(key, progress)) is not None:
                return whole, folder

            def write(target: Path) -> BuildReport:
                base: NearMatch | None = None
                with suppress(FastFaceError):  # whoever reads a broken file next says what is wrong
                    base = refit_base(near, module, source)
                if base is not None:
                    progress(
                        f"Without a build, from engine {base.manifest.key[:12]}: fastface-trt "
                        f"refit --backend {builder.backend} --export {source} "
                        f"--module {module.name}"
                    )
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
        key = self.key(module, builder)
        with suppress(FastFaceError):
            return self._manifest(key)
        near = self.near_matches(module, builder)
        return next((match.manifest for match in near if match.serves), None)

    def near_matches(self, module: ModuleSpec, builder: EngineBuilder) -> list[NearMatch]:
        """Engines like the one that `builder` would make of `module`, the last used first.

        Reads the manifest of every engine in the cache, and none of their other files.
        """
        identity = {"options": {}, "hardware": {}} | dict(builder.identity(module))
        near = []
        for key in sorted(self._keys(), key=lambda key: -_last_use(self.root / key)):
            try:
                manifest = self._manifest(key)
            except FastFaceError:
                continue
            if (manifest.module.name, manifest.backend) != (module.name, identity["backend"]):
                continue
            differences = _differences(manifest, module, identity)
            same = _module_content(manifest.module) == _module_content(module)
            serves = same and builder.takes(manifest)
            refits = _takes_weights(manifest, module, builder, identity)
            near.append(NearMatch(manifest, self.root / key, differences, serves, refits))
        return near

    def expected_seconds(self, module: ModuleSpec, builder: EngineBuilder) -> float | None:
        """How long building `module` will take, judged by an earlier build; None without one.

        The nearest match's time, scaled by the module's size and the number of profiles, which each
        are compiled by themselves.
        """
        near = [one for one in self.near_matches(module, builder) if _bytes(one.manifest.module)]
        if not near:
            return None
        like = min(near, key=lambda match: len(match.differences)).manifest
        profiles = [
            max(1, len(options.get("profiles", ())))
            for options in (builder.identity(module).get("options", {}), like.options)
        ]
        return like.build_seconds * _bytes(module) / _bytes(like.module) * profiles[0] / profiles[1]

    def entries(self) -> list[CacheEntry]:
        """All engines in the cache, in the order of their keys; their files are not verified."""
        return [self._entry(key) for key in sorted(self._keys())]

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

    def _require(self, key: str) -> None:
        if not _KEY.fullmatch(key) or not (self.root / key).is_dir():
            raise UnknownName("engine", key, sorted(self._keys()))

    def _keys(self) -> list[str]:
        if not self.root.is_dir():
            return []
        return [
            one.name for one in self.root.iterdir() if _KEY.fullmatch(one.name) and one.is_dir()
        ]

    def _manifest(self, key: str) -> EngineManifest:
        return read_manifest(self.root / key / ENGINE_MANIFEST, EngineManifest)

    def _entry(self, key: str) -> CacheEntry:
        folder = self.root / key
        size, used = _folder_bytes(folder), _last_use(folder)
        try:
            return CacheEntry(key, folder, size, used, self._manifest(key))
        except FastFaceError as error:
            return CacheEntry(key, folder, size, used, None, error.message)

    def _ready(self, key: str, progress: Progress) -> tuple[EngineManifest, Path] | None:
        """Engine `key` and its folder, verified and noted as used; None for none that is whole."""
        with suppress(FastFaceError):
            manifest = self._checked(key, progress)
            _note_use(self.root / key)
            return manifest, self.root / key
        return None

    def _checked(self, key: str, progress: Progress) -> EngineManifest:
        """The manifest of `key` after comparing it with its key and its files with it."""
        folder = self.root / key
        manifest = self._manifest(key)
        if not key == manifest.key == engine_key(manifest.module, identity_of(manifest)):
            raise EngineMismatch(f"{folder / ENGINE_MANIFEST} describes another engine.", _REBUILD)
        progress(f"Verifying {manifest.module.name} for {manifest.backend}")
        verify_files(folder, manifest.files, EngineMismatch, _REBUILD)
        # What a builder's library would find there by its name, or a graph refer to.
        named = [ENGINE_MANIFEST, *(file.path for file in manifest.files)]
        for extra in unnamed_files(folder, ".", named):
            raise EngineMismatch(f"{folder} holds {extra}, which is not of it.", _REBUILD)
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
        verify_module(source, module)
        # Stale folders of other keys too: nobody may ever ask for those keys again.
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


def refit_base(near: Iterable[NearMatch], module: ModuleSpec, source: Path) -> NearMatch:
    """The first of `near` that takes the weights of `module`, whose ONNX files lie in `source`.

    Whether every weight that differs can be replaced shows in the refit. Raises `EngineMismatch`
    saying what is in the way where there is none, `ExportIncomplete` for an ONNX file that is cut.
    """
    problems = []
    candidates = [match for match in near if match.refits]
    if candidates:
        with OnnxFile(source / module.files[0].path) as onnx:
            wanted = topology(onnx)
        for match in candidates:
            try:
                part = first_difference(read_map(match.manifest, match.folder).topology, wanted)
            except EngineMismatch as error:
                problems.append(error.message)
                continue
            if part is None:
                return match
            key = match.manifest.key[:12]
            problems.append(f"the graph of {key} is another one: {part} differs.")
    else:
        problems.append("no engine with the same inputs, options and a weight map is in the cache.")
    raise EngineMismatch(
        f"{module.name} cannot be made by a refit: {problems[0]}",
        "Build it instead: fastface-trt build.",
    )


def _takes_weights(
    manifest: EngineManifest, module: ModuleSpec, builder: EngineBuilder, identity: dict[str, Any]
) -> bool:
    """Whether `builder` would use an engine of `module` that is built like this one."""
    same_interface = (
        manifest.module.inputs == module.inputs and manifest.module.outputs == module.outputs
    )
    if not same_interface or not has_map(manifest):
        return False
    refitted = refitted_identity(manifest)
    return refitted == identity or builder.takes(manifest.model_copy(update=refitted))


def _differences(
    manifest: EngineManifest, module: ModuleSpec, identity: Mapping[str, Any]
) -> dict[str, tuple[str, str]]:
    differences: dict[str, tuple[str, str]] = {}
    for field in ("backend_version", "hardware", "options"):
        there, here = getattr(manifest, field), identity[field]
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
