"""A whole benchmark: load, measure, say what to doubt, and write the folder of the report."""

import json
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from fastface_trt.bench import plots, tables
from fastface_trt.bench.cold_start import measure_cold_starts
from fastface_trt.bench.measure import First, Measurement, Workload, chrome_trace, paired_ratios
from fastface_trt.bench.report import (
    BENCH_FILE,
    BenchReport,
    Case,
    ColdStart,
    EngineFacts,
    Memory,
    make_roofline,
)
from fastface_trt.bench.roofline import measure_rates, stage_floors
from fastface_trt.engines.backends import make_builder
from fastface_trt.engines.device import HostDevice
from fastface_trt.engines.engine import Progress
from fastface_trt.engines.files import (
    finished_folder,
    storage_errors,
    write_text_durably,
)
from fastface_trt.errors import MissingDependency
from fastface_trt.measure import statistics
from fastface_trt.measure.machine import (
    Environment,
    describe_environment,
    gpu_bytes,
    machine_state,
)
from fastface_trt.measure.memory import peak_bytes
from fastface_trt.runtime.export_folder import Export
from fastface_trt.runtime.pipeline import FastFace
from fastface_trt.runtime.timeline import Ranges


def run_benchmark(
    load: Mapping[str, Any],
    workload: Workload,
    out: Path,
    progress: Progress,
    *,
    trace: bool = False,
    ranges: Ranges | None = None,
    first: First = lambda case, seconds: None,
) -> BenchReport:
    """Measure `workload` and write folder `out`, which appears complete or not at all.

    `load` are arguments of `FastFace.load`, as JSON values. The folder holds `bench.json`,
    `stages.csv`, `report.md`, `plots/` and with `trace` `trace.json`; an earlier report there is
    replaced. Engines that are missing are built first. `first` is told the first number. Raises
    what `FastFace` raises, `StorageError`, and `InvalidRequest` when `out` holds something else.
    """
    with finished_folder(out, BENCH_FILE) as draft:
        report, measurement = _measure(load, workload, progress, ranges, first)
        report = _with_roofline(report, load, progress)
        pictures: list[str] = []
        try:
            drawn = plots.write_plots(report, draft.path / "plots")
            pictures = [path.relative_to(draft.path).as_posix() for path in drawn]
        except MissingDependency as error:
            said = (*report.notes, f"There are no plots: {error.message} {error.hint}")
            report = report.model_copy(update={"notes": said})
        with storage_errors(draft.path):
            (draft.path / "stages.csv").write_text(tables.stages_csv(report), encoding="utf-8")
            text = tables.markdown(report, pictures)
            (draft.path / "report.md").write_text(text, encoding="utf-8")
            if trace:
                events = json.dumps(chrome_trace(measurement.last_spans))
                (draft.path / "trace.json").write_text(events, encoding="utf-8")
        draft.finish(report)
    return report


def write_schema(path: Path, text: str) -> None:
    """Write the published schema; raises `StorageError`."""
    with storage_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_durably(path, text)


def _measure(
    load: Mapping[str, Any],
    workload: Workload,
    progress: Progress,
    ranges: Ranges | None,
    first: First,
) -> tuple[BenchReport, Measurement]:
    with FastFace.load(**load, progress=progress) as fastface:
        work, plans = workload.work(fastface), workload.branch_plans(fastface)
        fastface.warm_up()
        facts = fastface.engines()
        start = machine_state()
        measurement = Measurement(fastface, workload, progress, ranges=ranges, first=first)
        cases = measurement.cases()
        end = machine_state()
        memory = Memory(host_peak_bytes=peak_bytes(), device_bytes=gpu_bytes())
    # Only now: a second process on the GPU while the first holds it would be another experiment.
    cold_start = None
    if workload.cold_starts:
        progress(f"Starting {workload.cold_starts} fresh processes")
        cold_start = measure_cold_starts(_first_call(load, workload), workload.cold_starts)
    environment = describe_environment(
        backend=load["backend"],
        threads=load.get("threads"),
        engines=[engine.key for engine in facts.values()],
        start=start,
        end=end,
    )
    report = BenchReport(
        date=date.today().isoformat(),
        work=work,
        environment=environment,
        cold_start=cold_start,
        cases=tuple(cases),
        ratios=tuple(paired_ratios(cases)),
        branch_plans=tuple(plans),
        engines=tuple(
            EngineFacts(
                module=name,
                key=engine.key,
                bytes=sum(file.bytes for file in engine.files),
                build_seconds=engine.build_seconds,
            )
            for name, engine in facts.items()
        ),
        memory=memory,
        notes=tuple(notes(cases, environment, cold_start)),
    )
    return report, measurement


