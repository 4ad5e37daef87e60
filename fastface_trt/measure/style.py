"""How every plot of this project looks: sizes, colours, grids, and how it gets into a file.

How figures look: one palette for light and dark pages, axes without clutter, encoded pictures.

Figures are made with `matplotlib.figure.Figure` and nothing of pyplot, so that no state is shared
between threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
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
) -> tuple[Figure, Sequence[Axes]]:
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


def name_axes(axes: Axes, title: str, x: str, y: str) -> None:
    """Title and both axes, with units."""
    axes.set_title(title, fontsize=10, loc="left", color=INK)
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)


def add_legend(axes: Axes, **options: Any) -> None:
    """A small legend."""
    axes.legend(**({"fontsize": 8, "frameon": False} | options))


def colour(index: int) -> str:
    """The colour of series number `index`."""
    return COLOURS[index % len(COLOURS)]


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG."""
    figure.savefig(path, dpi=DOTS_PER_INCH)


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI: Final = 160
MARKERS: Final = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")


@dataclass(frozen=True, slots=True)
class Theme:
    """Colours of a page: `series` are told apart by most colour-blind readers (Okabe and Ito)."""

    paper: str
    ink: str
    faint: str
    series: tuple[str, ...]
    sequence: str  # a colour map for what has an order

    def colour(self, index: int) -> str:
        """The colour of the `index`-th series; they repeat after the last."""
        return self.series[index % len(self.series)]


LIGHT: Final = Theme(
    paper="#ffffff",
    ink="#1f2328",
    faint="#d0d7de",
    series=("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56b4e9", "#5b5b5b"),
    sequence="viridis",
)
DARK: Final = Theme(
    paper="#161b22",
    ink="#e6edf3",
    faint="#3d444d",
    series=("#56b4e9", "#ff9d4d", "#2fd0a0", "#e79ac6", "#f0e442", "#8fb8ff", "#b0b0b0"),
    sequence="viridis",
)


def themed_figure(width: float, height: float, theme: Theme) -> Figure:
    """A figure of `width` × `height` inches; raise `MissingDependency` without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependency(
            f"Figures need {error.name}.", "Install it with: pip install 'fastface-trt[evaluate]'."
        ) from None
    figure = Figure(figsize=(width, height), facecolor=theme.paper, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def dress(axes: Axes, theme: Theme, *, grid: bool = True) -> None:
    """Colours, spines and grid lines of `axes`; call it when everything is drawn."""
    axes.set_facecolor(theme.paper)
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(theme.faint)
    axes.tick_params(colors=theme.ink, labelsize=8.5)
    for text in (axes.title, axes.xaxis.label, axes.yaxis.label):
        text.set_color(theme.ink)
    axes.title.set_fontsize(10)
    axes.xaxis.label.set_fontsize(9)
    axes.yaxis.label.set_fontsize(9)
    if grid:
        axes.grid(True, color=theme.faint, linewidth=0.6)
        axes.set_axisbelow(True)


def dress_legend(legend: Any, theme: Theme) -> None:
    """Colours of a legend of axes or of a figure."""
    frame = legend.get_frame()
    frame.set_facecolor(theme.paper)
    frame.set_edgecolor(theme.faint)
    for text in (*legend.get_texts(), legend.get_title()):
        text.set_color(theme.ink)
        text.set_fontsize(8.5)


def title(figure: Figure, text: str, theme: Theme) -> None:
    """A title over all axes of a figure."""
    figure.suptitle(text, color=theme.ink, fontsize=11)


def colour_bar(figure: Figure, image: Any, axes: Any, label: str, theme: Theme) -> None:
    """A colour bar for `image` beside `axes`, with its quantity as `label`."""
    bar = figure.colorbar(image, ax=axes, shrink=0.9, pad=0.01)
    bar.set_label(label, color=theme.ink, fontsize=8)
    bar.ax.tick_params(colors=theme.ink, labelsize=7)
    bar.outline.set_edgecolor(theme.faint)


def encode(figure: Figure) -> bytes:
    """The figure as PNG."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, facecolor=figure.get_facecolor())
    return buffer.getvalue()
