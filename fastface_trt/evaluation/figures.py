"""Which figures a run gets, which follows from what varies in it and never from its name.

α and β together give heat maps, λ gives Pareto fronts, every numeric axis gives curves, what no
curve shows gets bars, and every run with a baseline gets paired differences. Each figure is drawn
for one theme and says how many pairs are behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil, isnan
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from fastface_trt.evaluation.axes import (
    ALPHA,
    BETA,
    LAMBDA,
    Axis,
    Group,
    distinct,
    group_along,
    value_text,
)
from fastface_trt.evaluation.judges import Column
from fastface_trt.evaluation.run_view import RunView, SettingView, axis_label, verdict
from fastface_trt.measure.statistics import Interval
from fastface_trt.measure.style import (
    MARKERS,
    Theme,
    add_legend,
    colour_bar,
    name_axes,
    new_figure,
    title,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MIN_CURVE: Final = 3
"""Points that make a curve."""

MAX_BARS: Final = 24
MAX_TICKS: Final = 8
"""Values of an axis that each get a tick."""

_COLUMNS: Final = 3
"""Panels beside each other."""
_INTERVALS: Final = "Intervals are 95 % bootstrap intervals over pairs."


@dataclass(frozen=True)
class RunFigure:
    """A figure of a run: a key for file names, what it shows, how to read it, and how to draw it.

    `settings` are the names of the settings in it.
    """

    key: str
    heading: str
    caption: str
    settings: frozenset[str]
    draw: Callable[[Theme], Figure]


def choose_figures(run: RunView) -> list[RunFigure]:
    """The figures that this run's axes, judges and finished pictures allow, possibly none."""
    axes = run.axes
    grids = _grids(run)
    fronts, lines = _fronts(run, axes), []
    taken = {*ALPHA, *BETA} if grids else set()
    for axis in axes.values():
        if axis.name not in taken:
            lines += _curves(run, axis)
    shown = frozenset().union(*(figure.settings for figure in [*grids, *fronts, *lines]))
    return [*_differences(run), *fronts, *grids, *lines, *_bars(run, shown)]


def alpha_beta_group(run: RunView) -> tuple[Group, Axis, Axis] | None:
    """The largest group of settings over numeric α and β, with both axes; None without one."""
    axes = run.axes
    alpha = next((axes[name] for name in ALPHA if name in axes), None)
    beta = next((axes[name] for name in BETA if name in axes), None)
    if alpha is None or beta is None or alpha.scalars is None or beta.scalars is None:
        return None
    groups = [
        group
        for group in group_along(run, (alpha.name, beta.name))
        if distinct(group, alpha) > 1 and distinct(group, beta) > 1
    ]
    if not groups:
        return None
    return max(groups, key=lambda group: len(group.settings)), alpha, beta


def _grids(run: RunView) -> list[RunFigure]:
    found = alpha_beta_group(run)
    judges = run.varying(found[0].settings) if found else ()
    if found is None or not judges:
        return []
    group, alpha, beta = found
    return [
        RunFigure(
            "grid-alpha-beta",
            "Scores over α and β",
            "Each cell is the mean of one setting; brighter is better in every panel. Every panel "
            "has a colour range of its own, so look at the numbers before believing the colours."
            + _left_out(run, judges),
            _names([group]),
            partial(heat_maps, run, group, alpha, beta, judges),
        )
    ]


def _fronts(run: RunView, axes: Mapping[str, Axis]) -> list[RunFigure]:
    axis, identity = axes.get(LAMBDA), run.judge("id")
    if axis is None or axis.scalars is None or identity is None:
        return []
    groups = _long_groups(run, axis)
    figures = []
    for name in ("clip", "ae", "ir"):
        other = run.judge(name)
        if other is None or not groups:
            continue
        figures.append(
            RunFigure(
                f"pareto-id-{name}",
                f"{identity.label} against {other.label} over λ",
                "Each line is one configuration, its points the values of λ written beside them. "
                f"Up and to the right is better in both. {_INTERVALS}",
                _names(groups),
                partial(pareto_front, run, axis, groups, other, identity),
            )
        )
    return figures


