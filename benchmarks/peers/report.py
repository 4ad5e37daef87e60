"""Tables and the plot of a comparison of peers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from textwrap import wrap
from typing import Any

from benchmarks.peers.measure import PeerResult
from fastface_trt.measure.style import LIGHT, add_legend, name_axes, new_figure, save, title
from fastface_trt.measure.tables import Table, markdown_rows

OURS, OTHERS = LIGHT.colour(0), LIGHT.faint


def table_of(preset: str, results: Sequence[PeerResult]) -> Table:
    """One row per peer."""
    rounds = max(len(result.seconds) for result in results)
    return Table(
        f"{preset}, medians of {rounds} interleaved rounds",
        ("peer", "UNet samples", "seconds", "times as fast as eager PyTorch", "set-up, s"),
        tuple(
            (
                result.label,
                str(result.unet_samples),
                f"{median(result.seconds):.3f}" if result.speed else "",
                str(result.speed or result.problem or ""),
                "" if result.set_up_seconds is None else f"{result.set_up_seconds:.0f}",
            )
            for result in results
        ),
    )


def markdown(tables: Mapping[str, Sequence[PeerResult]], machine: str, what: str) -> str:
    """Markdown tables, one per preset."""
    lines = [f"{what} {machine}", ""]
    for preset, results in tables.items():
        table = table_of(preset, results)
        lines += [f"**{preset}**{table.title.removeprefix(preset)}:", "", *markdown_rows(table), ""]
    return "\n".join(lines)


def plot(tables: Mapping[str, Sequence[PeerResult]], path: Path, subtitle: str) -> None:
    """Bars of the ratio to eager PyTorch with their intervals, one panel per preset."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    timed = {p: [r for r in results if r.speed is not None] for p, results in tables.items()}
    heights = [0.9 + 0.36 * len(results) for results in timed.values()]
    figure, panels = new_figure(
        9.5, sum(heights) + 1.2, len(timed), sharex=True, height_ratios=[h - 0.3 for h in heights]
    )
    for axes, (preset, results) in zip(panels, timed.items(), strict=True):
        _bars(axes, preset, results)
    speeds = [r.speed for results in timed.values() for r in results if r.speed is not None]
    panels[0].set_xlim(0, 1.45 * max(1.2, *(speed.high for speed in speeds)))
    panels[-1].set_xlabel("times as fast as the FastFace loop in eager PyTorch (1 = the same)")
    interval = "95 % interval of the median over rounds"
    add_legend(
        figure,
        handles=[
            Patch(color=OURS, label="FastFace-TRT"),
            Patch(color=OTHERS, label="peers"),
            Line2D([], [], color=LIGHT.ink, marker="|", label=interval),
        ],
        loc="outside lower right",
        ncols=3,
    )
    words = "\n".join(wrap(subtitle, 95))
    title(figure, f"One picture end to end, same weights, noise and face\n{words}")
    path.parent.mkdir(parents=True, exist_ok=True)
    save(figure, path)


def _bars(axes: Any, preset: str, results: Sequence[PeerResult]) -> None:
    labels = []
    for place, result in enumerate(results):
        speed = result.speed
        assert speed is not None  # only peers that were timed are drawn
        colour = OURS if result.name.startswith("fastface-trt") else OTHERS
        axes.barh(place, speed.median, color=colour, height=0.7)
        axes.errorbar(
            speed.median,
            place,
            xerr=[[speed.median - speed.low], [speed.high - speed.median]],
            ecolor=LIGHT.ink,
            capsize=3,
        )
        axes.annotate(
            f"{speed.median:.2f}×, {1000 * median(result.seconds):.0f} ms, "
            f"{result.unet_samples} UNet samples",
            (speed.high, place),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )
        labels.append(result.label + ("" if result.does == preset else f" (preset {result.does})"))
    axes.axvline(1, color=LIGHT.ink, linewidth=0.8, linestyle=":", zorder=0)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.invert_yaxis()
    rounds = len(results[0].seconds)
    name_axes(axes, f"{preset}, n = {rounds} interleaved rounds", "", "peer")
