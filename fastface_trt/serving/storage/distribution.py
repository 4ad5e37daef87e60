"""Exports and their engines through shared storage: published once, obtained by every machine.

What is obtained is checked by hash while it streams, lies in a folder that is complete or absent,
and is fetched once per machine however many processes ask. A tag names the release that is meant
now, so a rolling update is a tag that changes.

Whoever may write to the storage decides which engines run: an address with a hash instead of a tag
is safe from that, since everything below it is checked against it.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from platformdirs import user_cache_path

from fastface_trt.engines.backends import make_builder
from fastface_trt.engines.cache import CacheEntry, EngineCache
from fastface_trt.engines.engine import EngineBuilder, Progress
from fastface_trt.engines.files import (
    finished_folder,
    possible_folder,
    storage_errors,
    verify_files,
    write_text_durably,
)
from fastface_trt.engines.manifest import (
    ENGINE_MANIFEST,
    EXPORT_MANIFEST,
    EngineManifest,
    ExportManifest,
    FileEntry,
    Manifest,
    Strict,
)
from fastface_trt.errors import EngineMismatch, ExportIncomplete, FastFaceError, ManifestError
from fastface_trt.runtime.export_folder import Export
from fastface_trt.serving.settings import WorkerSettings
from fastface_trt.serving.storage.objects import BLOCK, LocalObjects, Storage
from fastface_trt.serving.storage.release import (
    RELEASE_LIMIT,
    Address,
    ManifestEntry,
    Release,
    check_places,
    check_tag,
    is_address,
    object_name,
    parse_address,
    parse_document,
    release_name,
    sha256_of,
    tag_name,
    to_json,
)


def _silent(line: str) -> None:
    """Progress that nobody asked for."""


@dataclass(frozen=True)
class Obtained:
    """A release on this machine: the export's folder, ready for `FastFace.load`."""

    address: Address
    """With the hash of the release, whatever the tag was."""
    folder: Path
    manifest: ExportManifest
    engines: Mapping[str, ManifestEntry]


def publish(
    export: str | os.PathLike[str],
    url: str,
    *,
    tag: str | None = None,
    engines: Iterable[CacheEntry] = (),
    overwrite: bool = False,
    progress: Progress = _silent,
) -> Address:
    """Put an export, and engines of it, into the storage at `url`; returns the pinned address.

    Objects that are there are not sent again, unless `overwrite`. The tag is set last, so a release
    that can be named is whole. Raises `ExportIncomplete` when a file does not match its manifest,
    `ManifestError`, `InvalidRequest` for a bad tag, `StorageError`, `MissingDependency`.
    """
    if tag is not None:
        check_tag(tag)
    opened = Export.open(export)
    storage = Storage(url)
    sender = _Sender(storage, overwrite, progress)
    entry = sender.folder(opened.folder, opened.manifest, opened.manifest.files(), EXPORT_MANIFEST)
    sent = {}
    for engine in engines:
        if engine.manifest is not None:
            known = engine.manifest
            sent[engine.key] = sender.folder(engine.folder, known, known.files, ENGINE_MANIFEST)
    content = to_json(Release(export=entry, engines=sent))
    release = sha256_of(content)
    storage.write(release_name(release), [content])
    if tag is not None:
        storage.write(tag_name(tag), [f"{release}\n".encode()])
    return Address(storage.url, release)


def engines_of(manifest: ExportManifest, cache: EngineCache) -> list[CacheEntry]:
    """Engines in a cache that were built from an export's modules, for any backend."""
    modules = {_files_of(module.files) for module in manifest.modules.values()}
    return [
        entry
        for entry in cache.entries()
        if entry.manifest is not None and _files_of(entry.manifest.module.files) in modules
    ]


