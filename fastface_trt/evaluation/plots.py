"""Plots of a run: α × β heat maps, Pareto fronts, curves, bars and paired differences.

Each draws into a new figure for one theme and puts the number of pairs behind it into its title.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, isnan
from typing import TYPE_CHECKING, Any

import numpy as np

from fastface_trt.evaluation.axes import Axis, Group, value_text
from fastface_trt.evaluation.judges import Column
from fastface_trt.evaluation.run_view import RunView, SettingView, axis_label, verdict
from fastface_trt.evaluation.statistics import Interval
from fastface_trt.evaluation.style import (
    MARKERS,
    Theme,
    colour_bar,
    dress,
    dress_legend,
    new_figure,
    title,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = 3
"""Panels beside each other."""

MAX_TICKS = 8
"""Values of an axis that each get a tick."""


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
        axes.set_xlabel(columns.label)
        axes.set_ylabel(rows.label)
        axes.set_title(axis_label(judge))
        dress(axes, theme, grid=False)
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
    axes.set_xlabel(axis_label(x))
    axes.set_ylabel(axis_label(y))
    dress(axes, theme)
    dress_legend(axes.legend(title=f"points: {axis.label}"), theme)
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
        axes.set_xlabel(axis.label)
        axes.set_ylabel(axis_label(judge))
        dress(axes, theme)
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
        _name_rows(axes, places, settings, named=index % _COLUMNS == 0)
        axes.set_xlabel(axis_label(judge))
        axes.set_title(judge.label)
        dress(axes, theme)
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
        _name_rows(axes, places, settings, named=index % _COLUMNS == 0)
        axes.set_xlabel(f"difference [{judge.unit}]" if judge.unit else "difference")
        axes.set_title(axis_label(judge))
        dress(axes, theme)
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
    figure = new_figure(max(6.0, width * columns), height * rows + 0.7, theme)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for empty in grid[count:]:
        empty.set_visible(False)
    return figure, list(grid[:count])


def _shared_legend(figure: Figure, axes: Axes, theme: Theme) -> None:
    handles, labels = axes.get_legend_handles_labels()
    columns = min(len(labels), 4)
    dress_legend(
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8.5),
        theme,
    )


def _name_rows(axes: Axes, places: Any, settings: Sequence[SettingView], *, named: bool) -> None:
    # A dollar would start mathematics.
    names = [setting.label.replace("$", r"\$") for setting in settings]
    axes.set_yticks(places, names if named else [""] * len(names))
    axes.set_ylim(-0.6, len(settings) - 0.4)
    if named:
        axes.set_ylabel("setting")


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
