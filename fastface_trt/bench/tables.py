"""A report as tables: for a terminal, for Markdown, and for a spreadsheet."""

import csv
import io
from collections.abc import Iterator, Sequence

from rich.console import Console

from fastface_trt.bench.report import BenchReport, Case, Distribution
from fastface_trt.measure.tables import Table, markdown_rows, print_table

MEGABYTE = 2**20
_SUMMARY = ("n", "min", "median", "95 % of it", "p90", "p95", "p99", "max")
_BRIEF = ("n", "median", "95 % of it", "p95")
"""What fits on a terminal of eighty columns."""


def tables(report: BenchReport, shown: tuple[str, ...] = _SUMMARY) -> list[Table]:
    """Everything that a person wants to see; times in milliseconds, `shown` of their summaries."""
    found = [
        Table(
            "End to end, ms per call (from the call to the bytes of the PNGs)",
            ("case", *shown, "pictures/s"),
            tuple(
                (
                    case.label,
                    *_summary(case.seconds, shown),
                    f"{case.throughput.pictures_per_second:.2f}",
                )
                for case in report.cases
            ),
        )
    ]
    if report.ratios:
        found.append(
            Table(
                "Ratios of times in the same round",
                ("case", "over", "ratio", "95 % interval"),
                tuple(
                    (one.case, one.over, f"{one.ratio:.2f}", interval_text(one.interval))
                    for one in report.ratios
                ),
                words=2,
            )
        )
    found += [_stage_table(case, shown) for case in detailed(report)]
    if report.cold_start is not None:
        start = report.cold_start
        found.append(
            Table(
                "Cold start, ms from starting a process to its first picture on the disk",
                ("phase", *shown),
                tuple(
                    (name, *_summary(values, shown))
                    for name, values in (
                        ("imports", start.imports),
                        ("load", start.load),
                        ("first picture", start.picture),
                        ("write", start.write),
                        ("all of it", start.to_first_picture),
                    )
                ),
            )
        )
    found.append(
        Table(
            "Engines",
            ("module", "key", "MB", "build, s"),
            tuple(
                (
                    engine.module,
                    engine.key[:12],
                    f"{engine.bytes / MEGABYTE:.1f}",
                    f"{engine.build_seconds:.1f}",
                )
                for engine in report.engines
            ),
            words=2,
        )
    )
    found.append(
        Table(
            "UNet samples per step",
            ("preset", "plan", "branches per step", "samples"),
            tuple(
                (
                    plan.preset,
                    plan.plan,
                    " ".join("+".join(step) for step in plan.branches),
                    str(plan.unet_samples),
                )
                for plan in report.branch_plans
                if plan.plan == report.work.plan
                and plan.preset in {case.preset for case in report.cases}
            ),
            words=3,
        )
    )
    return found


def detailed(report: BenchReport) -> list[Case]:
    """The cases whose stages are shown: one thread, the first number of requests."""
    first = report.cases[0].requests
    return [case for case in report.cases if case.requests == first and case.concurrency == 1]


def facts(report: BenchReport) -> list[str]:
    """What was run, on what, and how much memory it took, in lines."""
    work, environment, memory = report.work, report.environment, report.memory
    machine = environment.machine
    random = ", random weights" if work.random_weights else ""
    lines = [
        f"{work.checkpoint} with {work.adapter}, {work.precision}{random}, "
        f"{work.width}x{work.height}, {work.steps} steps of {work.scheduler}, plan {work.plan}, "
        f"backend {environment.backend}, {environment.threads} threads",
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gb']} GB, "
        + (f"{machine['gpu']}, " if "gpu" in machine else "no GPU, ")
        + str(machine["system"]),
        f"peak memory of this process: {memory.host_peak_bytes / MEGABYTE:.0f} MB on the host"
        + ("" if memory.device_bytes is None else f", {memory.device_bytes / MEGABYTE:.0f} MB GPU"),
    ]
    if report.cold_start is not None:
        peak = report.cold_start.peak_host_bytes / MEGABYTE
        lines.append(f"peak memory of a fresh process with one picture: {peak:.0f} MB")
    return lines


