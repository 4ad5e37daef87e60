"""Experiments as TOML files: what to vary, what stays fixed, what to compare with.

    title = "Identity against prompt match over λ"
    pairs = 96                     # face × prompt pairs, when the command does not say
    baseline = {preset = "plain"}  # what a setting is compared with, pair by pair: the setting
                                   # with these axes and its own others, or one by its name
    line = "preset"                # settings with the same value of this axis make one curve

    [fixed]                        # fields of every setting
    steps = 4

    [axes]                         # every combination; combine = "one at a time" varies each alone
    preset = ["plain", "am1"]
    ip_adapter_scale = [0.35, 0.8]

    [[settings]]                   # instead of or besides axes, settings one by one
    name = "lightning, 2 steps"
    scheduler = "lightning"
    steps = 2

The fields are those of `FIELDS`. With `pixels = true` each picture is also compared with
its baseline's picture of the same pair, and all pictures of baselines are kept for that.
"""

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from fastface_trt.engines.contract import PARTS
from fastface_trt.engines.manifest import Strict, first_problem
from fastface_trt.errors import (
    FastFaceError,
    InvalidRequest,
    MissingDependency,
    UnknownName,
    install_hint,
)
from fastface_trt.runtime.manipulation import (
    AttentionManipulation,
    PartManipulation,
    replace_checked,
)
from fastface_trt.runtime.request import parse_fields

MANIPULATED = ("down", "up")
"""Parts that a manipulation field without a part's name applies to."""

_MANIPULATION = (
    "kind",
    "scale",
    "power",
    "quantile",
    "sharpness",
    "adain_weight",
    "invert_first_token",
    "upper_bound",
)
_PLAIN = (
    "preset",
    "steps",
    "ip_adapter_scale",
    "alpha",
    "beta",
    "guidance_rescale",
    "rescale",
    "dcg_variant",
    "scope",
    "plan",
    "negative_prompt",
    "prompt_syntax",
)
SOURCE_FIELDS = ("export", "lora_scale", "scheduler")
"""Fields that choose the engines and their schedule, not the request: an export's folder, the scale
of its adapter's LoRA, and the checkpoint of the registry whose sampler and steps are used."""

FIELDS = (
    *_PLAIN,
    *_MANIPULATION,
    *(f"{part}.{name}" for part in PARTS for name in _MANIPULATION),
    *SOURCE_FIELDS,
)
_OWN = ("name", "line", "axes")
"""Keys of a `[[settings]]` table that are not fields of a request."""


@dataclass(frozen=True)
class Source:
    """Which engines with which schedule a setting runs on; None: the run's own."""

    export: str | None = None
    lora_scale: float | None = None
    scheduler: str | None = None


@dataclass(frozen=True)
class Setting:
    """One point of an experiment: its name, what varies, all its fields, the curve it is on, and
    the name of the setting that it is compared with."""

    name: str
    axes: Mapping[str, Any]
    fields: Mapping[str, Any]
    line: str | None = None
    baseline: str | None = None

    @property
    def source(self) -> Source:
        """Engines and schedule; raises `InvalidRequest`."""
        scale = self.fields.get("lora_scale")
        if scale is not None and (isinstance(scale, bool) or not isinstance(scale, int | float)):
            raise self._wrong(f"lora_scale is {scale!r}.", "Use a number such as 0.5.")
        for name in ("export", "scheduler"):
            if not isinstance(self.fields.get(name, ""), str):
                raise self._wrong(f"{name} is {self.fields[name]!r}.", "Use a text.")
        return Source(
            self.fields.get("export"),
            None if scale is None else float(scale),
            self.fields.get("scheduler"),
        )

    def request_fields(self, steps: int) -> dict[str, Any]:
        """Arguments of `FastFace.request` but prompt and seed; `steps` where no field says.

        Raises `InvalidRequest` and `UnknownName`, naming the setting.
        """
        try:
            return _request_fields(self.fields, steps)
        except UnknownName as error:
            raise InvalidRequest(f"Setting {self.name}: {error.message}", error.hint) from None
        except FastFaceError as error:
            raise self._wrong(error.message, error.hint) from None
        except TypeError as error:
            raise self._wrong(f"{error}.", "Check the types of its values.") from None

    def _wrong(self, problem: str, hint: str) -> InvalidRequest:
        return InvalidRequest(f"Setting {self.name}: {problem}", hint)