def resolve(address: str) -> Address:
    """The address with its tag replaced by the hash that it means now.

    Raises `ExportIncomplete` for a tag that is not there, and as `Storage`.
    """
    wanted = parse_address(address)
    if wanted.pinned:
        return wanted
    text = Storage(wanted.url).read(tag_name(wanted.reference), 100)
    pinned = wanted._replace(reference=text.decode("ascii", "replace").strip())
    if not pinned.pinned:
        raise ManifestError(
            f"The tag {wanted.reference} in {wanted.url} is not a hash.",
            "Set it again: fastface-trt publish EXPORT URL --tag NAME.",
        )
    return pinned


def obtain(address: str, *, home: Path | None = None, progress: Progress = _silent) -> Obtained:
    """An export's folder from `URL#TAG` or `URL#HASH`, fetched as far as this machine lacks it.

    `home` is where it is kept: by default `obtained` in `$FASTFACE_CACHE` or the user's cache. What
    is there already is checked by hash; with a pinned address that needs no storage in reach.
    Raises `ExportIncomplete` when something is missing, truncated or changed, of which nothing is
    kept, `ManifestError`, `StorageError`, and as `resolve`.
    """
    pinned = resolve(address)
    home = possible_folder(home or _home())
    storage, objects = Storage(pinned.url), LocalObjects(home)
    content = _document(
        storage, release_name(pinned.reference), pinned.reference, RELEASE_LIMIT, home
    )
    release = parse_document(content, Release, f"Release {pinned.reference[:12]}")
    manifest = _manifest(storage, release.export, ExportManifest, home)
    where = f"The export of release {pinned.reference[:12]}"
    check_places(manifest.files(), EXPORT_MANIFEST, where)
    folder = home / "exports" / pinned.reference
    if not _is_whole(folder, manifest):
        with finished_folder(folder, EXPORT_MANIFEST) as draft:
            _fill(draft.path, manifest.files(), objects, storage, progress)
            draft.finish(manifest)
        objects.sweep()
    return Obtained(pinned, folder, manifest, release.engines)


def obtain_engines(
    obtained: Obtained,
    cache: EngineCache,
    builder: EngineBuilder,
    *,
    home: Path | None = None,
    progress: Progress = _silent,
) -> list[str]:
    """Put the release's engines that `builder` would make or takes here into the cache.

    Returns the names of their modules. Engines for other backends and GPUs are not fetched.
    Raises as `obtain`, and `EngineMismatch` for an engine that is not what its key says.
    """
    home = possible_folder(home or _home())
    storage, objects = Storage(obtained.address.url), LocalObjects(home)
    modules = obtained.manifest.modules
    wanted = {cache.key(module, builder) for module in modules.values()}
    contents = {_files_of(module.files) for module in modules.values()}
    got = []
    for key, entry in obtained.engines.items():
        where = f"Engine {key[:12]}"
        manifest = _manifest(storage, entry, EngineManifest, home)
        check_places(list(manifest.files), ENGINE_MANIFEST, where)
        if manifest.key != key:
            raise EngineMismatch(f"{where} is called {manifest.key[:12]}.", "Publish it again.")
        ours = _files_of(manifest.module.files) in contents
        if key in wanted or (ours and builder.takes(manifest)):
            cache.adopt(
                manifest,
                _filling(manifest.files, objects, storage, progress),
                progress,
            )
            got.append(manifest.module.name)
    return got


def with_obtained(settings: WorkerSettings, progress: Progress = _silent) -> WorkerSettings:
    """Settings whose export is a folder here: `URL#TAG` and `URL#HASH` are obtained with engines.

    Raises as `obtain` and `obtain_engines`; settings with a folder or a name are returned as given.
    """
    if not is_address(settings.export):
        return settings
    obtained = obtain(settings.export, progress=progress)
    cache = EngineCache(settings.cache)
    builder = make_builder(
        obtained.manifest,
        settings.backend,
        threads=settings.threads,
        options=settings.engine_options,
        cache=cache,
    )
    obtain_engines(obtained, cache, builder, progress=progress)
    return settings.model_copy(update={"export": str(obtained.folder)})


