"""The roofline: what was achieved against what this machine could do at best."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fastface_trt.bench.report import RooflineReport
from fastface_trt.bench.style import INK, add_legend, colour, name_axes, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def roofline_plot(roofline: RooflineReport) -> "Figure":
    """Left: achieved time and floor per stage. Right: FLOP/s over FLOP per byte under the roofs."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    stages = roofline.stages
    figure, (bars, roof) = new_figure(11, max(4.2, 0.34 * len(stages) + 1.5), columns=2)
    places = np.arange(len(stages))
    floor = np.array([stage.floor_seconds for stage in stages]) * 1000
    achieved = np.array([stage.achieved_seconds for stage in stages]) * 1000
    bars.barh(places - 0.2, achieved, 0.38, color=colour(0), label="achieved (median)")
    bars.barh(places + 0.2, floor, 0.38, color=colour(2), label="floor of this machine")
    for place, most, least in zip(places, achieved, floor, strict=True):
        times = f" {most / least:.1f}×" if least > 0 else ""
        bars.text(max(most, least), float(place), times, va="center", fontsize=7, color=INK)
    bars.set_yticks(places, [stage.stage for stage in stages])
    bars.set_ylim(len(stages) - 0.4, -0.6)
    name_axes(bars, f"{roofline.case} (n = {roofline.n})", "ms per call", "stage")
    bars.set_xlim(right=1.2 * max(achieved.max(), floor.max()))
    add_legend(bars, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)

    peak, bandwidth = roofline.matmul_flops_per_second, roofline.copy_bytes_per_second
    intensity = np.array([stage.flops / stage.bytes for stage in stages if stage.bytes])
    left, right = _decades([*intensity, peak / bandwidth])
    x = np.geomspace(left, right, 100)
    roof.loglog(x, np.minimum(x * bandwidth, peak) / 1e9, color=INK, label="roof of this machine")
    counted = [stage for stage in stages if stage.bytes and stage.flops]
    rates = [stage.flops / stage.achieved_seconds / 1e9 for stage in counted]
    for index, (stage, rate) in enumerate(zip(counted, rates, strict=True)):
        roof.plot(
            stage.flops / stage.bytes,
            rate,
            linestyle="none",
            color=colour(index // 4),
            marker="os^D"[index % 4],
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
