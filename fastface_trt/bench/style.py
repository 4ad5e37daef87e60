"""How every plot of this project looks: sizes, colours, grids, and how it gets into a file."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fastface_trt.errors import MissingDependency

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS: Final = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#7F7F7F",
)
"""Okabe and Ito's palette, which people with any colour vision can tell apart."""
INK: Final = "#222222"
PALE: Final = "#D9D9D9"
DOTS_PER_INCH: Final = 130


def require_matplotlib() -> None:
    """Raise `MissingDependency` when there are no plots to be had."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise MissingDependency(
            "Plots need matplotlib.", "pip install 'fastface-trt[bench]'."
        ) from None


def new_figure(
    width: float, height: float, rows: int = 1, columns: int = 1, **options: Any
) -> tuple["Figure", Sequence["Axes"]]:
    """A figure of that size in inches and its axes, row by row; no global state is touched."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, **options)
    every = [axes for row in grid for axes in row]
    for axes in every:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, color=PALE, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=8, colors=INK)
    return figure, every


def name_axes(axes: "Axes", title: str, x: str, y: str) -> None:
    """Title and both axes, with units."""
    axes.set_title(title, fontsize=10, loc="left", color=INK)
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)


def add_legend(axes: "Axes", **options: Any) -> None:
    """A small legend."""
    axes.legend(**({"fontsize": 8, "frameon": False} | options))


def colour(index: int) -> str:
    """The colour of series number `index`."""
    return COLOURS[index % len(COLOURS)]


def save(figure: "Figure", path: Path) -> None:
    """Write a figure as PNG."""
    figure.savefig(path, dpi=DOTS_PER_INCH)