def check_field(field: str, what: str) -> None:
    """Raise `UnknownName` unless `field` is one of `FIELDS`; `what` says where it stands."""
    if field not in FIELDS:
        raise UnknownName(what, field, FIELDS)


def _request_fields(fields: Mapping[str, Any], default_steps: int) -> dict[str, Any]:
    given = {name: fields[name] for name in _PLAIN if name in fields}
    for name in {"guidance_rescale", "rescale"} & given.keys():
        if given[name] is False:
            given[name] = "off"
    values = parse_fields(given, fields.get("steps", default_steps))
    base = values.pop("manipulation", AttentionManipulation())
    parts = {part: _part(fields, part, getattr(base, part)) for part in PARTS}
    return values | {"manipulation": AttentionManipulation(**parts)}


def _part(fields: Mapping[str, Any], part: str, base: PartManipulation) -> PartManipulation:
    """A part's manipulation: the preset's, then fields of all parts, then those of this part."""
    prefixes = ("", f"{part}.") if part in MANIPULATED else (f"{part}.",)
    given = {
        name: fields[f"{prefix}{name}"]
        for prefix in prefixes
        for name in _MANIPULATION
        if f"{prefix}{name}" in fields
    }
    if given and "kind" not in given and base.kind == "off":
        raise InvalidRequest(
            f"{next(iter(given))} is given, and the preset does not manipulate the {part} part.",
            "Name a preset with am1 or am2, or give kind.",
        )
    return replace_checked(base, given)


class Experiment(Strict):
    """One file; see the module docstring. `name` is the file's stem."""

    name: str
    title: str = Field(min_length=1)
    pairs: int = Field(ge=1)
    baseline: str | dict[str, Any] | None = None
    pixels: bool = False
    line: str | None = None
    combine: Literal["product", "one at a time"] = "product"
    fixed: dict[str, Any] = Field(default_factory=dict)
    axes: dict[str, Any] = Field(default_factory=dict)
    settings: tuple[dict[str, Any], ...] = ()

    def expanded(self) -> list[Setting]:
        """All settings, baselines first; raises `InvalidRequest` or `UnknownName`."""
        fixed = dict(flattened(self.fixed))
        axes = dict(flattened(self.axes))
        for place, fields in (("fixed", fixed), ("axes", axes)):
            for field in fields:
                self._check(field, place)
        for axis, values in axes.items():
            if not isinstance(values, list) or not values:
                raise self._wrong(f"axes.{axis} is {values!r}.", "Give a list of values.")
        settings = [*self._of_axes(fixed, axes), *self._listed(fixed)]
        if not settings:
            raise self._wrong("It has no settings.", "Add [axes] or [[settings]].")
        names = [setting.name for setting in settings]
        for name in names:
            if names.count(name) > 1:
                raise self._wrong(
                    f"Two settings are called {name}.", "Name them, or take one of them out."
                )
        if self.pixels and self.baseline is None:
            raise self._wrong("pixels needs a baseline.", "Name the setting to compare with.")
        if self.baseline is None:
            return settings
        compared = [replace(s, baseline=self._baseline_of(s, settings)) for s in settings]
        baselines = {setting.baseline for setting in compared}
        return sorted(compared, key=lambda setting: setting.name not in baselines)

    def _baseline_of(self, setting: Setting, settings: Sequence[Setting]) -> str:
        """The setting that `setting` is compared with; a baseline is compared with itself."""
        names = [one.name for one in settings]
        if isinstance(self.baseline, str):
            if self.baseline not in names:
                raise UnknownName(f"baseline in experiment {self.name}", self.baseline, names)
            return self.baseline
        wanted = {**setting.axes, **dict(flattened(self.baseline or {}))}
        for one in settings:
            if dict(one.axes) == wanted:
                return one.name
        raise self._wrong(
            f"No setting has the axes {wanted}, which the baseline of {setting.name} would have.",
            "Name axes and values of this experiment in baseline.",
        )

    def _of_axes(self, fixed: Mapping[str, Any], axes: Mapping[str, Any]) -> Iterator[Setting]:
        if not axes:
            return
        if self.line is not None and self.line not in axes:
            raise UnknownName(f"axis (line) in experiment {self.name}", self.line, axes)
        if self.combine == "product":
            for values in product(*axes.values()):
                chosen = dict(zip(axes, values, strict=True))
                line = None if self.line is None else str(chosen[self.line])
                yield Setting(_name(chosen), chosen, {**fixed, **chosen}, line)
            return
        if self.line is not None:
            raise self._wrong(
                'line and combine = "one at a time" exclude each other.', "Leave out line."
            )
        yield Setting("fixed", {}, dict(fixed), None)
        for axis, values in axes.items():
            for value in values:
                yield Setting(_name({axis: value}), {axis: value}, {**fixed, axis: value}, axis)

    def _listed(self, fixed: Mapping[str, Any]) -> Iterator[Setting]:
        for number, table in enumerate(self.settings):
            place = f"settings[{number}]"
            fields = dict(flattened({k: v for k, v in table.items() if k not in _OWN}))
            for field in fields:
                self._check(field, place)
            axes = table.get("axes", fields)
            line, name = table.get("line"), table.get("name", _name(fields))
            if not isinstance(axes, dict) or not isinstance(name, str) or not name:
                raise self._wrong(
                    f"{place}: name must be a text and axes a table.", "Correct or leave them out."
                )
            if line is None and self.line is not None:
                line = axes.get(self.line)
            yield Setting(
                _slug(name), dict(axes), {**fixed, **fields}, None if line is None else str(line)
            )

    def _check(self, field: str, place: str) -> None:
        check_field(field, f"field in {place} of experiment {self.name}")

    def _wrong(self, problem: str, hint: str) -> InvalidRequest:
        return InvalidRequest(f"Experiment {self.name}: {problem}", hint)


