"""Contents by hash on this machine: fetched from shared storage once, checked while they stream.

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
from contextlib import suppress
from pathlib import Path

from filelock import FileLock

from fastface_trt.engines.files import sha256_file, storage_errors
from fastface_trt.errors import ExportIncomplete
from fastface_trt.serving.release import object_name
from fastface_trt.serving.storage import BLOCK, Storage

_UNUSED_AFTER_SECONDS = 24 * 3600
_NO_LINKS = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS}


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
