"""Attention manipulation as data: validated parameters per part of the UNet and per step.

`AttentionManipulation.rows(step, steps)` is what the UNet module takes, so changing anything here
needs no export and no build.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastface_trt.engines.contract import KINDS, MANIPULATION_COLUMNS, PARTS
from fastface_trt.engines.manifest import AdapterKind
from fastface_trt.errors import InvalidRequest, UnknownName, naming

_LARGEST = 3.4028234e38
"""The engines compute in float32: what is beyond becomes infinite there."""


def is_number(value: object) -> bool:
    """Whether `value` is a number that is finite in float32; True and False are none."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        return False
    return bool(-_LARGEST <= value <= _LARGEST)


USUAL_TOKENS = 4
"""Image tokens that the constants of the scale-power were chosen for."""

_KIND, _SCALE, _POWER = (MANIPULATION_COLUMNS.index(name) for name in ("kind", "scale", "power"))


def token_factor(power: float, tokens: int) -> float:
    """By which s is multiplied for T `tokens`, (T/4)^(p−1)."""
    return float(min(np.float64(tokens / USUAL_TOKENS) ** (power - 1), _LARGEST))


PerStep = float | Sequence[float]
"""One value for all steps, or one per step."""


@dataclass(frozen=True, slots=True)
class PartManipulation:
    """Manipulation of the decoupled blocks in one part of the UNet (Eq. 7 to 10).

    kind: `off`, `scale_power` (AM1) or `softmask` (AM2). scale: s > 0. power: p ≥ 0 (scale_power).
    quantile: level in [0, 1], sharpness: d, adain_weight: w in [0, 1] with 1 = no AdaIN,
    invert_first_token: appendix E (softmask), for a trait of FaceID-Plus-v2's first token; None
    leaves it to the adapter (`for_adapter`) and means that one until then. upper_bound: f(A) is
    clamped to it.
    """

    kind: str = "off"
    scale: PerStep = 1.0
    power: PerStep = 1.0
    quantile: PerStep = 0.65
    sharpness: PerStep = 5.0
    adain_weight: PerStep = 1.0
    invert_first_token: bool | None = None
    upper_bound: float = 10.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UnknownName("attention manipulation", str(self.kind), KINDS)
        for name, low, high, meaning in (
            ("scale", 0.0, None, "at least 0"),
            ("power", 0.0, None, "at least 0"),
            ("quantile", 0.0, 1.0, "between 0 and 1"),
            ("sharpness", None, None, "finite"),
            ("adain_weight", 0.0, 1.0, "between 0 and 1"),
            ("upper_bound", 0.0, None, "at least 0"),
        ):
            value = getattr(self, name)
            if isinstance(value, str):  # its characters would be taken for values per step
                value = [value]
            elif isinstance(value, Sequence):
                value = tuple(value)
                object.__setattr__(self, name, value)  # equal however it was written
            for number in value if isinstance(value, Sequence) else [value]:
                if (
                    not is_number(number)
                    or (low is not None and number < low)
                    or (high is not None and number > high)
                ):
                    raise InvalidRequest(
                        f"{name} is {number!r:.40}.",
                        f"It must be a number that is {meaning}.",
                    )

        if self.invert_first_token not in (None, True, False):
            raise InvalidRequest(
                "invert_first_token is not true or false.",
                "Leave it out, and the adapter decides.",
            )

    def row(self, step: int, steps: int) -> list[float]:
        """Column values for one step, in the order of `MANIPULATION_COLUMNS`."""
        values = []
        for column in MANIPULATION_COLUMNS:
            value = getattr(self, column)
            if column == "kind":
                value = KINDS.index(value)
            elif value is None:
                value = True
            elif isinstance(value, Sequence):
                if len(value) != steps:
                    raise InvalidRequest(
                        f"{column} has {len(value)} values for {steps} steps.",
                        "Give one number, or one per step.",
                    )
                value = value[step]
            values.append(float(value))
        return values


OFF = PartManipulation()