def _curves(run: RunView, axis: Axis) -> list[RunFigure]:
    groups = _long_groups(run, axis) if axis.scalars is not None else []
    settings = [setting for group in groups for setting in group.settings]
    judges = run.varying(settings)
    if not judges:
        return []
    return [
        RunFigure(
            f"curve-{axis.name}",
            f"Sensitivity to {axis.label}",
            "A flat line says that the value hardly matters; ↑ and ↓ say which way is better. "
            f"Bands are 95 % bootstrap intervals over pairs.{_left_out(run, judges)}",
            _names(groups),
            partial(curves, run, axis, groups, judges),
        )
    ]


def _bars(run: RunView, shown: frozenset[str]) -> list[RunFigure]:
    rest = [setting for setting in run.done if setting.name not in shown]
    if shown:
        # Those that others are compared with do not make a figure by themselves.
        others = [setting for setting in rest if setting not in run.baselines]
        rest = [*run.baselines, *others] if others else []
    judges = run.varying(rest)
    if not judges:
        return []
    return [
        RunFigure(
            key,
            "Scores by setting",
            "Overlapping intervals do not say that settings are equal: the differences pair "
            f"by pair are sharper. {_INTERVALS}{_left_out(run, judges)}",
            frozenset(setting.name for setting in some),
            partial(bars, run, some, judges),
        )
        for key, some in _parts("bars", rest)
    ]


def _differences(run: RunView) -> list[RunFigure]:
    compared, baselines = run.compared, run.baselines
    judges = run.varying([*compared, *baselines])
    if not compared or not judges:
        return []
    to = baselines[0].label if len(baselines) == 1 else "the baseline"
    return [
        RunFigure(
            key,
            f"Difference to {to}",
            "Every setting saw the same faces, prompts and noise, so each dot is a mean of "
            "differences pair by pair. An interval that crosses 0 says that this run cannot tell "
            f"the two apart. {_INTERVALS}{_left_out(run, judges)}",
            frozenset(setting.name for setting in some),
            partial(differences, run, some, judges),
        )
        for key, some in _parts("differences", compared)
    ]


def _parts(
    key: str, settings: Sequence[SettingView]
) -> Iterator[tuple[str, Sequence[SettingView]]]:
    """Settings in figures of at most `MAX_BARS`, each with its key."""
    several = len(settings) > MAX_BARS
    for number, start in enumerate(range(0, len(settings), MAX_BARS), 1):
        yield f"{key}-{number}" if several else key, settings[start : start + MAX_BARS]


def _left_out(run: RunView, judges: Sequence[Column]) -> str:
    names = [judge.label for judge in run.judges if judge not in judges]
    return f" Left out, because every picture has the same: {', '.join(names)}." if names else ""


def _long_groups(run: RunView, axis: Axis) -> list[Group]:
    groups = group_along(run, (axis.name,))
    return [group for group in groups if distinct(group, axis) >= MIN_CURVE]


def _names(groups: Sequence[Group]) -> frozenset[str]:
    return frozenset(setting.name for group in groups for setting in group.settings)


def heat_maps(
    run: RunView, group: Group, rows: Axis, columns: Axis, judges: Sequence[Column], theme: Theme
) -> Figure:
    """Mean scores over two axes, one panel per judge, the number in each cell."""
    height, width = len(rows.values), len(columns.values)
    figure, panels = _panels(len(judges), 0.9 + 0.75 * width, 1.0 + 0.5 * height, theme)
    for judge, axes in zip(judges, panels, strict=True):
        grid = np.full((height, width), np.nan)
        for setting in group.settings:
            row = _index(rows, setting)
            grid[row, _index(columns, setting)] = run.mean(setting, judge.name).mean
        sequence = theme.sequence if judge.higher_is_better else f"{theme.sequence}_r"
        image = axes.imshow(grid, cmap=sequence, aspect="auto", origin="lower")
        for (row, column), value in np.ndenumerate(grid):
            text = "–" if isnan(value) else f"{value:.3f}"
            light = not isnan(value) and _brightness(image, value) > 0.55
            axes.text(
                column,
                row,
                text,
                ha="center",
                va="center",
                fontsize=7.5,
                color="#111111" if light else "#f5f5f5" if not isnan(value) else theme.ink,
            )
        axes.set_xticks(range(width), [columns.short(v) for v in columns.values])
        axes.set_yticks(range(height), [rows.short(v) for v in rows.values])
        axes.grid(False)
        name_axes(axes, axis_label(judge), columns.label, rows.label)
        colour_bar(figure, image, axes, judge.unit or judge.label, theme)
    others = "" if group.label == "all" else f", {group.label}"
    n = _n(run, group.settings)
    title(figure, f"{rows.label} × {columns.label}{others}, {n}", theme)
    return figure


