"""`Storage`: files in shared storage by name; `LocalObjects`: contents by hash on this machine.

Storage is reached through fsspec: a directory, s3://, gs://, memory://. What stands under a name is
whole: a directory gets it by a rename, an object store by finishing the upload. A reader who comes
too early finds nothing; a writer who is killed leaves nothing, or in a directory a hidden file.

Objects are fetched from it once per machine, and checked while they stream:

    ROOT/objects/HASH         contents, complete and checked when they were fetched
    ROOT/objects/HASH.part    as far as they came; the next process goes on from there
    ROOT/locks/HASH.lock      held by the process that fetches HASH

Folders made of objects share their bytes with them through hard links where the disk has these.
"""

import errno
import hashlib
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any

from filelock import FileLock

from fastface_trt.engines.files import atomic_file, sha256_file, storage_errors
from fastface_trt.engines.manifest import open_file
from fastface_trt.errors import (
    ExportIncomplete,
    FastFaceError,
    InvalidRequest,
    MissingDependency,
    StorageError,
    install_hint,
)
from fastface_trt.serving.storage.release import object_name

BLOCK = 1 << 20
"""Bytes that are read or written at once."""
_UNUSED_AFTER_SECONDS = 24 * 3600
_NO_LINKS = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS}


class Storage:
    """One place in shared storage, by its URL or as a directory's path.

    Raises `MissingDependency` without fsspec or the package for that kind of URL, `InvalidRequest`
    for a URL that fsspec cannot make sense of. Every method raises `StorageError` where the storage
    refuses or is out of reach.
    """

    def __init__(self, url: str) -> None:
        try:
            from fsspec.core import url_to_fs
        except ImportError:
            raise MissingDependency(
                "Shared storage needs the package fsspec.", install_hint("ray")
            ) from None
        try:
            fs, root = url_to_fs(url)
        except ImportError as problem:
            raise MissingDependency(f"{url} cannot be opened: {problem}.", "") from None
        except Exception as problem:  # each kind of storage raises what it likes
            raise InvalidRequest(
                f"{url!r:.200} is no storage: {_why(problem)}.",
                "Give a directory, s3://… or gs://….",
            ) from None
        self.url = url.rstrip("/")
        self._fs: Any = fs
        self._root = str(root).rstrip("/")
        protocols = fs.protocol if isinstance(fs.protocol, tuple | list) else (fs.protocol,)
        self._directory = Path(self._root) if "file" in protocols else None

    def size(self, name: str) -> int | None:
        """Bytes under `name`, None where there is nothing."""
        with self._reached(name, "read"):
            # What this process listed before may be older than what another one wrote.
            self._fs.invalidate_cache()
            try:
                return int(self._fs.info(self._path(name))["size"])
            except FileNotFoundError:
                return None

    def read(self, name: str, limit: int) -> bytes:
        """All of a small file; raises `ExportIncomplete` without it or beyond `limit` bytes."""
        parts, total = [], 0
        for part in self.stream(name):
            total += len(part)
            if total > limit:
                raise ExportIncomplete(
                    f"{self.url}/{name} is larger than {limit} bytes.",
                    "It was not written by `fastface-trt publish`.",
                )
            parts.append(part)
        return b"".join(parts)

    def stream(self, name: str, start: int = 0) -> Iterator[bytes]:
        """The bytes under `name` from `start` on, in blocks; `ExportIncomplete` without it."""
        with self._reached(name, "read"):
            try:
                if self._directory is not None:  # a pipe there would be waited for
                    file = open_file(self._directory / name)
                else:
                    file = self._fs.open(self._path(name), "rb", block_size=4 * BLOCK)
            except FileNotFoundError:
                raise ExportIncomplete(
                    f"{self.url} has no {name}.", "Publish it, or publish it again."
                ) from None
        with file:
            while True:
                with self._reached(name, "read"):
                    if start:
                        file.seek(start)
                        start = 0
                    block = file.read(BLOCK)
                if not block:
                    return
                yield block

    def write(self, name: str, blocks: Iterable[bytes]) -> None:
        """Put `blocks` under `name`; where they raise, what was there stays.

        memory:// alone shows what is written before it is whole: fsspec commits it when it opens.
        """
        if self._directory is not None:
            _write_to_directory(self._directory / name, blocks)
            return
        rest = iter(blocks)
        first = next(rest, b"")  # what is refused at once opens nothing
        with self._reached(name, "written"):
            file = self._fs.open(self._path(name), "wb", autocommit=False)
        # Not `with file`: that would finish the upload when the blocks raise.
        try:
            for block in chain([first], rest):
                with self._reached(name, "written"):
                    file.write(block)
            with self._reached(name, "written"):
                file.close()
                file.commit()
        except BaseException:
            file.discard()
            raise

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextmanager
    def _reached(self, name: str, what: str) -> Iterator[None]:
        """Turn whatever a storage's own client raises into `StorageError`."""
        try:
            yield
        except (FastFaceError, MemoryError):
            raise
        except Exception as problem:
            raise StorageError(
                f"{self.url}/{name} cannot be {what}: {_why(problem)}.",
                "Check the address, the credentials and the network, then run it again.",
            ) from problem


