"""Which layers of a UNet or a VAE are quantised, and why the others are not."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from fastface_trt.export.model import Model
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

VAE_EXCLUSIONS = (
    Exclusion(r"(^|\.)(post_quant_conv|conv_in)$", "first convolution"),
    Exclusion(r"(^|\.)conv_out$", "last convolution"),
    Exclusion(r"(^|\.)conv_shortcut$", "shortcut around a residual block"),
    Exclusion(r"\.attentions\.", "attention, a hundredth of the work"),
)


@dataclass(frozen=True)
class LayerChoice:
    """Names of the linear and convolution layers of a module, in its order.

    `excluded` maps each reason to the layers that it keeps from being quantised. `attention` names
    the attentions whose products are quantised.
    """

    quantized: tuple[str, ...]
    excluded: Mapping[str, tuple[str, ...]]
    attention: tuple[str, ...] = ()


def choose_layers(unet: Model, form: QuantizedFormat, *, attention: bool = False) -> LayerChoice:
    """Sort every `Linear` and `Conv2d` of `unet` by `EXCLUSIONS`; `attention` adds every one."""
    choice = _choose(unet, form, EXCLUSIONS)
    if not attention:
        return choice
    names = (name.removesuffix(".processor") for name in unet.attn_processors)
    return replace(choice, attention=tuple(names))


def choose_vae_layers(vae: nn.Module, form: QuantizedFormat) -> LayerChoice:
    """Sort every `Linear` and `Conv2d` of a VAE's decoder by `VAE_EXCLUSIONS`."""
    return _choose(vae, form, VAE_EXCLUSIONS, of=r"(decoder|post_quant_conv)(\.|$)")


def _choose(
    root: nn.Module, form: QuantizedFormat, exclusions: Sequence[Exclusion], of: str = ""
) -> LayerChoice:
    quantized: list[str] = []
    excluded: dict[str, list[str]] = {}
    for name, module in root.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d) or not re.match(of, name):
            continue
        reasons = (
            rule.reason
            for rule in exclusions
            if form in rule.formats and re.search(rule.pattern, name)
        )
        reason = next(reasons, None)
        (quantized if reason is None else excluded.setdefault(reason, [])).append(name)
    return LayerChoice(tuple(quantized), {why: tuple(names) for why, names in excluded.items()})
