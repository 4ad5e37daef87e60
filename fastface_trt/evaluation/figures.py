"""Which figures a run gets: that follows from what varies in it, never from its name.

α and β together give heat maps, λ gives Pareto fronts, every numeric axis gives curves, what no
curve shows gets bars, and every run with a baseline gets paired differences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from fastface_trt.evaluation import plots
from fastface_trt.evaluation.axes import (
    ALPHA,
    BETA,
    LAMBDA,
    Axis,
    Group,
    distinct,
    find_axes,
    group_along,
)
from fastface_trt.evaluation.run_view import Judge, RunView
from fastface_trt.evaluation.style import Theme

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MIN_CURVE: Final = 3
"""Points that make a curve."""

MAX_BARS: Final = 24
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
    judges = [judge for judge in run.judges if run.has(judge.name)]
    if not judges:
        return []
    axes = find_axes(run)
    grids = _grids(run, axes, judges)
    fronts, lines = _fronts(run, axes), []
    taken = {*ALPHA, *BETA} if grids else set()
    for axis in axes.values():
        if axis.name not in taken:
            lines += _curves(run, axis, judges)
    shown = frozenset().union(*(figure.settings for figure in [*grids, *fronts, *lines]))
    return [*_differences(run, judges), *fronts, *grids, *lines, *_bars(run, judges, shown)]


def alpha_beta_group(run: RunView) -> tuple[Group, Axis, Axis] | None:
    """The largest group of settings over numeric α and β, with both axes; None without one."""
    axes = find_axes(run)
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


def _grids(run: RunView, axes: dict[str, Axis], judges: Sequence[Judge]) -> list[RunFigure]:
    found = alpha_beta_group(run)
    if found is None:
        return []
    group, alpha, beta = found
    return [
        RunFigure(
            "grid-alpha-beta",
            "Scores over α and β",
            "Each cell is the mean of one setting; brighter is better in every panel. Every panel "
            "has a colour range of its own, so look at the numbers before believing the colours.",
            _names([group]),
            lambda theme: plots.heat_maps(run, group, alpha, beta, judges, theme),
        )
    ]


def _fronts(run: RunView, axes: dict[str, Axis]) -> list[RunFigure]:
    axis, identity = axes.get(LAMBDA), run.judge("id")
    if axis is None or axis.scalars is None or identity is None or not run.has("id"):
        return []
    groups = _long_groups(run, axis)
    figures = []
    for name in ("clip", "ae", "ir"):
        other = run.judge(name)
        if other is None or not groups or not run.has(name):
            continue
        figures.append(
            RunFigure(
                f"pareto-id-{name}",
                f"{identity.label} against {other.label} over λ",
                "Each line is one configuration, its points the values of λ written beside them. "
                f"Up and to the right is better in both. {_INTERVALS}",
                _names(groups),
                _bind_front(run, axis, groups, other, identity),
            )
        )
    return figures


def _bind_front(
    run: RunView, axis: Axis, groups: list[Group], x: Judge, y: Judge
) -> Callable[[Theme], Figure]:
    return lambda theme: plots.pareto_front(run, axis, groups, x, y, theme)


def _curves(run: RunView, axis: Axis, judges: Sequence[Judge]) -> list[RunFigure]:
    groups = _long_groups(run, axis) if axis.scalars is not None else []
    if not groups:
        return []
    return [
        RunFigure(
            f"curve-{axis.name}",
            f"Sensitivity to {axis.label}",
            "A flat line says that the value hardly matters; ↑ and ↓ say which way is better. "
            f"Bands are intervals. {_INTERVALS}",
            _names(groups),
            lambda theme: plots.curves(run, axis, groups, judges, theme),
        )
    ]


def _bars(run: RunView, judges: Sequence[Judge], shown: frozenset[str]) -> list[RunFigure]:
    done = [setting for setting in run.settings if run.results[setting.name]]
    rest = [setting for setting in done if setting.name not in shown]
    if not rest:
        return []
    if shown and run.baseline is not None and run.baseline not in rest:
        rest.insert(0, run.baseline)
    figures = []
    for part, start in enumerate(range(0, len(rest), MAX_BARS)):
        some = rest[start : start + MAX_BARS]
        figures.append(
            RunFigure(
                f"bars-{part + 1}" if len(rest) > MAX_BARS else "bars",
                "Scores by setting",
                "Overlapping intervals do not say that settings are equal: the differences pair "
                f"by pair are sharper. {_INTERVALS}",
                frozenset(setting.name for setting in some),
                lambda theme, some=some: plots.bars(run, some, judges, theme),
            )
        )
    return figures


def _differences(run: RunView, judges: Sequence[Judge]) -> list[RunFigure]:
    baseline = run.baseline
    others = [s for s in run.settings if run.results[s.name] and s is not baseline]
    if baseline is None or not others:
        return []
    return [
        RunFigure(
            f"differences-{part + 1}" if len(others) > MAX_BARS else "differences",
            f"Difference to {baseline.name}",
            "Every setting saw the same faces, prompts and noise, so each dot is a mean of "
            "differences pair by pair. An interval that crosses 0 says that this run cannot tell "
            f"the two apart. {_INTERVALS}",
            frozenset(setting.name for setting in (*some, baseline)),
            lambda theme, some=some: plots.differences(run, some, baseline, judges, theme),
        )
        for part, start in enumerate(range(0, len(others), MAX_BARS))
        for some in [others[start : start + MAX_BARS]]
    ]


def _long_groups(run: RunView, axis: Axis) -> list[Group]:
    groups = group_along(run, (axis.name,))
    return [group for group in groups if distinct(group, axis) >= MIN_CURVE]


def _names(groups: Sequence[Group]) -> frozenset[str]:
    return frozenset(setting.name for group in groups for setting in group.settings)
