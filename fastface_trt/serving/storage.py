"""Files in shared storage by name, through fsspec: a directory, s3://, gs://, memory://.

What stands under a name is whole: a directory gets it by a rename, an object store by finishing the
upload. A reader who comes too early finds nothing; a writer who is killed leaves nothing, or in a
directory a hidden file.
"""

import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from fastface_trt.engines.files import storage_errors
from fastface_trt.errors import (
    ExportIncomplete,
    FastFaceError,
    InvalidRequest,
    MissingDependency,
    StorageError,
)

BLOCK = 1 << 20
"""Bytes that are read or written at once."""


class Storage:
    """One place in shared storage, by its URL or as a directory's path.

    Raises `MissingDependency` without fsspec or the package for that kind of URL, `InvalidRequest`
    for a kind that fsspec does not know. Every method raises `StorageError` where the storage
    refuses or is out of reach.
    """

    def __init__(self, url: str) -> None:
        try:
            from fsspec.core import url_to_fs
        except ImportError:
            raise MissingDependency(
                "Shared storage needs the package fsspec.", "pip install 'fastface-trt[ray]'"
            ) from None
        try:
            fs, root = url_to_fs(url)
        except ImportError as problem:
            raise MissingDependency(f"{url} cannot be opened: {problem}.", "") from None
        except ValueError as problem:
            raise InvalidRequest(
                f"{url!r} is no storage: {problem}.", "Give a directory, s3://… or gs://…."
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
        """Put `blocks` under `name`; where they raise, what was there stays."""
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
                f"{self.url}/{name} cannot be {what}: {problem}.",
                "Check the address, the credentials and the network, then run it again.",
            ) from problem


def _write_to_directory(path: Path, blocks: Iterable[bytes]) -> None:
    with storage_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
        try:
            with open(temporary, "xb") as file:
                for block in blocks:
                    file.write(block)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
