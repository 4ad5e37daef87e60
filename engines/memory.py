"""How much memory this process takes at most, and keeping mapped files from counting in it."""

import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from typing_extensions import Self

_STATUS = Path("/proc/self/status")
_SECONDS_BETWEEN = 0.5
_DROP_ABOVE_BYTES = 2**30


class MemoryPeak:
    """Samples this process's memory while its block runs: `anonymous` and `resident` bytes.

    Anonymous memory is what the process allocated; resident memory counts mapped files as well,
    which the system can drop and read again. `drop_pages` is called when more than 1 GB (2³⁰ bytes)
    of those are resident. Both stay 0 where /proc does not exist.
    """

    def __init__(self, drop_pages: Callable[[], None] = lambda: None) -> None:
        self.anonymous = 0
        self.resident = 0
        self._drop_pages = drop_pages
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory peak", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while _STATUS.exists():
            sizes = _sizes()
            self.anonymous = max(self.anonymous, sizes["RssAnon"])
            self.resident = max(self.resident, sizes["VmRSS"])
            if sizes["RssFile"] > _DROP_ABOVE_BYTES:
                self._drop_pages()
            if self._stop.wait(_SECONDS_BETWEEN):
                return


def _sizes() -> dict[str, int]:
    sizes = dict.fromkeys(("VmRSS", "RssAnon", "RssFile"), 0)
    for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name in sizes:
            sizes[name] = int(value.split()[0]) * 1024
    return sizes
