"""Build full-size engines with TensorRT-RTX on a machine without a GPU, and say what it took.

    python -m benchmarks.full_size_build [--export FOLDER] [--module NAME …] [--branches 1,2,3]

Exports SDXL with random fp16 weights at 1024² first when FOLDER does not exist. Writes time, peak
memory, engine size and layers of every module to benchmarks/results/full-size-build.json. Peak
memory is split into what the builder allocated and the pages of the mapped ONNX file, which the
system can drop when memory is short.
"""

import json
import platform
import shutil
import subprocess
from datetime import date
from pathlib import Path
from typing import Any

import click

from fastface_trt.cli.build import build_display
from fastface_trt.cli.common import console, timed_lines
from fastface_trt.engines.backends import make_builder
from fastface_trt.engines.cache import EngineCache
from fastface_trt.engines.manifest import EXPORT_MANIFEST, EngineManifest
from fastface_trt.engines.tensorrt.flavour import find_flavour
from fastface_trt.measure.machine import describe_machine
from fastface_trt.measure.memory import GB
from fastface_trt.runtime.export_folder import Export

RESULT = Path("benchmarks/results/full-size-build.json")


@click.command()
@click.option("--export", "folder", type=Path, default=Path("out/hyper-random-fp16"))
@click.option("--cache", type=Path, default=Path("out/full-size-engines"))
@click.option("--module", "modules", multiple=True)
@click.option("--branches", default="1,2,3")
@click.option("--keep", is_flag=True, help="Keep the engines (about 9 GB).")
def main(folder: Path, cache: Path, modules: tuple[str, ...], branches: str, keep: bool) -> None:
    """Export if need be, build, and write the table."""
    if not (folder / EXPORT_MANIFEST).is_file():
        command = ["export", "--checkpoint", "hyper", "--random-weights", "--fp16", str(folder)]
        subprocess.run(["fastface-trt", *command], check=True)
    manifest = Export.open(folder).manifest
    store = EngineCache(cache)
    screen = console()
    line = timed_lines(screen)
    rows: list[dict[str, Any]] = []
    with build_display(screen, None) as display:
        builder = make_builder(
            manifest,
            "tensorrt-rtx",
            options={"branches": tuple(map(int, branches.split(",")))},
            on_event=display.event,
        )
        for name in modules or manifest.modules:
            display.start_module(name, None)
            engine, _ = store.get(manifest.modules[name], folder, builder, line)
            display.end_module(name, {})
            rows.append(_row(engine))
            line(json.dumps(rows[-1]))
    report = {
        "date": date.today().isoformat(),
        "machine": describe_machine(),
        "python": platform.python_version(),
        "backend": f"TensorRT-RTX {find_flavour('tensorrt-rtx').version()}",
        "model": f"SDXL with FaceID-Plus-v2, random {manifest.precision} weights, "
        f"{manifest.width}x{manifest.height}",
        "modules": rows,
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if not keep:
        shutil.rmtree(cache, ignore_errors=True)
    click.echo(str(RESULT))


def _row(engine: EngineManifest) -> dict[str, Any]:
    weights = sum(file.bytes for file in engine.module.files)
    return {
        "module": engine.module.name,
        "profiles": len(engine.options["profiles"]),
        "layers": engine.report.layers,
        "onnx_gb": round(weights / GB, 2),
        "engine_gb": round(sum(file.bytes for file in engine.files) / GB, 2),
        "seconds": round(engine.build_seconds),
        "peak_allocated_gb": round(engine.report.peak_anonymous_bytes / GB, 2),
        "peak_resident_gb": round(engine.report.peak_resident_bytes / GB, 2),
    }


if __name__ == "__main__":
    main()
