"""Which versions of ONNX Runtime and Python make the golden pictures, in fresh environments.

`make test-onnxruntime-versions`, or `python -m benchmarks.onnxruntime_versions --only 1.20.1`. An
environment of each Python gets the wheel of this tree, nothing else of ours, and one version of
`onnxruntime` after the other, and makes a picture per preset with `fastface-trt generate`, engines
built from scratch. Pictures are compared with those of eager PyTorch in tests/golden/pictures. A
Python that this machine lacks is said to be missing, and is no failure.
"""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Final

import click
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from skimage.metrics import structural_similarity

from fastface_trt.measure.machine import describe_machine
from fastface_trt.measure.tables import Table, print_table, text_console
from fastface_trt.mini.folders import SAMPLE_FACES

ROOT: Final = Path(__file__).parents[1]
GOLDEN: Final = ROOT / "tests" / "golden" / "pictures"
RESULTS: Final = Path(__file__).parent / "results" / "onnxruntime-versions.json"
PRESETS: Final = ("plain", "am2+dcg")

SSIM: Final = 0.9995
MEAN_ABSOLUTE: Final = 0.1
"""Thresholds: similarity of 1 is equality; the difference is in 8-bit steps. ONNX Runtime 1.32 is
at 0.99998 and 0.004; φ = 0.7 instead of 0.75 is at 0.9998 and 0.14."""

MATRIX: Final = (
    ("3.11", "1.20.1", "onnx==1.21.0"),
    ("3.11", "1.22.1"),
    ("3.11", "1.24.4"),
    ("3.11", "1.26.0"),
    ("3.11", "1.28.0"),
    ("3.11", "1.30.0"),
    ("3.11", "1.32.0"),
    ("3.10", "1.23.2"),
    ("3.13", "1.32.0"),
)
"""Python and onnxruntime: the oldest that pyproject.toml allows (with the oldest onnx), the newest,
every second minor version between; the newest that Python 3.10 gets; the newest Python at hand."""

BOUNDS: Final = (MATRIX[0], MATRIX[6])


@dataclass
class Cell:
    """One environment: versions found in it, the pictures' distances, and why it failed if so.

    `beside` is one more requirement, for the oldest version of another package.
    """

    python: str
    onnxruntime: str
    beside: str = ""
    ran: bool = False
    passed: bool = False
    versions: dict[str, str] = field(default_factory=dict)
    pictures: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    reason: str = ""


def distance(made: NDArray[np.uint8], preset: str) -> tuple[float, float]:
    """Structural similarity and mean absolute difference of a picture to its golden one."""
    golden = np.asarray(Image.open(GOLDEN / f"{preset}.png"))
    similarity = structural_similarity(made, golden, channel_axis=2, data_range=255)
    return float(similarity), float(np.abs(made.astype(int) - golden).mean())


def is_close(similarity: float, difference: float) -> bool:
    """Whether a picture is the golden one but for rounding."""
    return similarity >= SSIM and difference <= MEAN_ABSOLUTE


def find_python(version: str) -> Path | None:
    """An interpreter of a minor version such as 3.10: on the PATH, or one that pyenv keeps."""
    kept = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    named = shutil.which(f"python{version}")
    for candidate in (*([named] if named else []), *sorted(kept.glob(f"{version}.*/bin/python"))):
        code = "import sys, venv; print('%d.%d' % sys.version_info[:2])"
        said = subprocess.run([candidate, "-c", code], capture_output=True, text=True)
        if said.stdout.strip() == version:  # pyenv's own python3.10 may say that there is none
            return Path(candidate)
    return None


def run_cell(cell: Cell, wheel: Path, folder: Path) -> None:
    """Fill in `cell`: put its versions into the environment of its Python, make and compare.

    Environments lie in `folder`, one per Python; all but the packages of the cell stay from cell to
    cell, since they are the same and take minutes.
    """
    python = find_python(cell.python)
    if python is None:
        cell.reason = f"no Python {cell.python} here"
        return
    cell.ran = True
    bin = folder / cell.python / ("Scripts" if os.name == "nt" else "bin")
    started = perf_counter()
    try:
        pip = (bin / "python", "-m", "pip", "install", "--quiet", "--no-compile")
        if not bin.exists():
            _run(python, "-m", "venv", folder / cell.python)
        else:  # pip sees no difference between two wheels of one version
            _run(*pip, "--force-reinstall", "--no-deps", wheel)
        _run(*pip, wheel, f"onnxruntime=={cell.onnxruntime}", cell.beside or "onnx")
        cell.versions = _versions(bin / "python")
        cell.seconds["install"] = round(perf_counter() - started, 1)
        started = perf_counter()
        with tempfile.TemporaryDirectory(dir=folder) as outputs:
            for preset in PRESETS:
                cell.pictures[preset] = _picture(bin, Path(outputs), preset)
        cell.seconds["pictures"] = round(perf_counter() - started, 1)
        cell.passed = all(is_close(**numbers) for numbers in cell.pictures.values())
        if not cell.passed:
            cell.reason = "a picture is not the golden one"
    except subprocess.CalledProcessError as error:
        lines = [line for line in (error.stderr or "").splitlines() if line.strip()]
        named = [line for line in lines if line.lower().startswith("error")]
        cell.reason = " ".join((named or lines[-1:] or [str(error)])[0].split())[:300]


