"""`bench`: how long pictures take, and `bench compare`: whether that has changed.

`bench sizing`: what machines would make, from what was measured.
"""

import json
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import click

from fastface_trt.bench.compare import compare, comparison_tables, read_report
from fastface_trt.bench.measure import Workload, nvtx_ranges
from fastface_trt.bench.random_weights import random_export
from fastface_trt.bench.report import BENCH_FILE, schema_text
from fastface_trt.bench.run import run_benchmark, write_schema
from fastface_trt.bench.tables import print_report
from fastface_trt.cli import STARTED
from fastface_trt.cli.common import (
    FILE,
    FOLDER,
    Counts,
    backend_options,
    console,
    engine_options,
    licence_option,
    parse_size,
    provider_option,
    timed_lines,
)
from fastface_trt.engines.cache import EngineCache
from fastface_trt.errors import BadPicture, InvalidRequest, UnknownName
from fastface_trt.measure.tables import print_table, text_console
from fastface_trt.mini.folders import SAMPLE_FACES
from fastface_trt.runtime.export_folder import Export
from fastface_trt.runtime.guidance import BRANCH_PLANS
from fastface_trt.runtime.presets import PRESETS


@click.command("sizing")
@click.argument("reports", type=FILE, nargs=-1, required=True, metavar="bench.json …")
@click.option(
    "--utilisation",
    type=float,
    default=0.7,
    show_default=True,
    help="Share of the time that the machine is to work; waiting grows with ρ/(1-ρ).",
)
@click.option(
    "--fill",
    type=float,
    default=1.0,
    show_default=True,
    help="Share of a UNet call's rows that hold work.",
)
@click.option(
    "--fresh",
    type=float,
    default=1.0,
    show_default=True,
    help="Share of requests with a new face and prompt.",
)
@click.option("--price", type=float, help="What an hour of the machine costs, in any currency.")
def sizing(
    reports: tuple[Path, ...], utilisation: float, fill: float, fresh: float, price: float | None
) -> None:
    """Print pictures per second and hour by branch plan, as Markdown, from bench reports."""
    from fastface_trt.bench.compare import read_report
    from fastface_trt.bench.sizing import Operation, markdown

    operation = Operation(utilisation, fill, fresh, price)
    for text in [markdown(read_report(path), operation) for path in reports]:
        click.echo(text)


SCHEMA_FILE = Path("benchmarks/bench.schema.json")


@click.group(invoke_without_command=True)
@backend_options
@provider_option
@click.option(
    "--preset",
    "presets",
    multiple=True,
    default=("am1+dcg",),
    show_default=True,
    help=f"{', '.join(PRESETS)} (repeatable).",
)
@click.option("--size", help="WIDTHxHEIGHT in pixels [the export's].")
@click.option("--steps", type=int, help="UNet steps [the export's].")
@click.option(
    "--requests", type=Counts(), default=(1, 2, 4), show_default="1,2,4", help="Pictures per call."
)
@click.option(
    "--concurrency",
    type=Counts(),
    default=(1, 2),
    show_default="1,2",
    help="Threads that call one model.",
)
@click.option("--warm-up", type=click.IntRange(min=0), default=3, show_default=True)
@click.option(
    "--runs", type=click.IntRange(min=1), default=20, show_default=True, help="Timed calls a case."
)
@click.option(
    "--cold-starts",
    type=click.IntRange(min=0),
    default=3,
    show_default=True,
    help="Fresh processes that make their first picture.",
)
@click.option("--face", type=FILE, help="Picture with the face [a drawn one of the mini model].")
@click.option("--prompt", default="photo; person in a garden, smiling", show_default=True)
@click.option(
    "--plan", default="exact", show_default=True, help=f"Branch plan: {', '.join(BRANCH_PLANS)}."
)
@click.option(
    "--random-weights",
    is_flag=True,
    help="Time full-size SDXL with random weights; they are drawn once into the cache folder "
    "(8.7 GB), which needs no download and no torch.",
)
@click.option(
    "--checkpoint", default="hyper", show_default=True, help="With --random-weights: which shapes."
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "bf16", "fp8", "int8"]),
    default="fp16",
    show_default=True,
    help="With --random-weights: what its modules compute in; all but fp16 are exported with "
    "torch first, for minutes.",
)
@click.option(
    "--optimization",
    type=click.Choice(["all", "extended", "basic"]),
    help="ONNX Runtime: as in `build`; extended keeps fp16 weights fp16 on a CPU, which full-size "
    "SDXL needs in 24 GB of memory.",
)
@click.option(
    "--out",
    type=FOLDER,
    default=Path("out/bench"),
    show_default=True,
    help="Folder for bench.json, stages.csv, report.md, plots/; replaces an earlier report.",
)
@click.option("--trace", is_flag=True, help="Also write trace.json for ui.perfetto.dev.")
@click.option("--nvtx", is_flag=True, help="NVTX ranges around the stages, for Nsight Systems.")
@click.option("--no-build", is_flag=True, help="Stop when an engine is missing, build nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print bench.json instead of tables.")
@licence_option
@click.pass_context
def bench(context: click.Context, /, **given: Any) -> None:
    """Measure how long a picture takes, stage by stage, and write a report to --out.

    Fresh features: the face is found and everything encoded on every call. Cached features: the
    face and the prompt were seen before.
    """
    if context.invoked_subcommand is None:
        _bench(**given)


