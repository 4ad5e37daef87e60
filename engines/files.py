"""Files that are complete or absent: hashing, verification, atomic writes, whole folders.

An export and an engine are folders of gigabytes that are written over minutes, on disks that fill
up, by processes that are killed. Both are therefore drafted in a hidden sibling folder, flushed to
the disk, given their manifest last, and renamed into place.

A killed process leaves such a folder behind: `.NAME.partial-PID-RANDOM`, or `.NAME.replaced-…` for
one that was moved aside. Who writes or moves one holds an operating-system lock on it, which ends
with the process, however that dies, and is seen from other containers, where a process number means
nothing; so `sweep` can tell stale folders from those in use.
"""

import errno
import hashlib
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from fastface_trt.engines.manifest import FileEntry, Strict, open_file
from fastface_trt.errors import ExportIncomplete, FastFaceError, InvalidRequest, StorageError

try:
    import fcntl
except ImportError:  # Windows has no locks on folders
    fcntl = None  # type: ignore[assignment]

_BLOCK = 1 << 20
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NOT_WRITABLE = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EBUSY,
    errno.EIO,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.ENOENT,  # /proc and its like have no new files
}
_ABANDONED_AFTER_SECONDS = 24 * 3600
"""Where folders cannot be locked: unchanged for so long, a partial folder is nobody's."""


def sha256_file(path: Path) -> str:
    """SHA-256 of an ordinary file as 64 hexadecimal digits, read in blocks of 1 MiB."""
    digest = hashlib.sha256()
    block = memoryview(bytearray(_BLOCK))
    with open_file(path) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
    return digest.hexdigest()


def describe_file(root: Path, path: Path | str) -> FileEntry:
    """The manifest entry of file `path`, which lies in folder `root` or is relative to it."""
    full = root / path
    relative = PurePosixPath(full.relative_to(root).as_posix())
    return FileEntry(path=str(relative), bytes=full.stat().st_size, sha256=sha256_file(full))


def verify_files(
    folder: Path,
    entries: Iterable[FileEntry],
    error: type[FastFaceError] = ExportIncomplete,
    hint: str = "Export it again; the new export replaces this one.",
    *,
    hashes: bool = True,
) -> None:
    """Compare the files in `folder` with their entries: all sizes (bytes) first, then all hashes.

    Raises `error` with `hint`, naming the first file that is missing, truncated or changed, is
    reached by a link out of the folder, or is a pipe or a device; those are not opened.
    """
    entries = list(entries)
    path, root = folder, os.path.realpath(folder)
    try:
        for entry in entries:
            path = folder / entry.path
            if not Path(os.path.realpath(path)).is_relative_to(root):
                raise error(f"{path} is a link out of its folder.", f"Copy the file there. {hint}")
            about = path.stat()
            if not stat.S_ISREG(about.st_mode):
                raise error(f"{path} is not an ordinary file.", hint)
            size = about.st_size
            if size != entry.bytes:
                what = "truncated" if size < entry.bytes else "changed"
                raise error(f"{path} is {what}: {size} bytes instead of {entry.bytes}.", hint)
        for entry in entries if hashes else ():
            path = folder / entry.path
            if sha256_file(path) != entry.sha256:
                raise error(f"{path} is changed: its SHA-256 is not the manifest's.", hint)
    except (FileNotFoundError, NotADirectoryError):
        raise error(f"{path} is missing.", hint) from None
    except OSError as problem:
        raise error(f"{path} cannot be read: {problem.strerror}.", hint) from None


def unnamed_files(root: Path, folder: str, named: Iterable[str]) -> list[str]:
    """What lies below `folder` of `root` and is not among `named`, as sorted paths from `root`.

    Hidden files, such as a file manager's, are nobody's to read and not among them.
    """
    found = (
        path.relative_to(root).as_posix()
        for path in (root / folder).rglob("[!.]*")
        if path.is_symlink() or not path.is_dir()
    )
    return sorted(set(found) - {str(PurePosixPath(name)) for name in named})


