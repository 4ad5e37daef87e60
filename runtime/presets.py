"""Presets: the parameter sets of the paper and of the authors' released configurations.

`plain` is the adapter as it is, `dcg` adds guidance, `am1` and `am2` add attention manipulation;
`am1+dcg` and `am2+dcg` are FastFace itself. A preset is only a set of field values of
`GenerationRequest`; every field can be overridden.
"""

from typing import Any

from fastface_trt.errors import UnknownName
from fastface_trt.runtime.manipulation import AttentionManipulation, PartManipulation

DESCRIPTIONS = {
    "plain": "The adapter as it is: the fastest.",
    "dcg": "Guidance: closer to the prompt, at up to three times the UNet work.",
    "am1": "Stronger attention to the face: more alike.",
    "am2": "Attention to the face in fewer places, the strongest of them.",
    "am1+dcg": "FastFace with stronger attention: alike, and close to the prompt.",
    "am2+dcg": "FastFace with attention in fewer places.",
}
"""Every preset, and what it does in a line."""

PRESETS = tuple(DESCRIPTIONS)
GUIDANCE_RESCALE = 0.75
ALPHA_BETWEEN, BETA_BETWEEN = 1.5, 3.0


def guided_between(value: float, steps: int) -> list[float]:
    """`value` on every step but the first and the last, where guidance does damage (appendix D)."""
    return [1.0 if step in (0, steps - 1) else value for step in range(steps)]


def _first_then(first: float, rest: float, steps: int) -> tuple[float, ...]:
    return (first, *([rest] * (steps - 1)))


def scale_power() -> AttentionManipulation:
    """AM1 as released: s = 1.55 in down, 1.45 in up, p = 1.3 (Eq. 7)."""
    return AttentionManipulation(
        down=PartManipulation("scale_power", scale=1.55, power=1.3),
        up=PartManipulation("scale_power", scale=1.45, power=1.3),
    )


def softmask(steps: int, adain_weight: float) -> AttentionManipulation:
    """AM2 as released: d = 7.5 then 5, s = 1 then 1.55, level 0.65 (Eq. 8 to 10)."""
    part = PartManipulation(
        "softmask",
        scale=_first_then(1.0, 1.55, steps),
        quantile=0.65,
        sharpness=_first_then(7.5, 5.0, steps),
        adain_weight=adain_weight,
    )
    return AttentionManipulation(down=part, up=part)


def preset_fields(name: str, steps: int) -> dict[str, Any]:
    """Fields of `GenerationRequest` that preset `name` sets, for a number of steps.

    `am2` alone has AdaIN off and `am2+dcg` has it on with w = 0.7, as in the released
    configurations.
    """
    if name not in PRESETS:
        raise UnknownName("preset", str(name), PRESETS)
    parts = name.split("+")
    fields: dict[str, Any] = {}
    if "am1" in parts:
        fields["manipulation"] = scale_power()
    if "am2" in parts:
        fields["manipulation"] = softmask(steps, 0.7 if "dcg" in parts else 1.0)
    if "dcg" in parts:
        fields["alpha"] = guided_between(ALPHA_BETWEEN, steps)
        fields["beta"] = guided_between(BETA_BETWEEN, steps)
        fields["guidance_rescale"] = GUIDANCE_RESCALE
    return fields
