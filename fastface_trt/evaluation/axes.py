"""What varies in a run: axes, their values, and groups of settings along one axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from fastface_trt.evaluation.run_view import RunView, SettingView

LABELS: Final[Mapping[str, str]] = {
    "ip_adapter_scale": "λ (ip_adapter_scale)",
    "alpha": "α (weight of the face)",
    "beta": "β (weight of the prompt)",
    "alpha_between": "α (but first and last step)",
    "beta_between": "β (but first and last step)",
    "rescale": "φ (rescale)",
    "scale": "s (scale)",
    "power": "p (power)",
    "sharpness": "d (sharpness)",
    "adain_weight": "w (adain_weight)",
    "quantile": "quantile level",
    "lora_scale": "LoRA scale",
    "scale_later": "s (scale, from the second step)",
    "sharpness_later": "d (sharpness, from the second step)",
    "steps": "UNet steps",
}
LAMBDA: Final = "ip_adapter_scale"
ALPHA: Final = ("alpha", "alpha_between")
BETA: Final = ("beta", "beta_between")


@dataclass(frozen=True)
class Axis:
    """Something that varies: its values in the order to show them.

    `scalars` gives each value (by its text) one number, None where values are no numbers. A list
    with a value per step counts as its one entry other than 1, as long as that tells values apart.
    """

    name: str
    values: tuple[Any, ...]
    scalars: Mapping[str, float] | None

    @property
    def label(self) -> str:
        """What to write at an axis."""
        return LABELS.get(self.name.rsplit(".", 1)[-1], self.name.replace("_", " "))

    @property
    def per_step(self) -> bool:
        """Whether values say at which step something applies."""
        words = self.name.lower().replace(".", "_").split("_")
        lists = [v for v in self.values if isinstance(v, list | tuple)]
        return "step" in words or "at" in words or (self.scalars is None and len(lists) > 1)

    def scalar(self, value: Any) -> float:
        """The number of a value; only where `scalars` is not None."""
        assert self.scalars is not None
        return self.scalars[value_text(value)]


@dataclass(frozen=True)
class Group:
    """Settings that differ in one axis (or two) and agree in every other."""

    others: Mapping[str, Any]
    settings: tuple[SettingView, ...]

    @property
    def label(self) -> str:
        """The values that the settings share, `all` where nothing else varies."""
        return ", ".join(value_text(v, k) for k, v in self.others.items()) or "all"


def value_text(value: Any, name: str = "") -> str:
    """A value of an axis for people; numbers and flags carry the axis's name where given."""
    if value is None:
        text = "off"
    elif isinstance(value, bool):
        text = "on" if value else "off"
    elif isinstance(value, list | tuple):
        text = " ".join(value_text(one) for one in value)
    elif isinstance(value, Mapping):
        text = " ".join(f"{key}={value_text(one)}" for key, one in value.items())
    elif isinstance(value, float):
        text = f"{value:g}"
    else:
        text = str(value)
    return f"{name} {text}" if name and not isinstance(value, str) else text


def find_axes(run: RunView) -> dict[str, Axis]:
    """The axes with at least two values, by name, in the order of the settings."""
    values: dict[str, dict[str, Any]] = {}
    for setting in run.settings:
        for name, value in setting.axes.items():
            values.setdefault(name, {})[value_text(value)] = value
    return {
        name: _axis(name, tuple(found.values())) for name, found in values.items() if len(found) > 1
    }


def group_along(run: RunView, names: Sequence[str]) -> list[Group]:
    """Settings that have all axes `names` and finished pictures, grouped by their other axes."""
    varying = find_axes(run)
    groups: dict[str, tuple[dict[str, Any], list[SettingView]]] = {}
    for setting in run.settings:
        if not all(name in setting.axes for name in names) or not run.results[setting.name]:
            continue
        others = {k: v for k, v in setting.axes.items() if k in varying and k not in names}
        key = repr(sorted((k, value_text(v)) for k, v in others.items()))
        groups.setdefault(key, (others, []))[1].append(setting)
    return [Group(others, tuple(settings)) for others, settings in groups.values()]


def distinct(group: Group, axis: Axis) -> int:
    """How many values of `axis` occur in the group."""
    return len({value_text(setting.axes[axis.name]) for setting in group.settings})


def _axis(name: str, values: tuple[Any, ...]) -> Axis:
    scalars: dict[str, float] = {}
    for value in values:
        number = _number(value)
        if number is None:
            return Axis(name, values, None)
        scalars[value_text(value)] = number
    if len(set(scalars.values())) < len(scalars):
        return Axis(name, values, None)
    return Axis(name, tuple(sorted(values, key=lambda v: scalars[value_text(v)])), scalars)


def _number(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return float(value)
    if isinstance(value, list | tuple) and value:
        numbers = [_number(one) for one in value]
        if any(number is None for number in numbers):
            return None
        other = {number for number in numbers if number != 1.0}
        if len(other) <= 1:
            return next(iter(other), 1.0)
    return None