def possible_folder(path: Path) -> Path:
    """`path` made absolute; `StorageError` where no folder can have that name, there or not."""
    try:
        path = path.expanduser().absolute()
        with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            os.stat(path)  # whoever writes there says more of those
    # A user without a home, a name that is too long, links in a circle, a null character.
    except (RuntimeError, OSError, ValueError) as problem:
        why = problem.strerror if isinstance(problem, OSError) else problem
        raise StorageError(
            f"{str(path)!r:.200} cannot be a folder: {why}.", "Choose another one."
        ) from None
    return path


@contextmanager
def storage_errors(place: Path) -> Iterator[None]:
    """Turn a full or unwritable disk while writing below folder `place` into `StorageError`."""
    try:
        yield
    except OSError as problem:
        if problem.errno in _DISK_FULL:
            raise _disk_full(place) from problem
        if problem.errno in _NOT_WRITABLE and _concerns(problem, place):
            raise StorageError(
                f"{problem.filename or place} cannot be written: {problem.strerror}.",
                "Choose a folder that this user may write to; nothing half-written was left "
                "behind.",
            ) from problem
        raise
    except Exception as problem:
        # C++ writers (ONNX Runtime, torch) hide the error number; the full disk itself tells.
        if not isinstance(problem, StorageError) and _free_bytes(place) < _BLOCK:
            raise _disk_full(place) from problem
        raise


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write `path` into: when the block ends, `path` is all of it, safely on the disk.

    Until then, and after an exception, a kill or a power cut, it is what it was. Raises `OSError`;
    wrap it in `storage_errors` where a user chose the folder.
    """
    # Not tempfile: its files are private to the user, and these should get the usual rights. The
    # name is short, so that a long file name cannot make it too long.
    temporary = path.with_name(f".fastface-{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        # Gone already after the rename.
        with suppress(OSError):
            temporary.unlink()
    with suppress(OSError):  # some network file systems cannot flush a folder
        _flush(path.parent)


def write_durably(path: Path, content: bytes | memoryview) -> None:
    """Write `content` to `path` by `atomic_file`."""
    with atomic_file(path) as file:
        file.write(content)


def write_text_durably(path: Path, text: str) -> None:
    """Write `text` as UTF-8 to `path` by `atomic_file`."""
    write_durably(path, text.encode())


class Draft:
    """The folder that a `finished_folder` block writes into, as `path`."""

    def __init__(self, path: Path, target: Path, manifest_name: str) -> None:
        self.path = path
        self.finished = False
        self._target = target
        self._manifest_name = manifest_name

    def finish(self, manifest: Strict) -> Path:
        """Flush every file, write the manifest, and put the folder in place; return the target.

        Raises `OSError`, which the enclosing `finished_folder` turns into `StorageError`.
        """
        for folder, _, names in os.walk(self.path):
            for name in names:
                _flush(Path(folder, name))
            _flush(Path(folder))
        text = manifest.model_dump_json(indent=2) + "\n"
        write_text_durably(self.path / self._manifest_name, text)
        _swap_in(self.path, self._target)
        self.finished = True
        _flush(self._target.parent)
        return self._target


@contextmanager
def finished_folder(target: Path, manifest_name: str) -> Iterator[Draft]:
    """A folder that appears at `target` complete, with its manifest, or not at all.

    The block writes into `draft.path`, a hidden sibling of `target`, and ends by calling
    `draft.finish(manifest)`. An exception in the block removes the draft; a kill leaves one, which
    the next use for the same target removes. A finished folder at `target` stays valid until the
    new one is complete, then it is replaced as a whole.

    Raises `StorageError` for a full or unwritable disk, `InvalidRequest` when `target` is a file or
    a folder with files but without `manifest_name` (it is not ours to replace), `RuntimeError` when
    the block ends without `finish`.
    """
    # Through links: the draft must lie on the disk of the folder that is meant.
    target = Path(os.path.realpath(target))
    with storage_errors(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep(target.parent, target.name)
        _refuse_foreign(target, manifest_name)
        path, held = _new_sibling(target)
        try:
            draft = Draft(path, target, manifest_name)
            yield draft
            if not draft.finished:
                raise RuntimeError("the block ended without draft.finish(manifest)")
        finally:
            # After finish() there is nothing at this path.
            shutil.rmtree(path, ignore_errors=True)
            if held is not None:
                os.close(held)


def sweep(parent: Path, name: str = "*") -> None:
    """Remove what dead processes left in folder `parent` of the folders called `name`.

    A folder that had been moved aside and not yet replaced goes back to its place.
    """
    # In this order: what is put back is whole, so a partial folder of the same name is no loss.
    for aside in parent.glob(f".{_literal(name)}.replaced-*"):
        target = parent / aside.name[1:].rpartition(".replaced-")[0]
        _deal_with(aside, target)
    for partial in parent.glob(f".{_literal(name)}.partial-*"):
        _deal_with(partial, None)


def _deal_with(stale: Path, target: Path | None) -> None:
    with suppress(BlockingIOError, OSError):
        handle = _hold(stale)
        if handle is None and _age_seconds(stale) < _ABANDONED_AFTER_SECONDS:
            return
        try:
            if target is not None and not target.exists():
                os.rename(stale, target)
            shutil.rmtree(stale, ignore_errors=True)
        finally:
            if handle is not None:
                os.close(handle)


def _age_seconds(folder: Path) -> float:
    newest = max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
    return time.time() - newest


def _literal(name: str) -> str:
    """`name` as a pattern that matches only itself; `*` stays a pattern."""
    if name == "*":
        return name
    return "".join(f"[{char}]" if char in "*?[" else char for char in name)


def _hold(folder: Path) -> int | None:
    """Lock `folder` for this process; return the handle to close, None where it is not possible.

    Raises `BlockingIOError` when another process holds it, `FileNotFoundError` when it is gone.
    """
    if fcntl is None:
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The lock may be on a folder that was removed or renamed since it was opened.
        if os.fstat(handle).st_ino != os.stat(folder).st_ino:
            raise FileNotFoundError(folder)
        return handle
    except (BlockingIOError, FileNotFoundError):
        os.close(handle)
        raise
    except OSError:  # a file system without locks
        os.close(handle)
        return None


def _new_sibling(target: Path) -> tuple[Path, int | None]:
    while True:
        name = f".{target.name}.partial-{os.getpid()}-{secrets.token_hex(4)}"
        path = target.with_name(name)
        path.mkdir()
        # A sweeping process may see the folder before it is held, and remove it: take another.
        with suppress(FileNotFoundError, BlockingIOError):
            return path, _hold(path)


def _refuse_foreign(target: Path, manifest_name: str) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise InvalidRequest(f"{target} is a file, not a folder.", "Choose another folder.")
    if any(target.iterdir()) and not (target / manifest_name).is_file():
        raise InvalidRequest(
            f"{target} holds files but no {manifest_name}, so it is not replaced.",
            "Choose a new or empty folder.",
        )


def _swap_in(draft: Path, target: Path) -> None:
    """Rename `draft` to `target`; what was there is moved aside first and removed afterwards."""
    for attempt in range(8):
        aside = target.with_name(f".{target.name}.replaced-{os.getpid()}-{secrets.token_hex(4)}")
        held = None
        with suppress(FileNotFoundError, BlockingIOError):
            held = _hold(target)
        try:
            with suppress(FileNotFoundError):
                os.rename(target, aside)
            os.rename(draft, target)
            return
        except OSError as problem:
            # Another process put its own finished folder there between the two renames.
            if problem.errno not in (errno.ENOTEMPTY, errno.EEXIST) or attempt == 7:
                raise
        finally:
            if aside.exists() and not target.exists():
                os.rename(aside, target)
            shutil.rmtree(aside, ignore_errors=True)
            if held is not None:
                os.close(held)


def _flush(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows flushes folders itself and cannot open them
    # Windows flushes only what is open for writing; elsewhere the file may be read-only.
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _concerns(problem: OSError, place: Path) -> bool:
    """Whether the error is about writing below `place`, not about a file read elsewhere."""
    if not isinstance(problem.filename, str | os.PathLike):
        return True
    named, place = Path(problem.filename).absolute(), place.absolute()
    return named.is_relative_to(place) or place.is_relative_to(named)


def _disk_full(place: Path) -> StorageError:
    return StorageError(
        f"The disk of {place} is full.",
        f"Free some space ({_free_bytes(place) / 1e9:.1f} GB are free now) or choose another "
        "folder, then run it again; nothing half-written was left behind.",
    )


def _free_bytes(place: Path) -> int:
    try:
        return shutil.disk_usage(place).free
    except OSError:
        return _BLOCK  # unknown, so nothing is concluded from it