def _with_roofline(report: BenchReport, load: Mapping[str, Any], progress: Progress) -> BenchReport:
    """The report with the floors of one case's stages: one picture of the last preset, cached."""
    case = [one for one in report.cases if one.requests == one.concurrency == 1][-1]
    export = Export.open(load["export"])
    builder = make_builder(
        export.manifest,
        load["backend"],
        threads=load.get("threads"),
        options=load.get("engine_options"),
    )
    on_host = isinstance(builder.device(), HostDevice)
    progress("Measuring what the machine can do at best")
    try:
        rates = measure_rates(
            builder,
            dtype="float32" if on_host or export.manifest.precision == "fp32" else "float16",
        )
        floors = stage_floors(
            case.stages, export, rates, height=report.work.height, width=report.work.width
        )
    except MissingDependency as error:
        said = (*report.notes, f"There is no roofline: {error.message} {error.hint}")
        return report.model_copy(update={"notes": said})
    counted = {label: (one.flops, one.bytes, one.seconds) for label, one in floors.items()}
    roofline = make_roofline(
        case,
        counted,
        matmul_flops_per_second=rates.flops_per_second,
        copy_bytes_per_second=rates.bytes_per_second,
    )
    return report.model_copy(update={"roofline": roofline})


def _first_call(load: Mapping[str, Any], workload: Workload) -> dict[str, Any]:
    """Arguments of `cold_start.first_picture`."""
    fields: dict[str, Any] = {"plan": workload.plan, "steps": workload.steps}
    if workload.size is not None:
        fields["width"], fields["height"] = workload.size
    return {
        "load": dict(load),
        "prompt": workload.prompt,
        "face": str(workload.face),
        "preset": workload.presets[0],
        "fields": fields,
    }


_DRIFT_SAID_FROM = 0.02
"""Smaller changes between the halves of a run are of no use to anybody."""


def notes(
    cases: Sequence[Case], environment: Environment, cold_start: ColdStart | None
) -> list[str]:
    """Sentences about everything that could make these numbers differ from another run's."""
    said = [sentence for case in cases for sentence in _case_notes(case)]
    said += _environment_notes(environment)
    fewest = min(case.seconds.n for case in cases)
    if fewest < 100:
        said.append(
            f"Some percentiles rest on as few as {fewest} samples; p99 of fewer than 100 is close "
            "to their maximum."
        )
    if cold_start is not None:
        said.append(
            "Cold starts read engines and packages that the system may hold in memory; the first "
            "start after a reboot takes longer."
        )
    return said


def _case_notes(case: Case) -> list[str]:
    said = []
    seconds = case.seconds
    if seconds.outliers:
        outside = [seconds.samples[at] for at in seconds.outliers]
        worst = max(outside, key=lambda value: abs(value - seconds.median))
        said.append(
            f"{case.label}: {len(seconds.outliers)} of {seconds.n} calls lie outside Tukey's "
            f"fences, the farthest at {worst * 1000:.1f} ms with a median of "
            f"{seconds.median * 1000:.1f} ms; all are counted."
        )
    ratio, low, high = statistics.drift(seconds.samples)
    if abs(ratio - 1) > _DRIFT_SAID_FROM and not low <= 1 <= high:
        change = f"{abs(ratio - 1):.0%} {'slower' if ratio > 1 else 'faster'}"
        said.append(
            f"{case.label}: the second half of the calls was {change} than the first (ratio "
            f"{ratio:.2f}, 95 % interval {low:.2f} to {high:.2f}), so the machine changed its pace."
        )
    return said


def _environment_notes(environment: Environment) -> list[str]:
    said = []
    cores = int(environment.machine["cores"])
    load = environment.start.load_average
    if load is not None and load > cores / 2:
        said.append(
            f"The load average was {load:.1f} on {cores} cores before the first call: something "
            "else was running."
        )
    load = environment.end.load_average
    if load is not None and load > cores:
        said.append(
            f"The load average was {load:.1f} on {cores} cores after the last call; this command's "
            "own threads count in it."
        )
    for when, state in (("before", environment.start), ("after", environment.end)):
        if state.gpu is not None and state.gpu.throttled:
            said.append(
                f"{state.gpu.name} was throttled {when} the calls: "
                f"{', '.join(state.gpu.throttled)}."
            )
    return said