def built_in() -> list[str]:
    """Names of the experiments of the package."""
    folder = resources.files("fastface_trt.evaluation") / "experiments"
    return sorted(
        file.name.removesuffix(".toml") for file in folder.iterdir() if file.name.endswith(".toml")
    )


def load_experiment(which: str) -> Experiment:
    """The experiment of a file, or of the package by name.

    Raises `UnknownName` when there is neither, `InvalidRequest` for a mistake in it, saying where.
    """
    path = Path(which)
    if path.suffix == ".toml" or path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidRequest(
                f"The experiment {path} cannot be read: {error}.",
                f"Check the path, or name one of: {', '.join(built_in())}.",
            ) from None
    elif which in built_in():
        folder = resources.files("fastface_trt.evaluation") / "experiments"
        text = (folder / f"{which}.toml").read_text(encoding="utf-8")
    else:
        raise UnknownName("experiment", which, built_in())
    experiment = parse_experiment(text, path.stem, where=str(path))
    experiment.expanded()
    return experiment


def parse_experiment(text: str, name: str, *, where: str) -> Experiment:
    """Read TOML; `where` is what messages call the file. Raises `InvalidRequest`."""
    toml = _toml()
    try:
        values = toml.loads(text)
    except toml.TOMLDecodeError as error:
        raise InvalidRequest(f"{where} is not valid TOML: {error}.", "Correct that line.") from None
    if "name" in values:
        raise InvalidRequest(f"{where}: name is not a key.", "The file's name is the name.")
    try:
        return Experiment(name=name, **values)
    except ValidationError as error:
        place, problem = first_problem(error)
        raise InvalidRequest(
            f"{where} is not valid at {place or 'the top'}: {problem}.",
            "See fastface_trt/evaluation/experiment.py for the keys.",
        ) from None


def _toml() -> Any:
    """tomllib, which Python has since 3.11; before that the package tomli, which became it."""
    if sys.version_info >= (3, 11):
        import tomllib

        return tomllib
    try:
        import tomli
    except ImportError:
        raise MissingDependency(
            "Experiments need the package tomli on Python 3.10.",
            f"Install it with: {install_hint('evaluate')}",
        ) from None
    return tomli


def flattened(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Items of nested tables with dotted keys: `down.scale = 1` is a table in TOML."""
    for key, value in table.items():
        if isinstance(value, dict) and f"{prefix}{key}" not in FIELDS:
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _name(axes: Mapping[str, Any]) -> str:
    """`am1+dcg_ip_adapter_scale=0.8`: safe in file names; names of presets go without `preset=`."""
    parts = []
    for axis, value in axes.items():
        several = value if isinstance(value, list) else [value]
        text = "-".join(one if isinstance(one, str) else json.dumps(one) for one in several)
        parts.append(text if axis == "preset" else f"{axis}={text}")
    return _slug("_".join(parts))


def _slug(name: str) -> str:
    """A name that is also a folder's: letters, digits and +=.,- stay, the rest becomes `-`."""
    return re.sub(r"[^\w+=.,-]+", "-", name).strip("-.") or "setting"