def print_report(out: Console, report: BenchReport) -> None:
    """Facts, tables and notes on a terminal."""
    for line in facts(report):
        out.print(line)
    for table in tables(report, _BRIEF):
        print_table(out, table)
    for note in report.notes:
        out.print(f"Note: {note}")


def markdown(report: BenchReport, pictures: Sequence[str]) -> str:
    """The report as Markdown; `pictures` are paths of plots beside it."""
    lines = ["# FastFace-TRT latency", "", f"Measured on {report.date}.", ""]
    lines += [f"- {line}" for line in facts(report)]
    for table in tables(report):
        lines += ["", f"## {table.title}", "", *markdown_rows(table)]
    if report.notes:
        lines += ["", "## Notes", "", *(f"- {note}" for note in report.notes)]
    versions = ", ".join(f"{name} {value}" for name, value in report.environment.versions.items())
    lines += ["", "## Software", "", versions]
    if pictures:
        lines += ["", "## Plots", "", *(f"![{name}]({name})\n" for name in pictures)]
    return "\n".join(lines).rstrip() + "\n"


def stages_csv(report: BenchReport) -> str:
    """A line per case and stage, and one per case for the whole call; seconds."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        [
            "preset",
            "features",
            "requests",
            "concurrency",
            "stage",
            "step",
            "branches",
            "rows",
            "calls",
            "warm_up",
            "n",
            "minimum",
            "median",
            "median_low",
            "median_high",
            "p90",
            "p95",
            "p99",
            "maximum",
        ]
    )
    for case in report.cases:
        which = (case.preset, case.features, case.requests, case.concurrency)
        for name, step, branches, rows, calls, seconds in _csv_stages(case):
            writer.writerow(
                (
                    *which,
                    name,
                    *("" if value is None else value for value in (step, branches, rows)),
                    calls,
                    case.warm_up,
                    seconds.n,
                    seconds.minimum,
                    seconds.median,
                    *seconds.median_interval,
                    seconds.p90,
                    seconds.p95,
                    seconds.p99,
                    seconds.maximum,
                )
            )
    return text.getvalue()


def _csv_stages(
    case: Case,
) -> Iterator[tuple[str, int | None, int | None, int | None, int, Distribution]]:
    for stage in case.stages:
        yield stage.name, stage.step, stage.branches, stage.rows, stage.calls, stage.seconds
    yield "call", None, None, case.unet_samples, 1, case.seconds


def interval_text(interval: tuple[float, float]) -> str:
    """Both ends of an interval of ratios."""
    return f"{interval[0]:.2f} to {interval[1]:.2f}"


def _stage_table(case: Case, shown: tuple[str, ...]) -> Table:
    whole = case.seconds.median
    return Table(
        f"Stages of {case.label}, ms",
        ("stage", "calls", *shown, "share"),
        tuple(
            (
                stage.label,
                str(stage.calls),
                *_summary(stage.seconds, shown),
                f"{stage.seconds.median / whole:.1%}",
            )
            for stage in case.stages
        ),
    )


def _summary(values: Distribution, shown: tuple[str, ...]) -> tuple[str, ...]:
    low, high = values.median_interval
    texts = {
        "n": str(values.n),
        "min": _ms(values.minimum),
        "median": _ms(values.median),
        "95 % of it": f"{_ms(low)} to {_ms(high)}",
        "p90": _ms(values.p90),
        "p95": _ms(values.p95),
        "p99": _ms(values.p99),
        "max": _ms(values.maximum),
    }
    return tuple(texts[name] for name in shown)


def _ms(seconds: float) -> str:
    value = seconds * 1000
    return f"{value:.{0 if abs(value) >= 1000 else 1 if abs(value) >= 100 else 2}f}"
