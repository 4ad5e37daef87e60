"""How many threads an ONNX Runtime engine runs fastest with on this machine, found by measurement.

More is not always faster: below some size of operator the threads wait for each other longer than
they compute. ONNX Runtime takes one per physical core, whatever the module.
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Final

THREADS_FILE: Final = "threads.json"

LARGEST_BYTES: Final = 512 * 2**20
"""Above this a module keeps every core busy, and a session more per candidate costs its memory."""

_WARM_UPS, _RUNS = 1, 5
_CLEARLY_FASTER: Final = 0.95
"""Further threads must bring at least a twentieth: they are taken from whoever else computes."""

Run = Callable[[], object]


def candidates(cores: int) -> Iterator[int]:
    """1, 2, 4, … and `cores` itself."""
    count = 1
    while count < cores:
        yield count
        count *= 2
    yield cores


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def fastest_threads(
    prepare: Callable[[int], Run], cores: int, clock: Callable[[], float] = perf_counter
) -> dict[int, float]:
    """Median seconds of a run by number of threads, the best number first.

    `prepare` opens the engine with so many threads and returns one run of it. Stops at the first
    number that is clearly slower than a smaller one.
    """
    seconds: dict[int, float] = {}
    for threads in candidates(cores):
        run = prepare(threads)
        times = []
        for _ in range(_WARM_UPS + _RUNS):
            started = clock()
            run()
            times.append(clock() - started)
        seconds[threads] = median(times[_WARM_UPS:])
        if seconds[threads] > min(seconds.values()) / _CLEARLY_FASTER:
            break
    best = next(iter(seconds))
    for threads, time in seconds.items():
        if time < _CLEARLY_FASTER * seconds[best]:
            best = threads
    return {best: seconds.pop(best), **seconds}


def write_threads(folder: Path, measured: dict[int, float]) -> None:
    """Write what `fastest_threads` found into an engine's folder."""
    values = {"threads": next(iter(measured)), "seconds": {str(k): v for k, v in measured.items()}}
    (folder / THREADS_FILE).write_text(json.dumps(values) + "\n", encoding="utf-8")


def read_threads(folder: Path) -> int | None:
    """The number of threads to open an engine with, None where nothing was measured.

    What another machine measured is bounded by the cores here, and nonsense is nothing.
    """
    try:
        measured = json.loads((folder / THREADS_FILE).read_text(encoding="utf-8"))["threads"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    if type(measured) is not int or measured < 1:
        return None
    return min(measured, usable_cores())