def _why(problem: Exception) -> str:
    """What a storage's client says in one line; the system's own words do without the path."""
    text = problem.strerror if isinstance(problem, OSError) and problem.strerror else str(problem)
    return " ".join(text.split())[:300] or type(problem).__name__


def _write_to_directory(path: Path, blocks: Iterable[bytes]) -> None:
    with storage_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            for block in blocks:
                file.write(block)


class LocalObjects:
    """The objects of folder `root`; any number of threads and processes may use one folder."""

    def __init__(self, root: Path) -> None:
        self._objects = root / "objects"
        self._locks = root / "locks"

    def fetch(self, sha256: str, size: int, storage: Storage, what: str) -> Path:
        """The file with these contents of `size` bytes; `what` names it in errors.

        Where it lies here already, it is checked again and the storage is not asked. While another
        process fetches it, this waits. Raises `ExportIncomplete` when the storage lacks it or holds
        something else under its name, of which nothing is kept, and `StorageError`.
        """
        target = self._objects / sha256
        with storage_errors(self._objects):
            for folder in (self._objects, self._locks):
                folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self._locks / f"{sha256}.lock"):
                known = target.is_file() and target.stat().st_size == size
                if known and sha256_file(target) == sha256:
                    return target
                part = target.with_name(f"{sha256}.part")
                if not self._stream(part, sha256, size, storage, what):
                    # What an earlier process left may be what is wrong: once more from the start.
                    self._stream(part, sha256, size, storage, what)
                os.replace(part, target)
        return target

    def _stream(self, part: Path, sha256: str, size: int, storage: Storage, what: str) -> bool:
        """Fill `part`; False when what was in it before does not lead to the right hash."""
        resumed = part.stat().st_size if part.exists() else 0
        digest = hashlib.sha256()
        try:
            with open(part, "r+b" if resumed else "wb") as file:
                while block := file.read(BLOCK) if resumed else b"":
                    digest.update(block)
                done = resumed
                if done < size:
                    for block in storage.stream(object_name(sha256), start=done):
                        done += len(block)
                        if done > size:
                            break
                        digest.update(block)
                        file.write(block)
                file.flush()
                os.fsync(file.fileno())
        except (ExportIncomplete, OSError):
            # Nothing to go on with; and a full disk is not helped by what does not fit.
            part.unlink(missing_ok=True)
            raise
        if done == size and digest.hexdigest() == sha256:
            return True
        part.unlink()
        if resumed:
            return False
        problem = (
            f"is truncated: {done} bytes instead of {size}"
            if done < size
            else f"is larger than the {size} bytes of its manifest"
            if done > size
            else "is damaged: its SHA-256 is not its name"
        )
        raise ExportIncomplete(
            f"{what} in {storage.url} {problem}.",
            "Write it again: fastface-trt publish --overwrite EXPORT URL.",
        )

    def place(self, fetched: Path, target: Path) -> None:
        """Let `target`, which does not exist, have the contents of a fetched object."""
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(fetched, target)
        except OSError as problem:
            if problem.errno not in _NO_LINKS:
                raise
            shutil.copyfile(fetched, target)

    def sweep(self) -> None:
        """Remove what no folder has a link to and nobody touched for a day."""
        if not self._objects.is_dir():
            return
        for path in self._objects.iterdir():
            with suppress(OSError):
                about = path.stat()
                if about.st_nlink == 1 and time.time() - about.st_mtime > _UNUSED_AFTER_SECONDS:
                    path.unlink()
