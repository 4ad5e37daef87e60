"""What killed processes leave beside a folder, and how to tell it from what others still write.

A process that writes `.NAME.partial-PID-RANDOM`, or has moved a folder to `.NAME.replaced-…`, holds
an operating-system lock on that folder. The lock ends with the process, however that dies, and it
is seen from other containers, where a process number means nothing.
"""

import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no locks on folders
    fcntl = None  # type: ignore[assignment]

_ABANDONED_AFTER_SECONDS = 24 * 3600
"""Where folders cannot be locked: unchanged for so long, a partial folder is nobody's."""


def hold(folder: Path) -> int | None:
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


def _deal_with(leftover: Path, target: Path | None) -> None:
    with suppress(BlockingIOError, OSError):
        handle = hold(leftover)
        if handle is None and _age_seconds(leftover) < _ABANDONED_AFTER_SECONDS:
            return
        try:
            if target is not None and not target.exists():
                os.rename(leftover, target)
            shutil.rmtree(leftover, ignore_errors=True)
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