def _bench(
    *,
    export_folder: str,
    backend: str,
    cache: Path | None,
    threads: int | None,
    provider_options: dict[str, str] | None,
    presets: tuple[str, ...],
    size: str | None,
    plan: Literal["exact", "full", "lean"],
    face: Path | None,
    random_weights: bool,
    checkpoint: str,
    precision: str,
    optimization: str | None,
    out: Path,
    trace: bool,
    nvtx: bool,
    no_build: bool,
    as_json: bool,
    accept_licence: bool,
    **counts: Any,
) -> None:
    _check(presets, plan, counts["requests"], counts["concurrency"], face)
    ranges = nvtx_ranges() if nvtx else None
    workload = Workload(
        presets=tuple(dict.fromkeys(presets)),
        face=(SAMPLE_FACES / "ada.png" if face is None else face).absolute(),
        size=None if size is None else parse_size(size),
        plan=plan,
        **counts,
    )
    line = timed_lines(console())
    folder = Export.open(export_folder).folder
    if random_weights and export_folder == "mini":
        folder = random_export(checkpoint, precision, workload.steps, EngineCache(cache), line)
    load = {
        "export": str(folder.absolute()),
        "backend": backend,
        "cache": None if cache is None else str(cache.absolute()),
        "threads": threads,
        "engine_options": engine_options(
            provider_options=provider_options, optimization=optimization
        ),
        "build": not no_build,
        "licence_acknowledged": accept_licence,
    }

    def first(case: str, seconds: float) -> None:
        since = perf_counter() - STARTED
        line(f"First number, {since:.0f} s after the command: {seconds:.3f} s for {case}")

    report = run_benchmark(load, workload, out, line, trace=trace, ranges=ranges, first=first)
    if as_json:
        click.echo(report.model_dump_json(indent=2))
        return
    print_report(text_console(), report)
    click.echo(str(out / BENCH_FILE))


def _check(
    presets: tuple[str, ...],
    plan: str,
    requests: tuple[int, ...],
    concurrency: tuple[int, ...],
    face: Path | None,
) -> None:
    """Everything that would otherwise show after minutes of building."""
    for preset in presets:
        if preset not in PRESETS:
            raise UnknownName("preset", preset, PRESETS)
    if plan not in BRANCH_PLANS:
        raise UnknownName("branch plan", plan, BRANCH_PLANS)
    for name, values in (("--requests", requests), ("--concurrency", concurrency)):
        if min(values) < 1 or len(set(values)) < len(values):
            raise InvalidRequest(
                f"{name} is {','.join(map(str, values))}.",
                "List different whole numbers from 1 on, such as 1,2,4.",
            )
    if face is not None and not face.is_file():
        raise BadPicture(f"There is no picture {face}.", "Give a file with a face to --face.")


@bench.command("compare")
@click.argument("first", type=FILE, metavar="A.json")
@click.argument("second", type=FILE, metavar="B.json")
@click.option("--across-machines", is_flag=True, help="Although the machines differ.")
@click.option(
    "--different-work",
    is_flag=True,
    help="Although checkpoint, size, steps, plan or presets differ; presets pair up in order.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")
def compare_command(
    first: Path, second: Path, across_machines: bool, different_work: bool, as_json: bool
) -> None:
    """Say how much longer B takes than A, stage by stage, and which ratios are not 1.

    Intervals are 95 % bootstraps of the ratio of medians, one by one: of a hundred stages that did
    not change, about five are told apart all the same.
    """
    before, after = read_report(first), read_report(second)
    ratios = compare(before, after, across_machines=across_machines, different_work=different_work)
    if as_json:
        rows = [asdict(one) | {"distinguishable": one.distinguishable} for one in ratios]
        click.echo(json.dumps(rows, indent=2))
        return
    out = text_console()
    for table in comparison_tables(before, after, ratios):
        print_table(out, table)
    apart = sum(one.distinguishable for one in ratios)
    out.print(f"{apart} of {len(ratios)} ratios are told apart from 1.")


@bench.command("schema")
@click.option("--out", type=FILE, default=SCHEMA_FILE, show_default=True, help="File.")
def schema_command(out: Path) -> None:
    """Write the JSON schema of bench.json."""
    write_schema(out, schema_text())
    click.echo(str(out))


bench.add_command(sizing)
