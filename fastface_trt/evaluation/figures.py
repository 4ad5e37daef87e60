"""Which figures a run gets: that follows from what varies in it, never from its name.

α and β together give heat maps, λ gives Pareto fronts, every numeric axis gives curves, what no
curve shows gets bars, and every run with a baseline gets paired differences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

from fastface_trt.evaluation import plots
from fastface_trt.evaluation.axes import (
    ALPHA,
    BETA,
    LAMBDA,
    Axis,
    Group,
    distinct,
    group_along,
)
from fastface_trt.evaluation.judges import Column
from fastface_trt.evaluation.run_view import RunView, SettingView
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
            partial(plots.heat_maps, run, group, alpha, beta, judges),
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
                partial(plots.pareto_front, run, axis, groups, other, identity),
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
            partial(plots.curves, run, axis, groups, judges),
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
            partial(plots.bars, run, some, judges),
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
            partial(plots.differences, run, some, judges),
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
