"""Tables and the plot of a comparison of peers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.table import Table

from benchmarks.peers.measure import PeerResult

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
        table.add_column(column, justify="left" if column == "peer" else "right")
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
        places = range(len(results))
        medians = [r.speed.median for r in results if r.speed is not None]
        spans = [
            [r.speed.median - r.speed.low for r in results if r.speed is not None],
            [r.speed.high - r.speed.median for r in results if r.speed is not None],
        ]
        colours = ["#2a6f97" if r.name.startswith("fastface") else "#b8bcc2" for r in results]
        bars = axes.barh(places, medians, color=colours, height=0.7)
        axes.errorbar(medians, list(places), xerr=spans, fmt="none", ecolor="#222222", capsize=3)
        for place, result, high in zip(places, results, medians, strict=True):
            top = high + spans[1][place]
            axes.annotate(
                f"{high:.2f}×  {1000 * median(result.seconds):.0f} ms, "
                f"{result.unet_samples} UNet samples",
                (top, place),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        axes.axvline(1, color="#222222", linewidth=0.8, linestyle=":")
        labels = [r.label + ("" if r.does == preset else f" ({r.does})") for r in results]
        axes.set_yticks(list(places), labels, fontsize=8)
        axes.invert_yaxis()
        axes.set_ylabel("peer")
        axes.set_title(f"{preset}, n = {len(results[0].seconds)} rounds", fontsize=9, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(0, max(1.2, *(m + s for m, s in zip(medians, spans[1], strict=True))) * 1.45)
        del bars
    panels[-1, 0].set_xlabel("times as fast as the FastFace loop in eager PyTorch (1 = the same)")
    from matplotlib.patches import Patch

    figure.legend(
        handles=[
            Patch(color="#2a6f97", label="FastFace-TRT"),
            Patch(color="#b8bcc2", label="peers"),
            Patch(facecolor="none", edgecolor="#222222", label="line: 95 % interval of the median"),
        ],
        loc="outside lower right",
        ncols=3,
        fontsize=8,
    )
    figure.suptitle(
        f"One picture end to end, same weights, noise and face\n{subtitle}", fontsize=10
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
