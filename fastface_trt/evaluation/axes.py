"""What varies in a run: axes, their values, and groups of settings along one axis."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from fastface_trt.evaluation.run_view import RunView, SettingView

_NAMES: Final[Mapping[str, tuple[str, str]]] = {
    "ip_adapter_scale": ("λ", "λ (ip_adapter_scale)"),
    "alpha": ("α", "α (weight of the face)"),
    "beta": ("β", "β (weight of the prompt)"),
    "alpha_between": ("α", "α (but first and last step)"),
    "beta_between": ("β", "β (but first and last step)"),
    "guidance_rescale": ("φ", "φ (guidance rescale)"),
    "rescale": ("φ", "φ (rescale)"),
    "scale": ("s", "s (scale)"),
    "scale_later": ("s", "s (scale, from the second step)"),
    "power": ("p", "p (power)"),
    "sharpness": ("d", "d (sharpness)"),
    "sharpness_later": ("d", "d (sharpness, from the second step)"),
    "adain_weight": ("w", "w (adain_weight)"),
    "quantile": ("quantile", "quantile level"),
    "lora_scale": ("LoRA", "LoRA scale"),
    "steps": ("steps", "UNet steps"),
    "dcg_variant": ("DCG", "DCG variant"),
}
_NOMINAL: Final = ("dcg_variant", "seed")
"""Numbers that only name things: no curve goes through them."""

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
        part, _, field = self.name.rpartition(".")
        label = _NAMES.get(field, ("", self.name.replace("_", " ")))[1]
        return f"{label}, {part}" if part else label

    @property
    def per_step(self) -> bool:
        """Whether values say at which step something applies."""
        lists = [v for v in self.values if isinstance(v, list | tuple)]
        return self.name in ("step", "at_step") or (self.scalars is None and len(lists) > 1)

    def scalar(self, value: Any) -> float:
        """The number of a value; only where `scalars` is not None."""
        assert self.scalars is not None
        return self.scalars[value_text(value)]

    def short(self, value: Any) -> str:
        """A value without the axis's name; a list by its one number where that says it all."""
        return value_text(value if self.scalars is None else self.scalar(value))

    def text(self, value: Any) -> str:
        """A value for people with the symbol of its axis, `λ 0.5`; words go without."""
        if isinstance(value, str) and value not in ("on", "off"):
            return value
        part, _, field = self.name.rpartition(".")
        symbol = _NAMES.get(field, (self.name.replace("_", " "), ""))[0]
        return f"{symbol} {part} {self.short(value)}" if part else f"{symbol} {self.short(value)}"


@dataclass(frozen=True)
class Group:
    """Settings that differ in one axis (or two) and agree in every other."""

    label: str
    settings: tuple[SettingView, ...]


def value_text(value: Any, name: str = "") -> str:
    """A value of an axis for people; all but words carry the axis's name where given."""
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


def find_axes(settings: Iterable[Mapping[str, Any]]) -> dict[str, Axis]:
    """The axes of settings, given by what each varies, that have at least two values."""
    values: dict[str, dict[str, Any]] = {}
    for setting in settings:
        for name, value in setting.items():
            values.setdefault(name, {})[value_text(value)] = value
    return {
        name: _axis(name, tuple(found.values())) for name, found in values.items() if len(found) > 1
    }


def group_along(run: RunView, names: Sequence[str]) -> list[Group]:
    """Settings that have all axes `names` and finished pictures, grouped by their other axes."""
    groups: dict[str, list[SettingView]] = {}
    for setting in run.done:
        if not all(name in setting.axes for name in names):
            continue
        others = [
            run.axes[axis].text(value)
            for axis, value in setting.axes.items()
            if axis in run.axes and axis not in names
        ]
        groups.setdefault(", ".join(others) or "all", []).append(setting)
    return [Group(label, tuple(settings)) for label, settings in groups.items()]


def distinct(group: Group, axis: Axis) -> int:
    """How many values of `axis` occur in the group."""
    return len({value_text(setting.axes[axis.name]) for setting in group.settings})


def _axis(name: str, values: tuple[Any, ...]) -> Axis:
    scalars: dict[str, float] = {}
    for value in values:
        number = _number(value)
        if number is None or name in _NOMINAL:
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
