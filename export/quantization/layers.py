"""Which layers of a UNet are quantised, and why the others are not."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from fastface_trt.export.precision import QUANTIZED_FORMATS, QuantizedFormat


@dataclass(frozen=True)
class Exclusion:
    """Layers whose name matches `pattern` keep the compute type, in `formats`."""

    pattern: str
    reason: str
    formats: tuple[QuantizedFormat, ...] = QUANTIZED_FORMATS


EXCLUSIONS = (
    # The four groups of ModelOpt's diffusers presets.
    Exclusion(
        r"(^|\.)(time_embedding|add_embedding|time_emb_proj)(\.|$)", "time and size embedding"
    ),
    Exclusion(r"(^|\.)conv_in$", "first convolution"),
    Exclusion(r"(^|\.)conv_out$", "last convolution"),
    Exclusion(r"(^|\.)conv_shortcut$", "shortcut around a residual block"),
    # Four tokens a row: nothing to gain, and identity is what this model is for.
    Exclusion(r"(^|\.)to_[kv]_ip$", "image branch"),
    # The first text token is an outlier that takes the range of a linear code (MixDQ,
    # arXiv:2405.17873); a floating-point code has the exponent for it. 77 tokens a row.
    Exclusion(r"\.attn2\.to_[kv]$", "keys and values of the text", ("int8",)),
)


@dataclass(frozen=True)
class LayerChoice:
    """Names of the linear and convolution layers of a UNet, in its order.

    `excluded` maps each reason to the layers that it keeps from being quantised.
    """

    quantized: tuple[str, ...]
    excluded: Mapping[str, tuple[str, ...]]


def choose_layers(unet: nn.Module, form: QuantizedFormat) -> LayerChoice:
    """Sort every `Linear` and `Conv2d` of `unet` by `EXCLUSIONS`."""
    quantized: list[str] = []
    excluded: dict[str, list[str]] = {}
    for name, module in unet.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        reasons = (
            rule.reason
            for rule in EXCLUSIONS
            if form in rule.formats and re.search(rule.pattern, name)
        )
        reason = next(reasons, None)
        (quantized if reason is None else excluded.setdefault(reason, [])).append(name)
    return LayerChoice(tuple(quantized), {why: tuple(names) for why, names in excluded.items()})