@dataclass(frozen=True, slots=True)
class AttentionManipulation:
    """Manipulation per part of the UNet; the method leaves `mid` alone."""

    down: PartManipulation = OFF
    mid: PartManipulation = OFF
    up: PartManipulation = OFF

    def rows(self, step: int, steps: int, tokens: int = USUAL_TOKENS) -> NDArray[np.float32]:
        """Parameters of one step, float32 [parts, columns] as the UNet module takes them.

        Of a flat map over T `tokens` the scale-power makes s T^(1−p) and not s 4^(1−p), so that s
        is given as s (T/4)^(p−1): as strong as with the 4 tokens that its constants are for.
        """
        rows = []
        for part in PARTS:
            with naming(f"manipulation.{part}"):
                row = getattr(self, part).row(step, steps)
            if row[_KIND] == KINDS.index("scale_power"):
                row[_SCALE] = min(row[_SCALE] * token_factor(row[_POWER], tokens), _LARGEST)
            rows.append(row)
        return np.array(rows, dtype=np.float32)

    def for_adapter(self, kind: AdapterKind) -> "AttentionManipulation":
        """This manipulation with what was left to the adapter settled for one of that kind."""
        return AttentionManipulation(
            **{
                part: replace(values, invert_first_token=kind == "faceid-plus-v2")
                if values.invert_first_token is None
                else values
                for part, values in ((part, getattr(self, part)) for part in PARTS)
            }
        )

    @property
    def uses_softmask(self) -> bool:
        """Whether any part normalises over the branches of its request."""
        return any(getattr(self, part).kind == "softmask" for part in PARTS)

    def to_dict(self) -> dict[str, Any]:
        """Plain values of the parts that are not off, for metadata and JSON."""
        return {
            part: {f.name: _plain(getattr(getattr(self, part), f.name)) for f in fields(OFF)}
            for part in PARTS
            if getattr(self, part).kind != "off"
        }

    @classmethod
    def from_dict(cls, parts: Mapping[str, Mapping[str, Any]]) -> "AttentionManipulation":
        """The inverse of `to_dict`; unknown parts or parameters raise `UnknownName`."""
        made = {}
        if not isinstance(parts, Mapping):
            raise InvalidRequest(
                "manipulation is not given by part.", 'Write e.g. {"up": {"scale": 1.5}}.'
            )
        for part, values in parts.items():
            if part not in PARTS:
                raise UnknownName("part of the UNet", str(part), PARTS)
            with naming(f"manipulation.{part}"):
                made[part] = replace_checked(OFF, values)
        return cls(**made)


NO_MANIPULATION = AttentionManipulation()


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def replace_checked(base: PartManipulation, values: Mapping[str, Any]) -> PartManipulation:
    """`base` with some parameters changed; an unknown parameter raises `UnknownName`."""
    _check_by_parameter(values)
    known = [f.name for f in fields(PartManipulation)]
    for name in values:
        if name not in known:
            raise UnknownName("parameter of attention manipulation", str(name), known)
    return replace(base, **dict(values))


def parse_manipulation(text: str, base: PartManipulation) -> PartManipulation:
    """Read `scale=1.55,power=1.3` or `kind=softmask,sharpness=7.5/5/5/5` over a preset's values.

    `/` separates per-step values; see `manipulated` for the kind where none is given.
    """
    items = (part.strip().partition("=") for part in text.split(",") if part.strip())
    return manipulated(base, {name: value for name, _, value in items})


def manipulated(base: PartManipulation, values: Mapping[str, Any]) -> PartManipulation:
    """`base` with some parameters changed, which may be text as on the command line.

    Without `kind` and with a base that is off, `power` means scale_power and any parameter of
    softmask means softmask.
    """
    _check_by_parameter(values)
    values = {name: _read(name, value) for name, value in values.items()}
    if "kind" not in values and base.kind == "off" and values:
        softmask_only = {"quantile", "sharpness", "adain_weight", "invert_first_token"}
        values["kind"] = "softmask" if softmask_only & values.keys() else "scale_power"
    return replace_checked(base, values)


def _check_by_parameter(values: object) -> None:
    if not isinstance(values, Mapping):
        raise InvalidRequest("It is not given by parameter.", 'Write e.g. {"scale": 1.5}.')


def _read(name: str, value: Any) -> Any:
    if not isinstance(value, str) or name == "kind":
        return value
    if name == "invert_first_token":
        return value.lower() in ("1", "true", "yes", "on")
    try:
        numbers = tuple(float(x) for x in value.split("/"))
    except ValueError:
        raise InvalidRequest(
            f"'{name}={value:.40}' is not a parameter of attention manipulation.",
            "Write e.g. scale=1.55,power=1.3 (per-step values with /: 1/1.5/1.5/1).",
        ) from None
    return numbers[0] if len(numbers) == 1 else numbers
