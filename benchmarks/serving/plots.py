"""Pictures of the comparison: the simulation over load, and the ways on the mini model."""

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import TYPE_CHECKING

from benchmarks.serving.machine import Machine
from benchmarks.serving.measured import Result
from benchmarks.serving.servers import SERVERS
from benchmarks.serving.simulation import Point
from fastface_trt.measure.style import LIGHT, add_legend, name_axes, new_figure, title

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def simulation_plot(simulated: Mapping[str, tuple[Machine, Sequence[Point]]]) -> "Figure":
    """Throughput, latency and rows of a call over load: one row of panels per machine."""
    figure, axes = new_figure(11, 3.6 * len(simulated) + 0.6, len(simulated), 3)
    for row, (machine, points) in enumerate(simulated.values()):
        panels = axes[3 * row : 3 * row + 3]
        for index, name in enumerate(SERVERS):
            own = [point for point in points if point.server == name]
            loads = [point.load for point in own]
            style = {"color": LIGHT.colour(index), "marker": "o", "markersize": 3}
            panels[0].plot(loads, [point.throughput for point in own], label=name, **style)
            panels[1].plot(loads, [point.p50 for point in own], label=f"{name}, p50", **style)
            panels[1].plot(
                loads, [point.p99 for point in own], linestyle="--", label="p99", **style
            )
            panels[2].plot(loads, [point.rows for point in own], label=name, **style)
        x = "load, as a multiple of the capacity one by one"
        requests = points[0].requests
        name_axes(panels[0], f"{machine.name}: throughput", x, "pictures per second")
        name_axes(panels[1], "latency of accepted requests", x, "seconds")
        name_axes(panels[2], "rows of a UNet call, mean", x, "rows")
        panels[1].set_yscale("log")
        panels[0].set_ylim(bottom=0)
        panels[2].set_ylim(bottom=0)
        add_legend(panels[0])
        add_legend(panels[1], fontsize=6)
        panels[0].annotate(
            fill(f"n = {requests} requests per point; {machine.source}", 48),
            (0.98, 0.04),
            xycoords="axes fraction",
            ha="right",
            va="bottom",
            fontsize=6,
        )
    title(figure, "Serving in simulated time, Poisson arrivals, four presets mixed")
    return figure


def measured_plot(results: Sequence[Result], subtitle: str) -> "Figure":
    """Throughput over that of one by one, with intervals, beside the simulation's prediction."""
    figure, axes = new_figure(9, 1.9 * len(results) + 0.9, len(results), 1, sharex=True)
    for panel, result in zip(axes, results, strict=True):
        for place, name in enumerate(SERVERS):
            ratio = result.speed[name]
            panel.barh(place, ratio.median, color=LIGHT.colour(place), height=0.6)
            reach = [[ratio.median - ratio.low], [ratio.high - ratio.median]]
            panel.errorbar(ratio.median, place, xerr=reach, ecolor=LIGHT.ink, capsize=3)
            panel.plot(result.predicted[name], place, marker="D", color=LIGHT.ink, markersize=4)
            panel.annotate(
                f"{ratio}×",
                (max(ratio.high, result.predicted[name]), place),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        panel.axvline(1, color=LIGHT.ink, linewidth=0.8, linestyle=":")
        panel.set_yticks(range(len(SERVERS)), list(SERVERS), fontsize=8)
        panel.invert_yaxis()
        rounds = len(next(iter(result.seconds.values())))
        work = f"{result.work}: {result.requests} requests at once, n = {rounds} rounds"
        name_axes(panel, work, "", "")
    highest = max(ratio.high for result in results for ratio in result.speed.values())
    axes[-1].set_xlim(0, 1.3 * highest)
    axes[-1].set_xlabel(
        "times the throughput of one by one (bars: median and 95 % interval; diamonds: simulated)"
    )
    title(figure, f"Serving the mini model three ways\n{fill(subtitle, 95)}")
    return figure