class _Sender:
    """Sends what a storage lacks of folders, each file compared with its hash on the way."""

    def __init__(self, storage: Storage, overwrite: bool, progress: Progress) -> None:
        self._storage = storage
        self._overwrite = overwrite
        self._progress = progress

    def folder(
        self, folder: Path, manifest: Strict, files: Iterable[FileEntry], manifest_name: str
    ) -> ManifestEntry:
        """Send every file of a folder, then its manifest."""
        files = list(files)
        check_places(files, manifest_name, str(folder))
        for file in files:
            self._send(file.sha256, file.bytes, folder / file.path)
        content = to_json(manifest)
        entry = ManifestEntry(bytes=len(content), sha256=sha256_of(content))
        if self._lacks(entry.sha256, entry.bytes):
            self._storage.write(object_name(entry.sha256), [content])
        return entry

    def _send(self, sha256: str, size: int, path: Path) -> None:
        if self._lacks(sha256, size):
            self._progress(f"Sending {path} ({size / 1e6:.1f} MB)")
            self._storage.write(object_name(sha256), _checked_blocks(path, sha256, size))

    def _lacks(self, sha256: str, size: int) -> bool:
        return self._overwrite or self._storage.size(object_name(sha256)) != size


def _checked_blocks(path: Path, sha256: str, size: int) -> Iterator[bytes]:
    """The blocks of a file; raises `ExportIncomplete` before their end when they are not it."""
    verify_files(path.parent, [FileEntry(path=path.name, bytes=size, sha256=sha256)])
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            yield block


def _manifest(storage: Storage, entry: ManifestEntry, kind: type[Manifest], home: Path) -> Manifest:
    content = _document(storage, object_name(entry.sha256), entry.sha256, entry.bytes, home)
    return parse_document(content, kind, f"{kind.__name__} {entry.sha256[:12]}")


def _document(storage: Storage, name: str, sha256: str, limit: int, home: Path) -> bytes:
    """A release or manifest by hash, from this machine where it was read before."""
    known = home / "documents" / f"{sha256}.json"
    content = known.read_bytes() if known.is_file() else b""
    if sha256_of(content) == sha256:
        return content
    content = storage.read(name, limit)
    if sha256_of(content) != sha256:
        raise ExportIncomplete(
            f"{storage.url}/{name} is damaged: its SHA-256 is not its name.",
            "Write it again: fastface-trt publish --overwrite EXPORT URL.",
        )
    with storage_errors(known.parent):
        known.parent.mkdir(parents=True, exist_ok=True)
        write_text_durably(known, content.decode())
    return content


def _is_whole(folder: Path, manifest: ExportManifest) -> bool:
    try:
        if Export.open(folder).manifest != manifest:
            return False
        verify_files(folder, manifest.files())
    except FastFaceError:
        return False
    return True


def _filling(
    files: Iterable[FileEntry], objects: LocalObjects, storage: Storage, progress: Progress
) -> Callable[[Path], None]:
    return lambda folder: _fill(folder, files, objects, storage, progress)


def _fill(
    folder: Path,
    files: Iterable[FileEntry],
    objects: LocalObjects,
    storage: Storage,
    progress: Progress,
) -> None:
    for file in {file.path: file for file in files}.values():
        progress(f"Obtaining {file.path} ({file.bytes / 1e6:.1f} MB)")
        fetched = objects.fetch(file.sha256, file.bytes, storage, file.path)
        objects.place(fetched, folder / file.path)


def _files_of(files: Iterable[FileEntry]) -> tuple[str, ...]:
    return tuple(file.sha256 for file in files)


def _home() -> Path:
    home = os.environ.get("FASTFACE_CACHE")
    cache = Path(home) if home else user_cache_path("fastface-trt", appauthor=False)
    return cache / "obtained"