def pareto_front(
    run: RunView, axis: Axis, groups: Sequence[Group], x: Column, y: Column, theme: Theme
) -> Figure:
    """Two scores against each other along `axis`, one line per group, points labelled by value."""
    figure, (axes,) = _panels(1, 9.0, 5.2, theme)
    for index, group in enumerate(groups):
        settings = _ordered(group, axis)
        points = [(run.mean(s, x.name), run.mean(s, y.name)) for s in settings]
        colour = theme.colour(index)
        means = [point.mean for point, _ in points], [point.mean for _, point in points]
        # Faint, or the intervals of many points would bury the lines.
        axes.errorbar(
            *means,
            xerr=_errors([point for point, _ in points]),
            yerr=_errors([point for _, point in points]),
            fmt="none",
            ecolor=colour,
            elinewidth=0.8,
            alpha=0.4,
        )
        axes.plot(
            *means,
            color=colour,
            marker=MARKERS[index % len(MARKERS)],
            markersize=5,
            linewidth=1.4,
            label=group.label,
        )
        for setting, (across, up) in zip(settings, points, strict=True):
            if not (isnan(across.mean) or isnan(up.mean)):
                axes.annotate(
                    axis.short(setting.axes[axis.name]),
                    (across.mean, up.mean),
                    xytext=(5, 4),
                    textcoords="offset points",
                    fontsize=7.5,
                    color=colour,
                )
    name_axes(axes, "", axis_label(x), axis_label(y))
    add_legend(axes, theme=theme, title=f"points: {axis.label}")
    settings = [setting for group in groups for setting in group.settings]
    title(figure, f"{y.label} against {x.label} over {axis.label}, {_n(run, settings)}", theme)
    return figure


def curves(
    run: RunView, axis: Axis, groups: Sequence[Group], judges: Sequence[Column], theme: Theme
) -> Figure:
    """Every score along a numeric axis, one panel per judge, one line per group."""
    figure, panels = _panels(len(judges), 4.2, 2.9, theme)
    for judge, axes in zip(judges, panels, strict=True):
        for index, group in enumerate(groups):
            settings = _ordered(group, axis)
            places = [axis.scalar(setting.axes[axis.name]) for setting in settings]
            means = [run.mean(setting, judge.name) for setting in settings]
            colour = theme.colour(index)
            axes.plot(
                places,
                [one.mean for one in means],
                color=colour,
                marker=MARKERS[index % len(MARKERS)],
                markersize=4,
                linewidth=1.4,
                label=group.label,
            )
            axes.fill_between(
                places,
                [one.low for one in means],
                [one.high for one in means],
                color=colour,
                alpha=0.18,
                linewidth=0,
            )
        for baseline in _outside_baselines(run, groups):
            level = run.mean(baseline, judge.name).mean
            axes.axhline(
                level, color=theme.ink, linewidth=0.9, linestyle="--", label=baseline.label
            )
        if len(axis.values) <= MAX_TICKS:
            axes.set_xticks([axis.scalar(value) for value in axis.values])
        name_axes(axes, "", axis.label, axis_label(judge))
    _shared_legend(figure, panels[0], theme)
    settings = [setting for group in groups for setting in group.settings]
    title(figure, f"Sensitivity to {axis.label}, {_n(run, settings)}", theme)
    return figure


def bars(
    run: RunView, settings: Sequence[SettingView], judges: Sequence[Column], theme: Theme
) -> Figure:
    """Every score of every setting as a bar from 0 with its interval, one panel per judge."""
    figure, panels = _panels(len(judges), 4.4, 0.9 + 0.3 * len(settings), theme)
    places = np.arange(len(settings))[::-1]
    for index, (judge, axes) in enumerate(zip(judges, panels, strict=True)):
        means = [run.mean(setting, judge.name) for setting in settings]
        axes.barh(
            places,
            [one.mean for one in means],
            xerr=_errors(means),
            color=theme.colour(0),
            alpha=0.75,
            height=0.66,
            label="mean",
            error_kw={"elinewidth": 1, "capsize": 2, "ecolor": theme.ink, "label": "95 % interval"},
        )
        _name_rows(axes, places, settings, named=bool(_row_title(index)))
        name_axes(axes, judge.label, axis_label(judge), _row_title(index))
        axes.grid(False, axis="y")
    _shared_legend(figure, panels[0], theme)
    title(figure, f"Scores by setting, {_n(run, settings)}", theme)
    return figure


