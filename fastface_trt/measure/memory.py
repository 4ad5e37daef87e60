"""Memory of a process in bytes, and how it goes back; imports nothing that must be installed."""

import ctypes
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Final

GB: Final = 2**30
_M_MMAP_THRESHOLD: Final = -3  # glibc's number of the parameter


def resident_bytes() -> int:
    """Resident memory of this process; 0 where the system does not tell."""
    with suppress(OSError):
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    with suppress(ImportError):
        import psutil

        return int(psutil.Process().memory_info().rss)
    return 0


def peak_bytes() -> int:
    """The most resident memory that this process had so far; 0 where the system does not tell."""
    if sys.platform == "win32":
        with suppress(ImportError):
            import psutil

            return int(psutil.Process().memory_info().peak_wset)
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kB


def keep_no_large_memory() -> None:
    """From now on freed memory of a megabyte and more goes back to the system, also from threads.

    glibc keeps 20 MB per thread otherwise, which `give_memory_back` does not reach. Not for a
    process with engines, which would have to ask for their buffers again and again.
    """
    _glibc("mallopt", _M_MMAP_THRESHOLD, 1 << 20)


def give_memory_back() -> None:
    """Return to the system what the C library keeps of freed memory, where it is glibc."""
    _glibc("malloc_trim", 0)


def _glibc(function: str, *arguments: int) -> None:
    if sys.platform == "linux":
        with suppress(AttributeError):  # musl keeps little, and has no such function
            getattr(ctypes.CDLL(None), function)(*arguments)
