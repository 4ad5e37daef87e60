"""A run of `evaluate` to be looked at: settings with labels, and metrics by setting and pair.

The run may still be growing, or may have been killed: whatever is finished counts.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import isnan, nan
from pathlib import Path, PurePosixPath
from typing import Any

from fastface_trt.evaluation.axes import Axis, find_axes, value_text
from fastface_trt.evaluation.judges import Column
from fastface_trt.evaluation.results import PictureResult, RunRecord, read_results, read_run
from fastface_trt.measure.statistics import Interval, paired_difference


@dataclass(frozen=True, slots=True)
class SettingView:
    """One setting: its name, a label for people, the values of what varies, its baseline's name."""

    name: str
    label: str
    axes: Mapping[str, Any]
    line: str | None
    baseline: str | None


@dataclass(frozen=True)
class RunView:
    """Settings, judges and finished pictures of a run, by setting and pair."""

    folder: Path
    record: RunRecord
    axes: Mapping[str, Axis]
    settings: tuple[SettingView, ...]
    results: Mapping[str, Mapping[int, PictureResult]]
    _known: dict[tuple[str, ...], Interval] = field(default_factory=dict, repr=False)

    @property
    def judges(self) -> tuple[Column, ...]:
        """What the judges measured."""
        return self.record.judges

    @cached_property
    def done(self) -> tuple[SettingView, ...]:
        """The settings that have a finished picture."""
        return tuple(setting for setting in self.settings if self.results[setting.name])

    @cached_property
    def by_name(self) -> Mapping[str, SettingView]:
        """The settings by name."""
        return {setting.name: setting for setting in self.settings}

    def baseline_of(self, setting: SettingView) -> SettingView | None:
        """What a setting is compared with; None for a baseline, or when that has no picture yet."""
        baseline = self.by_name.get(setting.baseline or "")
        return None if baseline in (None, setting) or baseline not in self.done else baseline

    @property
    def compared(self) -> tuple[SettingView, ...]:
        """The settings with finished pictures whose baseline has some, too."""
        return tuple(setting for setting in self.done if self.baseline_of(setting) is not None)

    @property
    def baselines(self) -> tuple[SettingView, ...]:
        """The settings that others are compared with."""
        found = {one.name: one for s in self.compared if (one := self.baseline_of(s)) is not None}
        return tuple(found.values())

    def judge(self, name: str) -> Column | None:
        """The judge of that name, None where the run has none or it has judged nothing yet."""
        found = next((judge for judge in self.judges if judge.name == name), None)
        return found if found is not None and self.has(name) else None

    def has(self, judge: str) -> bool:
        """Whether any picture has a value of that judge."""
        return any(self.mean(setting, judge).n for setting in self.done)

    def varying(self, settings: Sequence[SettingView]) -> tuple[Column, ...]:
        """The judges that tell any two pictures of these settings apart."""
        found = []
        for judge in self.judges:
            values = {v for s in settings for v in self.values(s, judge.name).values()}
            if len(values - {None}) > 1:
                found.append(judge)
        return tuple(found)

    def values(self, setting: SettingView, judge: str) -> dict[int, float | None]:
        """A metric of one setting by pair; None for a picture that has none."""
        return {p: result.metrics.get(judge) for p, result in self.results[setting.name].items()}

    def mean(self, setting: SettingView, judge: str) -> Interval:
        """Mean over the pairs that have the metric; NaN without any, no ends for a single one."""
        key = (setting.name, judge)
        if key not in self._known:
            values = [v for v in self.values(setting, judge).values() if v is not None]
            self._known[key] = _cautious(Interval.of(values) if values else None)
        return self._known[key]

    def difference(self, setting: SettingView, judge: str) -> Interval:
        """Mean paired difference of a metric to the setting's baseline; NaN without one."""
        key = (setting.name, judge, "difference")
        if key not in self._known:
            baseline = self.baseline_of(setting)
            ours = self.values(setting, judge)
            found = baseline and paired_difference(ours, self.values(baseline, judge))
            self._known[key] = _cautious(found or None)
        return self._known[key]

    def face(self, person: str) -> Path | None:
        """The source picture of a person, None where it is not in the folder."""
        return _inside(self.folder, f"faces/{person}.png")

    def picture(self, result: PictureResult | None) -> Path | None:
        """The file of a kept picture, None where it was not kept or is gone."""
        if result is None or result.picture is None:
            return None
        return _inside(self.folder, result.picture)


def read_view(folder: Path) -> RunView:
    """Read a run's folder; raise `InvalidRequest` for one that is none, or is damaged."""
    record = read_run(folder)
    axes = find_axes([setting.axes for setting in record.settings])
    labels = [setting_label(setting.name, setting.axes, axes) for setting in record.settings]
    settings = tuple(
        SettingView(
            one.name,
            label if labels.count(label) == 1 else one.name,
            one.axes,
            one.line,
            one.baseline,
        )
        for one, label in zip(record.settings, labels, strict=True)
    )
    found: dict[str, dict[int, PictureResult]] = {one.name: {} for one in settings}
    for result in read_results(folder, torn=True):
        found.setdefault(result.setting, {})[result.pair] = result
    ordered = {name: dict(sorted(results.items())) for name, results in found.items()}
    return RunView(folder, record, axes, settings, ordered)


def setting_label(name: str, values: Mapping[str, Any], axes: Mapping[str, Axis]) -> str:
    """`am1, λ 0.5` for a name made of axes, `am1_ip_adapter_scale=0.5`; other names as they are."""
    if "=" not in name or not values:
        return name
    return ", ".join(
        axes[axis].text(value) if axis in axes else value_text(value, axis)
        for axis, value in values.items()
    )


def interval_text(interval: Interval, *, sign: bool = False) -> str:
    """`mean (low to high)`, or how little is known; `sign` puts + before what is positive.

    Three digits, or as many more, up to six, as show that an interval excludes 0.
    """
    if isnan(interval.mean):
        return "no value"
    style = "+" if sign else "-"
    if isnan(interval.low):
        return _without_signed_zero(f"{interval.mean:{style}.3f} (n = 1)")
    nearest = min(abs(interval.low), abs(interval.high))
    digits = 3
    while sign and interval.excludes_zero and digits < 6 and nearest < 0.5 * 10**-digits:
        digits += 1
    return _without_signed_zero(interval.text(digits=digits, sign=style))


def axis_label(judge: Column) -> str:
    """Label, unit and direction of a judge, for an axis or a heading."""
    unit = f" [{judge.unit}]" if judge.unit else ""
    return f"{judge.label}{unit} {'↑' if judge.higher_is_better else '↓'}"


def verdict(difference: Interval, judge: Column) -> int:
    """1 for better than the baseline, −1 for worse, 0 where the interval holds 0 or is unknown."""
    if not difference.excludes_zero:
        return 0
    return 1 if (difference.mean > 0) == judge.higher_is_better else -1


def _without_signed_zero(text: str) -> str:
    return re.sub(r"[-+](0\.0+)(?!\d)", r"\1", text)


def _cautious(interval: Interval | None) -> Interval:
    """Ends only where there are several values: one says nothing about its spread."""
    if interval is None:
        return Interval(nan, nan, nan, 0)
    return interval if interval.n > 1 else Interval(interval.mean, nan, nan, 1)


def _inside(folder: Path, name: str) -> Path | None:
    """`folder`/`name` if it is a file there, None for a name that leads out of the folder."""
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts:
        return None
    path = folder / relative
    return path if path.is_file() else None


__all__ = ["RunView", "SettingView", "axis_label", "interval_text", "read_view", "verdict"]
