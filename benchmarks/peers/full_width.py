"""One UNet step of full-size SDXL at 512²: eager PyTorch against this runtime, float32 on a CPU.

Both have the same random weights. PyTorch evaluates three branches on every step, as the authors
run it; this runtime evaluates the ten of twelve samples that am1+dcg needs: calls of 2, 3, 3 and 2
rows. Timed are calls of 3 and of 2 rows, and a picture is their sum over four steps.

An export in 8 bits can be added: `fastface-trt export --checkpoint hyper --random-weights
--precision int8 FOLDER`. Its outputs are compared, too, but nothing is refused: it is another
arithmetic, on weights that were drawn in float16.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.peers.step_jobs import Job
from benchmarks.peers.work import versions
from fastface_trt.errors import EngineFailed
from fastface_trt.measure.machine import describe_machine, load_average
from fastface_trt.measure.statistics import RESAMPLES, Ratio, interval_of
from fastface_trt.measure.tables import Table, markdown_rows, print_table
from fastface_trt.runtime.presets import preset_fields
from fastface_trt.runtime.request import GenerationRequest

WORK = Path("out") / "full-width"
PACKAGES = ("fastface-trt", "torch", "diffusers", "onnxruntime", "numpy")
TOLERANCE = 5e-3
"""Relative L2 of the prediction: the export's files hold float16 weights."""


def branch_rows() -> list[int]:
    """Rows of every step of a picture with am1+dcg under the branch plan."""
    request = GenerationRequest("a picture", **preset_fields("am1+dcg", 4))
    return [len(step.branches) for step in request.guidance_steps()]


def ratio_of_medians(
    reference: Callable[[Callable[[Sequence[float]], float]], float],
    own: Callable[[Callable[[Sequence[float]], float]], float],
) -> Ratio:
    """How many times as fast as the reference, from separate runs: bootstrap of both medians.

    Each of the two computes its time with the estimator that it is handed.
    """
    rng = np.random.default_rng(0)

    def resampled(values: Sequence[float]) -> float:
        return float(np.median(rng.choice(np.asarray(values), len(values))))

    ratios = [reference(resampled) / own(resampled) for _ in range(RESAMPLES)]
    return Ratio(reference(median) / own(median), *interval_of(ratios))


def picture_seconds(
    seconds: dict[str, list[float]], rows: Sequence[int], estimate: Callable[..., float] = median
) -> float:
    """The UNet's seconds for a picture of steps with so many rows each."""
    by_rows = {count: estimate(values) for count, values in seconds.items()}
    return sum(by_rows[str(count)] for count in rows)


def sample_seconds(seconds: dict[str, list[float]], estimate: Callable[..., float]) -> float:
    """The UNet's seconds per sample in calls of the most rows."""
    most = max(seconds, key=int)
    return estimate(seconds[most]) / int(most)


def run_job(job: Job) -> dict[str, Any]:
    """Do a job in a process of its own and return its numbers; raises `EngineFailed`."""
    command = [sys.executable, "-m", "benchmarks.peers.step_jobs", str(job.write())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise EngineFailed(
            f"The process for {job.name} ({job.kind}) failed: {last}",
            "Exit status -9 means that memory ran out: this needs 24 GB and nothing beside it.",
        )
    found: dict[str, Any] = json.loads(job.result.read_text(encoding="utf-8"))
    return found


def run_full_width(
    out: Path,
    console: Console,
    *,
    repeats: int = 5,
    int8: Path | None = None,
    model: str = "full-size",
    side: int = 64,
    work: Path = WORK,
) -> dict[str, Any]:
    """Time PyTorch and this runtime one after the other; write JSON and Markdown, print a table.

    Raises `EngineFailed` when a process fails, or when the outputs differ.
    """
    busy, rows = load_average(), branch_rows()
    folder = work / f"{model}-{side}"

    def job(kind: str, name: str, export: str = "") -> dict[str, Any]:
        console.print(f"{name}: {kind}")
        return run_job(Job(kind, name, model, side, str(folder), repeats, export=export))

    found = {"pytorch": job("pytorch", "pytorch")}
    job("export", "fastface-trt")
    for name, export in (("fastface-trt", ""), ("fastface-trt-int8", str(int8 or ""))):
        if name == "fastface-trt" or export:
            built = job("build", name, export)
            found[name] = job("engine", name, export)
            found[name]["build_seconds"] = built["process_seconds"]
    reference = np.load(folder / "pytorch.npy").astype(np.float64)
    peers = {}
    for name, numbers in found.items():
        prediction = np.load(folder / f"{name}.npy")
        apart = float(np.linalg.norm(prediction - reference) / np.linalg.norm(reference))
        if name == "fastface-trt" and not apart < TOLERANCE:
            raise EngineFailed(
                f"The noise prediction of {name} differs from PyTorch's by {apart:.1e} of its "
                f"length, allowed {TOLERANCE:g}, so its speed is not reported.",
                "fastface-trt verify --layers finds where.",
            )
        own_rows = [max(rows)] * len(rows) if name == "pytorch" else rows
        peers[name] = numbers | {
            "difference": apart,
            "samples_per_picture": sum(own_rows),
            "seconds_per_sample": sample_seconds(numbers["seconds"], median),
            "seconds_per_picture": picture_seconds(numbers["seconds"], own_rows),
            "speed_per_sample": vars(_speed(found, name, [max(rows)], [max(rows)])),
            "speed_per_picture": vars(_speed(found, name, [max(rows)] * len(rows), own_rows)),
        }
    facts = {
        "what": f"one UNet step, {model}, {8 * side}×{8 * side} pixels, float32, am1+dcg",
        "machine": describe_machine(),
        "versions": versions(PACKAGES),
        "load_average_before": busy,
        "repeats": repeats,
        "rows_per_step": rows,
        "peers": peers,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _show(facts, out, console)
    return facts


def _speed(
    found: dict[str, Any], name: str, reference_rows: Sequence[int], rows: Sequence[int]
) -> Ratio:
    return ratio_of_medians(
        lambda estimate: picture_seconds(found["pytorch"]["seconds"], reference_rows, estimate),
        lambda estimate: picture_seconds(found[name]["seconds"], rows, estimate),
    )


def _show(facts: dict[str, Any], out: Path, console: Console) -> None:
    machine = facts["machine"]
    table = Table(
        facts["what"],
        (
            "UNet",
            "s per sample",
            "times as fast",
            "samples per picture",
            "s per picture",
            "times as fast",
            "peak GB",
            "distance",
        ),
        tuple(
            (
                name,
                f"{peer['seconds_per_sample']:.3g}",
                str(Ratio(**peer["speed_per_sample"])),
                str(peer["samples_per_picture"]),
                f"{peer['seconds_per_picture']:.3g}",
                str(Ratio(**peer["speed_per_picture"])),
                f"{peer['peak_memory_gb']:.1f}",
                f"{peer['difference']:.1e}",
            )
            for name, peer in facts["peers"].items()
        ),
    )
    print_table(console, table)
    lines = [
        f"{table.title}; medians of {facts['repeats']} calls; {machine['processor']}, "
        f"{machine['cores']} cores.",
        "",
        *markdown_rows(table),
    ]
    out.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