def _picture(bin: Path, folder: Path, preset: str) -> dict[str, float]:
    case = json.loads((GOLDEN / "cases.json").read_text(encoding="utf-8"))[preset]
    out = folder / "out" / preset
    _run(
        *(bin / "fastface-trt", "generate", "--preset", preset, "--prompt", case["prompt"]),
        *("--face", SAMPLE_FACES / f"{case['face']}.png", "--seed", str(case["seed"])),
        *("--out", out, "--cache", folder / "cache"),
    )
    (file,) = out.glob("*.png")
    similarity, difference = distance(np.asarray(Image.open(file).convert("RGB")), preset)
    return {"similarity": round(similarity, 6), "difference": round(difference, 4)}


def _versions(python: Path) -> dict[str, str]:
    names = ("numpy", "onnx", "onnxruntime", "pillow")
    code = (
        "import json, platform; from importlib.metadata import version; print(json.dumps("
        f"{{'python': platform.python_version()}} | {{n: version(n) for n in {names}}}))"
    )
    found: dict[str, str] = json.loads(_run(python, "-I", "-c", code).stdout)
    return found


def _run(*command: str | Path) -> "subprocess.CompletedProcess[str]":
    # Outside the tree and without its paths, so that only what was installed is imported.
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return subprocess.run(
        [str(part) for part in command],
        check=True,
        capture_output=True,
        text=True,
        cwd=tempfile.gettempdir(),
        env=environment,
    )


def build_wheel(folder: Path) -> Path:
    """The wheel of this tree, in `folder`; built from a copy, since a build leaves files behind."""
    copy = folder / "source"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file() and not (ROOT / name).is_symlink():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    python = find_python("3.11") or find_python("3.12") or find_python("3.13") or Path("python3")
    _run(python, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder / "wheel", copy)
    (wheel,) = (folder / "wheel").glob("*.whl")
    return wheel


def table_of(cells: Sequence[Cell]) -> Table:
    """The cells as a table: versions, distances, seconds, and what failed."""
    rows = []
    for cell in cells:
        worst = min((p["similarity"] for p in cell.pictures.values()), default=None)
        rows.append(
            (
                cell.versions.get("python", cell.python),
                cell.onnxruntime,
                "yes" if cell.passed else "no" if cell.ran else "not run",
                "-" if worst is None else f"{worst:.5f}",
                f"{sum(cell.seconds.values()):.0f}",
                cell.reason or "-",
            )
        )
    heads = ("Python", "onnxruntime", "golden pictures", "worst SSIM", "seconds", "why")
    return Table("onnxruntime versions", heads, tuple(rows), words=len(heads))


@click.command()
@click.option("--only", multiple=True, metavar="VERSION", help="Only this onnxruntime, repeatable.")
@click.option("--bounds", is_flag=True, help="Only the oldest and the newest onnxruntime.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the results as JSON to this file [all of them: benchmarks/results].",
)
@click.option(
    "--environments",
    type=click.Path(path_type=Path, file_okay=False),
    help="Keep the environments in this folder, for the next run [made anew].",
)
def main(only: tuple[str, ...], bounds: bool, out: Path | None, environments: Path | None) -> None:
    """Make the golden pictures with several versions of ONNX Runtime; exits with 1 if one fails."""
    chosen = [cell for cell in (BOUNDS if bounds else MATRIX) if not only or cell[1] in only]
    console = text_console(stderr=True)
    cells = [Cell(*versions) for versions in chosen]
    with tempfile.TemporaryDirectory(prefix="onnxruntime-versions-") as temporary:
        wheel = build_wheel(Path(temporary))
        for cell in cells:
            run_cell(cell, wheel, Path(environments or temporary).absolute())
            state = "passed" if cell.passed else f"failed: {cell.reason}" if cell.ran else "not run"
            console.print(f"Python {cell.python}, onnxruntime {cell.onnxruntime}: {state}")
    if out is None and len(cells) == len(MATRIX):
        out = RESULTS
    if out is not None:
        report = {
            "what": "pictures of the mini model against golden ones, by version of onnxruntime",
            "machine": describe_machine(),
            "cells": [asdict(cell) for cell in cells],
        }
        out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print_table(text_console(), table_of(cells))
    if not all(cell.passed for cell in cells if cell.ran):
        raise click.exceptions.Exit(1)


if __name__ == "__main__":
    main()