def differences(
    run: RunView,
    settings: Sequence[SettingView],
    judges: Sequence[Column],
    theme: Theme,
) -> Figure:
    """Paired differences to each setting's baseline with intervals; colour says clear of 0."""
    figure, panels = _panels(len(judges), 4.4, 0.9 + 0.3 * len(settings), theme)
    places = np.arange(len(settings))[::-1]
    for index, (judge, axes) in enumerate(zip(judges, panels, strict=True)):
        found = [run.difference(setting, judge.name) for setting in settings]
        verdicts = [verdict(one, judge) for one in found]
        for kind, name, colour in (
            (1, "better", theme.colour(2)),
            (-1, "worse", theme.colour(1)),
            (0, "cannot be told apart", theme.colour(6)),
        ):
            chosen = [i for i, one in enumerate(verdicts) if one == kind]
            axes.errorbar(
                [found[i].mean for i in chosen],
                places[chosen],
                xerr=_errors([found[i] for i in chosen]) if chosen else None,
                fmt="o",
                markersize=4.5,
                elinewidth=1.4,
                capsize=2,
                color=colour,
                label=name,
            )
        axes.axvline(0, color=theme.ink, linewidth=0.8)
        _name_rows(axes, places, settings, named=bool(_row_title(index)))
        unit = f" [{judge.unit}]" if judge.unit else ""
        name_axes(axes, axis_label(judge), f"difference{unit}", _row_title(index))
    _shared_legend(figure, panels[0], theme)
    title(figure, f"Difference to the baseline, pair by pair, {_n(run, settings)}", theme)
    return figure


def _outside_baselines(run: RunView, groups: Sequence[Group]) -> list[SettingView]:
    """The one baseline of these settings where it is not among them, for a level line."""
    settings = [setting for group in groups for setting in group.settings]
    found = {one.name: one for s in settings if (one := run.baseline_of(s)) is not None}
    outside = [one for one in found.values() if one not in settings]
    return outside if len(found) == 1 else []


def _panels(count: int, width: float, height: float, theme: Theme) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels of `width` × `height` inches, `_COLUMNS` in a row."""
    columns = min(count, _COLUMNS)
    rows = ceil(count / columns)
    size = max(6.0, width * columns), height * rows + 0.7
    figure, panels = new_figure(*size, rows, columns, theme=theme)
    for empty in panels[count:]:
        empty.set_visible(False)
    return figure, panels[:count]


def _shared_legend(figure: Figure, axes: Axes, theme: Theme) -> None:
    handles, labels = axes.get_legend_handles_labels()
    where = {"loc": "outside lower center", "ncols": min(len(labels), 4)}
    add_legend(figure, handles, labels, theme=theme, **where)


def _name_rows(axes: Axes, places: Any, settings: Sequence[SettingView], *, named: bool) -> None:
    # A dollar would start mathematics.
    names = [setting.label.replace("$", r"\$") for setting in settings]
    axes.set_yticks(places, names if named else [""] * len(names))
    axes.set_ylim(-0.6, len(settings) - 0.4)


def _row_title(index: int) -> str:
    """What the rows of panel `index` are, said at the first panel of each line."""
    return "setting" if index % _COLUMNS == 0 else ""


def _ordered(group: Group, axis: Axis) -> list[SettingView]:
    return sorted(group.settings, key=lambda setting: axis.scalar(setting.axes[axis.name]))


def _index(axis: Axis, setting: SettingView) -> int:
    texts = [value_text(value) for value in axis.values]
    return texts.index(value_text(setting.axes[axis.name]))


def _errors(intervals: Sequence[Interval]) -> Any:
    """Distances from mean to ends, [2, points]; 0 where there is no interval."""
    ends = np.array([(one.mean - one.low, one.high - one.mean) for one in intervals]).T
    return np.nan_to_num(ends).clip(min=0)


def _brightness(image: Any, value: float) -> float:
    red, green, blue, _ = image.cmap(image.norm(value))
    return float(0.299 * red + 0.587 * green + 0.114 * blue)


def _n(run: RunView, settings: Sequence[SettingView]) -> str:
    counts = sorted(len(run.results[setting.name]) for setting in settings)
    span = f"{counts[0]}" if counts[0] == counts[-1] else f"{counts[0]} to {counts[-1]}"
    return f"n = {span} pairs per setting"
