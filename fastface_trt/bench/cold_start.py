"""From starting a process to its first picture on the disk.

    python -m fastface_trt.bench.cold_start JSON

is the process: it notes the time at each phase's end and prints them as a line of JSON. It is a
module of its own, so that the imports that it times are those of a picture and not of a benchmark.
The clock is `time.monotonic`, which counts from the same moment in all processes of a machine.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fastface_trt.bench.report import ColdStart, Distribution
from fastface_trt.errors import EngineFailed

_PHASES = ("imports", "load", "picture", "write")


def measure_cold_starts(settings: dict[str, Any], runs: int) -> ColdStart:
    """Start `runs` processes one after the other; `settings` are the arguments of `first_picture`.

    Raises `EngineFailed` with the last line that a process wrote when it fails.
    """
    seconds: dict[str, list[float]] = {phase: [] for phase in _PHASES}
    totals: list[float] = []
    peak = 0
    for _ in range(runs):
        with TemporaryDirectory() as folder:
            given = json.dumps(settings | {"out": str(Path(folder) / "first.png")})
            started = time.monotonic()
            child = subprocess.run(
                [sys.executable, "-m", "fastface_trt.bench.cold_start", given],
                capture_output=True,
                text=True,
                check=False,
            )
        if child.returncode != 0:
            last = (child.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise EngineFailed(f"A fresh process made no picture: {last}.", "")
        ends = json.loads(child.stdout.splitlines()[-1])
        peak = max(peak, ends["peak_host_bytes"])
        before = started
        for phase in _PHASES:
            seconds[phase].append(ends[phase] - before)
            before = ends[phase]
        totals.append(before - started)
    return ColdStart(
        to_first_picture=Distribution.of(totals),
        **{phase: Distribution.of(values) for phase, values in seconds.items()},
        peak_host_bytes=peak,
    )


def first_picture(
    *,
    load: dict[str, Any],
    prompt: str,
    face: str,
    preset: str,
    fields: dict[str, Any],
    out: str,
) -> dict[str, float]:
    """Make one picture in this process and return when each phase ended.

    `load` are arguments of `FastFace.load`, `fields` of `FastFace.request`.
    """
    import numpy as np

    from fastface_trt.measure.memory import peak_bytes
    from fastface_trt.runtime.picture_file import write_picture
    from fastface_trt.runtime.pipeline import FastFace

    ends = {"imports": time.monotonic()}
    with FastFace.load(**load) as fastface:
        fastface.warm_up()
        ends["load"] = time.monotonic()
        request = fastface.request(prompt, preset=preset, **fields)
        result = fastface.generate([request], [Path(face)])
        ends["picture"] = time.monotonic()
        write_picture(out, np.asarray(result.images[0]), parameters=result.parameters[0])
        ends["write"] = time.monotonic()
    return ends | {"peak_host_bytes": peak_bytes()}


if __name__ == "__main__":
    print(json.dumps(first_picture(**json.loads(sys.argv[1]))))
