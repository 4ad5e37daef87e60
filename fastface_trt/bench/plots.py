"""Figures of a report: where the time goes, how it grows, and what the machine could do at best."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastface_trt.bench.report import BenchReport, Case, RooflineReport, Stage
from fastface_trt.bench.tables import detailed
from fastface_trt.measure.style import (
    LIGHT,
    MARKERS,
    add_legend,
    name_axes,
    new_figure,
    require_matplotlib,
    save,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_KINDS = {
    "face": ("read_picture", "face_detection", "face_recognition"),
    "encoders": ("image_encoder", "face_projection", "tokenise", "text_encoder", "text_encoder_2"),
    "UNet": ("unet",),
    "guidance, scheduler, noise": ("guidance", "noise"),
    "VAE and picture": ("vae_decoder", "picture", "png"),
}


def write_plots(report: BenchReport, folder: Path) -> list[Path]:
    """Write every plot that the report has numbers for; raises `MissingDependency`."""
    require_matplotlib()
    drawn: dict[str, Callable[[], Figure]] = {
        f"stages-{preset}": lambda preset=preset: stage_waterfall(report, preset)  # type: ignore[misc]
        for preset in report.work.presets
    }
    drawn["latency-distribution"] = lambda: latency_distribution(report)
    drawn["unet-samples"] = lambda: unet_samples(report)
    if len({case.requests for case in report.cases}) > 1:
        drawn["latency-over-requests"] = lambda: latency_over_requests(report)
    if len({case.concurrency for case in report.cases}) > 1:
        drawn["throughput-over-concurrency"] = lambda: throughput_over_concurrency(report)
    if report.roofline is not None:
        roofline = report.roofline
        drawn["roofline"] = lambda: roofline_plot(roofline)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, draw in drawn.items():
        paths.append(folder / f"{name}.png")
        save(draw(), paths[-1])
    return paths


def stage_waterfall(report: BenchReport, preset: str) -> "Figure":
    """Stages of a preset one after the other: medians as bars, p95 as a thin line beyond."""
    from matplotlib.patches import Patch

    cases = [case for case in detailed(report) if case.preset == preset]
    counts = [len(case.stages) for case in cases]
    figure, panels = new_figure(
        9, 1.6 + 0.24 * sum(counts), rows=len(cases), sharex=True, height_ratios=counts
    )
    colours = {kind: LIGHT.colour(at) for at, kind in enumerate((*_KINDS, "other"))}
    for axes, case in zip(panels, cases, strict=True):
        _waterfall(axes, case, colours)
        name_axes(
            axes,
            f"{case.label}: median {case.seconds.median * 1000:.1f} ms per call, "
            f"n = {case.seconds.n}",
            "",
            "stage",
        )
    panels[-1].set_xlabel("time since the call, ms (bars: median; line: p95)")
    handles = [Patch(color=value, label=kind) for kind, value in colours.items()]
    add_legend(figure, handles=handles, loc="outside lower center", ncols=6)
    return figure


def _waterfall(axes: "Axes", case: Case, colours: dict[str, str]) -> None:
    start = 0.0
    for place, stage in enumerate(case.stages):
        median, late = stage.seconds.median * 1000, stage.seconds.p95 * 1000
        shade = colours[_kind(stage)]
        axes.barh(place, median, left=start, color=shade, height=0.7)
        end = start + max(late, median)
        axes.plot([start + median, end], [place, place], color=LIGHT.ink, linewidth=1)
        axes.text(end, place, f"  {median:.1f}", va="center", fontsize=7, color=LIGHT.ink)
        start += median
    axes.set_yticks(range(len(case.stages)), [stage.label for stage in case.stages])
    axes.invert_yaxis()
    axes.set_ylim(len(case.stages) - 0.4, -0.6)
    axes.grid(False, axis="y")


def _kind(stage: Stage) -> str:
    return next((kind for kind, names in _KINDS.items() if stage.name in names), "other")


def latency_distribution(report: BenchReport) -> "Figure":
    """How many of the calls were done after so many milliseconds, with percentiles marked."""
    figure, (axes,) = new_figure(8, 4.5)
    for index, case in enumerate(detailed(report)):
        values = np.sort(np.array(case.seconds.samples)) * 1000
        share = np.arange(len(values) + 1) / len(values)
        style = "-" if case.features == "fresh" else "--"
        shade = LIGHT.colour(index // 2)
        name = f"{case.label} (n = {case.seconds.n})"
        axes.step([values[0], *values], share, style, where="post", color=shade, label=name)
        for percent, mark in ((50, "o"), (95, "^"), (99, "s")):
            at = np.percentile(values, percent)
            axes.plot(at, percent / 100, mark, color=shade, markersize=5)
    for mark, name in (("o", "median"), ("^", "p95"), ("s", "p99")):
        axes.plot([], [], mark, color=LIGHT.ink, markersize=5, label=name)
    name_axes(
        axes, "Distribution of end-to-end times", "time per call, ms", "share of calls done by then"
    )
    axes.set_ylim(0, 1.03)
    add_legend(axes, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def unet_samples(report: BenchReport) -> "Figure":
    """UNet samples per step, stacked, for every preset under the three branch plans."""
    presets = list(dict.fromkeys(plan.preset for plan in report.branch_plans))
    plans = ("full", "exact", "lean")
    steps = report.work.steps
    figure, (axes,) = new_figure(max(6.5, 1.9 * len(presets) + 2), 4.2)
    shades = [LIGHT.colour(index) for index in (5, 1, 2, 3)]
    for plan in report.branch_plans:
        place = presets.index(plan.preset) + (plans.index(plan.plan) - 1) * 0.27
        bottom = 0
        for step, branches in enumerate(plan.branches):
            shade = shades[step % len(shades)]
            axes.bar(place, len(branches), 0.24, bottom, color=shade, edgecolor="white")
            if steps <= 8:
                middle = bottom + len(branches) / 2
                text = str(len(branches))
                axes.text(
                    place, middle, text, ha="center", va="center", fontsize=7, color=LIGHT.ink
                )
            bottom += len(branches)
        ran = plan.plan == report.work.plan and plan.preset in report.work.presets
        weight = "bold" if ran else "normal"
        axes.text(place, bottom + 0.1, str(bottom), ha="center", fontsize=8, weight=weight)
        axes.text(place, -0.15, plan.plan, ha="center", va="top", fontsize=7, weight=weight)
    axes.set_xticks(range(len(presets)), presets)
    axes.tick_params(axis="x", pad=14, length=0)
    for step in range(min(steps, len(shades))):
        axes.bar(0, 0, color=shades[step], label=f"step {step + 1}")
    name_axes(
        axes,
        f"UNet samples of a picture by branch plan ({steps} steps; bold: measured here)",
        "preset",
        "UNet samples (rows of the batch)",
    )
    axes.grid(False, axis="x")
    add_legend(axes, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def latency_over_requests(report: BenchReport) -> "Figure":
    """Time per call and per picture over the requests in one call, kept features."""
    figure, (whole, each) = new_figure(10, 4.2, columns=2)
    for index, preset in enumerate(report.work.presets):
        cases = sorted(
            (c for c in report.cases if _steady(c, preset) and c.concurrency == 1),
            key=lambda case: case.requests,
        )
        counts = np.array([case.requests for case in cases])
        name = f"{preset} (n = {min(case.seconds.n for case in cases)})"
        for axes, divisor in ((whole, np.ones(len(counts))), (each, counts)):
            middle, low, high = (
                np.array(values) * 1000 / divisor
                for values in zip(
                    *((c.seconds.median, *c.seconds.median_interval) for c in cases), strict=True
                )
            )
            axes.fill_between(counts, low, high, color=LIGHT.colour(index), alpha=0.2, linewidth=0)
            axes.plot(counts, middle, "o-", color=LIGHT.colour(index), label=name)
            axes.set_xticks(counts)
    requests = "requests in one call"
    name_axes(whole, "Time per call (band: 95 % interval of the median)", requests, "median, ms")
    name_axes(each, "Time per picture", requests, "median per picture, ms")
    for axes in (whole, each):
        axes.set_ylim(bottom=0)
        add_legend(axes)
    return figure


def throughput_over_concurrency(report: BenchReport) -> "Figure":
    """Pictures per second over threads that call one model, kept features."""
    figure, (axes,) = new_figure(6.5, 4.2)
    first = report.cases[0].requests
    for index, preset in enumerate(report.work.presets):
        cases = sorted(
            (c for c in report.cases if _steady(c, preset) and c.requests == first),
            key=lambda case: case.concurrency,
        )
        threads = [case.concurrency for case in cases]
        rates = [case.throughput.pictures_per_second for case in cases]
        least = min(case.throughput.pictures for case in cases)
        name = f"{preset} (at least {least} pictures each)"
        axes.plot(threads, rates, "o-", color=LIGHT.colour(index), label=name)
        axes.set_xticks(threads)
    name_axes(
        axes,
        f"Throughput, {first} request{'s' if first > 1 else ''} per call, kept features",
        f"threads calling one model ({report.environment.machine['cores']} cores, "
        f"{report.environment.threads} engine threads)",
        "pictures per second",
    )
    axes.set_ylim(bottom=0)
    add_legend(axes)
    return figure


def _steady(case: Case, preset: str) -> bool:
    return case.preset == preset and case.features == "cached"


def roofline_plot(roofline: RooflineReport) -> "Figure":
    """Left: achieved time and floor per stage. Right: FLOP/s over FLOP per byte under the roofs."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    stages = roofline.stages
    figure, (bars, roof) = new_figure(11, max(4.2, 0.34 * len(stages) + 1.5), columns=2)
    places = np.arange(len(stages))
    floor = np.array([stage.floor_seconds for stage in stages]) * 1000
    achieved = np.array([stage.achieved_seconds for stage in stages]) * 1000
    bars.barh(places - 0.2, achieved, 0.38, color=LIGHT.colour(0), label="achieved (median)")
    bars.barh(places + 0.2, floor, 0.38, color=LIGHT.colour(2), label="floor of this machine")
    for place, most, least in zip(places, achieved, floor, strict=True):
        times = f" {most / least:.1f}×" if least > 0 else ""
        bars.text(max(most, least), float(place), times, va="center", fontsize=7, color=LIGHT.ink)
    bars.set_yticks(places, [stage.stage for stage in stages])
    bars.set_ylim(len(stages) - 0.4, -0.6)
    name_axes(bars, f"{roofline.case} (n = {roofline.n})", "ms per call", "stage")
    bars.set_xlim(right=1.2 * max(achieved.max(), floor.max()))
    add_legend(bars, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)

    peak, bandwidth = roofline.matmul_flops_per_second, roofline.copy_bytes_per_second
    intensity = np.array([stage.flops / stage.bytes for stage in stages if stage.bytes])
    left, right = _decades([*intensity, peak / bandwidth])
    x = np.geomspace(left, right, 100)
    roof.loglog(
        x, np.minimum(x * bandwidth, peak) / 1e9, color=LIGHT.ink, label="roof of this machine"
    )
    counted = [stage for stage in stages if stage.bytes and stage.flops]
    rates = [stage.flops / stage.achieved_seconds / 1e9 for stage in counted]
    for index, (stage, rate) in enumerate(zip(counted, rates, strict=True)):
        roof.plot(
            stage.flops / stage.bytes,
            rate,
            linestyle="none",
            color=LIGHT.colour(index // 4),
            marker=MARKERS[index % 4],
            label=stage.stage,
        )
    for axis in (roof.xaxis, roof.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    roof.set_xlim(left, right)
    roof.set_ylim(*_decades([peak / 1e9, *rates]))
    name_axes(
        roof,
        f"Roofline: {peak / 1e9:.0f} GFLOP/s (matmul), {bandwidth / 1e9:.1f} GB/s (copy)",
        "arithmetic intensity, FLOP per byte",
        "GFLOP/s",
    )
    add_legend(roof, fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _decades(values: Sequence[float]) -> tuple[float, float]:
    """Powers of ten with all values well between them."""
    low, high = np.log10(min(values)), np.log10(max(values))
    return float(10 ** np.floor(low - 0.1)), float(10 ** np.ceil(high + 0.1))
