"""A setting: the fields that an experiment gives, and the request that comes of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastface_trt.engines.contract import PARTS
from fastface_trt.errors import FastFaceError, InvalidRequest, UnknownName
from fastface_trt.runtime.guidance import parse_schedule
from fastface_trt.runtime.manipulation import (
    AttentionManipulation,
    PartManipulation,
    replace_checked,
)
from fastface_trt.runtime.presets import preset_fields

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
    "rescale",
    "dcg_variant",
    "scope",
    "plan",
    "negative_prompt",
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
            raise InvalidRequest(f"Setting {self.name}: {error.message}", error.mend) from None
        except FastFaceError as error:
            raise self._wrong(error.message, error.mend) from None
        except TypeError as error:
            raise self._wrong(f"{error}.", "Check the types of its values.") from None

    def _wrong(self, problem: str, mend: str) -> InvalidRequest:
        return InvalidRequest(f"Setting {self.name}: {problem}", mend)


def check_field(field: str, what: str) -> None:
    """Raise `UnknownName` unless `field` is one of `FIELDS`; `what` says where it stands."""
    if field not in FIELDS:
        raise UnknownName(what, field, FIELDS)


def _request_fields(fields: Mapping[str, Any], default_steps: int) -> dict[str, Any]:
    steps = fields.get("steps", default_steps)
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise InvalidRequest(f"steps is {steps!r}.", "Use a whole number.")
    values = preset_fields(str(fields.get("preset", "plain")), steps)
    base = values.pop("manipulation", AttentionManipulation())
    for name in _PLAIN:
        if name in fields and name != "preset":
            values[name] = fields[name]
    for name in ("alpha", "beta"):
        if isinstance(values.get(name), str):
            values[name] = parse_schedule(values[name])
    if values.get("rescale") in ("off", False):
        values["rescale"] = None
    parts = {part: _part(fields, part, getattr(base, part)) for part in PARTS}
    return values | {"steps": steps, "manipulation": AttentionManipulation(**parts)}


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
