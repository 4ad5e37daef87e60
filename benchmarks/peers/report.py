"""Tables and the plot of a comparison of peers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from textwrap import wrap
from typing import Any

from rich.table import Table

from benchmarks.peers.measure import PeerResult

OURS, OTHERS, INK = "#2a6f97", "#b8bcc2", "#222222"
COLUMNS = ("peer", "UNet samples", "seconds", "times as fast as eager PyTorch", "set-up, s")


def rows(results: Sequence[PeerResult]) -> list[tuple[str, ...]]:
    """One row of text per peer, in `COLUMNS`."""
    made = []
    for result in results:
        set_up = "" if result.set_up_seconds is None else f"{result.set_up_seconds:.0f}"
        if result.speed is None:
            made.append((result.label, str(result.unet_samples), "", result.problem or "", set_up))
            continue
        low, mid, high = (
            f"{x:.2f}" for x in (result.speed.low, result.speed.median, result.speed.high)
        )
        seconds = f"{median(result.seconds):.3f}"
        made.append(
            (result.label, str(result.unet_samples), seconds, f"{mid} ({low} to {high})", set_up)
        )
    return made


def rich_table(preset: str, results: Sequence[PeerResult]) -> Table:
    """The table for a terminal."""
    rounds = max(len(result.seconds) for result in results)
    table = Table(title=f"{preset}, medians of {rounds} rounds", title_justify="left")
    for column in COLUMNS:
        # Headings may take several lines, so that names do not have to; a ratio may not.
        width = 20 if column.startswith("times") else None
        table.add_column(column, justify="left" if column == "peer" else "right", min_width=width)
    for row in rows(results):
        table.add_row(*row)
    return table


def markdown(tables: Mapping[str, Sequence[PeerResult]], machine: str, what: str) -> str:
    """Markdown tables, one per preset."""
    lines = [f"{what} {machine}", ""]
    for preset, results in tables.items():
        rounds = max(len(result.seconds) for result in results)
        lines += [f"**{preset}**, medians of {rounds} interleaved rounds:", ""]
        lines += ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
        lines += ["| " + " | ".join(row) + " |" for row in rows(results)]
        lines.append("")
    return "\n".join(lines)


def plot(tables: Mapping[str, Sequence[PeerResult]], path: Path, subtitle: str) -> None:
    """Bars of the ratio to eager PyTorch with their intervals, one panel per preset."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    timed = {p: [r for r in results if r.speed is not None] for p, results in tables.items()}
    height = sum(0.9 + 0.36 * len(results) for results in timed.values()) + 1.2
    figure = Figure(figsize=(9.5, height), dpi=120, layout="constrained")
    panels: Any = figure.subplots(
        len(timed),
        1,
        sharex=True,
        squeeze=False,
        height_ratios=[0.6 + 0.36 * len(results) for results in timed.values()],
    )
    for axes, (preset, results) in zip(panels[:, 0], timed.items(), strict=True):
        _bars(axes, preset, results)
    speeds = [r.speed for results in timed.values() for r in results if r.speed is not None]
    panels[0, 0].set_xlim(0, 1.45 * max(1.2, *(speed.high for speed in speeds)))
    panels[-1, 0].set_xlabel("times as fast as the FastFace loop in eager PyTorch (1 = the same)")
    interval = "95 % interval of the median over rounds"
    figure.legend(
        handles=[
            Patch(color=OURS, label="FastFace-TRT"),
            Patch(color=OTHERS, label="peers"),
            Line2D([], [], color=INK, marker="|", label=interval),
        ],
        loc="outside lower right",
        ncols=3,
        fontsize=8,
    )
    figure.suptitle(
        "One picture end to end, same weights, noise and face\n" + "\n".join(wrap(subtitle, 95)),
        fontsize=10,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


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
            ecolor=INK,
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
    axes.axvline(1, color=INK, linewidth=0.8, linestyle=":", zorder=0)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_ylabel("peer", fontsize=8)
    rounds = len(results[0].seconds)
    axes.set_title(f"{preset}, n = {rounds} interleaved rounds", fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
