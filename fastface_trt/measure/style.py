"""How every figure looks: one palette for light and dark pages, axes without clutter, PNG files.

Figures are made with `matplotlib.figure.Figure` and nothing of pyplot, so that no state is shared
between threads. The series' colours are Okabe and Ito's, which people with any colour vision can
tell apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fastface_trt.errors import MissingDependency

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI: Final = 160
MARKERS: Final = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")


@dataclass(frozen=True, slots=True)
class Theme:
    """Colours of a page; `sequence` is a colour map for what has an order."""

    paper: str
    ink: str
    faint: str
    series: tuple[str, ...]
    sequence: str = "viridis"

    def colour(self, index: int) -> str:
        """The colour of the `index`-th series; they repeat after the last."""
        return self.series[index % len(self.series)]


LIGHT: Final = Theme(
    paper="#ffffff",
    ink="#1f2328",
    faint="#d0d7de",
    series=("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56b4e9", "#5b5b5b"),
)
DARK: Final = Theme(
    paper="#161b22",
    ink="#e6edf3",
    faint="#3d444d",
    series=("#56b4e9", "#ff9d4d", "#2fd0a0", "#e79ac6", "#f0e442", "#8fb8ff", "#b0b0b0"),
)


def require_matplotlib() -> None:
    """Raise `MissingDependency` when there are no figures to be had."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise MissingDependency("Figures need matplotlib.", "pip install matplotlib.") from None


def empty_figure(width: float, height: float, theme: Theme = LIGHT) -> Figure:
    """A figure of that size in inches, without axes."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor=theme.paper, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def new_figure(
    width: float,
    height: float,
    rows: int = 1,
    columns: int = 1,
    *,
    theme: Theme = LIGHT,
    **options: Any,
) -> tuple[Figure, list[Axes]]:
    """A figure of that size in inches and its axes, row by row; `options` are of `subplots`."""
    figure = empty_figure(width, height, theme)
    every = list(figure.subplots(rows, columns, squeeze=False, **options).ravel())
    for axes in every:
        dress(axes, theme)
    return figure, every


def dress(axes: Axes, theme: Theme = LIGHT, *, grid: bool = True) -> None:
    """Colours, spines and grid lines of empty `axes`."""
    axes.set_facecolor(theme.paper)
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(theme.faint)
    axes.tick_params(colors=theme.ink, labelsize=8)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(theme.ink)
        label.set_fontsize(9)
    if grid:
        axes.grid(True, color=theme.faint, linewidth=0.6)
    axes.set_axisbelow(True)


def name_axes(axes: Axes, title: str, x: str, y: str) -> None:
    """Title and both axes of dressed `axes`, with units."""
    ink = axes.xaxis.label.get_color()
    axes.set_title(title, fontsize=10, loc="left", color=ink)
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def add_legend(owner: Axes | Figure, *series: Any, theme: Theme = LIGHT, **options: Any) -> None:
    """A small legend of axes or of a figure; `series` are handles and labels if not its own."""
    legend = owner.legend(*series, **({"fontsize": 8} | options))
    legend.get_frame().set(facecolor=theme.paper, edgecolor="none")
    for text in (*legend.get_texts(), legend.get_title()):
        text.set_color(theme.ink)


def title(figure: Figure, text: str, theme: Theme = LIGHT) -> None:
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


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG."""
    path.write_bytes(encode(figure))
