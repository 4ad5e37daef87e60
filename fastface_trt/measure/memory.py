"""Memory of a process in bytes, on every system; imports nothing that must be installed."""

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Final

GB: Final = 2**30


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
