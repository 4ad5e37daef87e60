"""Which layers of a UNet or a VAE are quantised, and their ranges, measured by NVIDIA ModelOpt.

fp8 is ModelOpt's preset FP8_DEFAULT_CFG: E4M3, one scale per tensor. int8 is INT8_SMOOTHQUANT_CFG
with the exponent that ModelOpt's diffusers example gives for SDXL: one scale per tensor for inputs
and per output channel for weights, and before them a factor per input channel of a linear layer
that moves outliers from the inputs into the weights (Xiao et al., arXiv:2211.10438). A VAE has
convolutions only, which no factor helps: both formats take the largest magnitudes.

Attention follows NVIDIA's fp8 recipe for SDXL (ModelOpt, and its MLPerf submissions since v4.1):
queries, keys and values per tensor as measured, the softmax, which ends at 1, by the fixed scale
1/448.
"""

import contextlib
import copy
import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fastface_trt.errors import MissingDependency, WeightsError, install_hint
from fastface_trt.export.precision import QUANTIZED_FORMATS, Model, QuantizedFormat

SMOOTHING_EXPONENT = 0.8
_E4M3: dict[str, Any] = {"num_bits": (4, 3), "axis": None}
_WEIGHTS: dict[QuantizedFormat, dict[str, Any]] = {
    "fp8": _E4M3,
    "int8": {"num_bits": 8, "axis": 0},
}
_INPUTS: dict[QuantizedFormat, dict[str, Any]] = {
    "fp8": _E4M3,
    "int8": {"num_bits": 8, "axis": None},
}
_ALGORITHMS: dict[QuantizedFormat, Any] = {
    "fp8": "max",
    "int8": {"method": "smoothquant", "alpha": SMOOTHING_EXPONENT},
}
METHODS: Mapping[QuantizedFormat, str] = {
    "fp8": "max",
    "int8": f"smoothquant {SMOOTHING_EXPONENT}, max",
}


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


@dataclass(frozen=True)
class LayerRange:
    """What calibration knows of one layer.

    `input_amax` is the largest magnitude of its input, after the input was multiplied by
    `smoothing` (float32 [input channels]) where there is one.
    """

    input_amax: float
    smoothing: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class AttentionRange:
    """The largest magnitudes of an attention's q / √D, k and v."""

    q_amax: float
    k_amax: float
    v_amax: float


def modelopt_version() -> str:
    """The installed version of ModelOpt; raises `MissingDependency` when it cannot be imported."""
    _modelopt()
    return version("nvidia-modelopt")


def calibration_twin(module: Model) -> Model:
    """A copy to calibrate with: on the GPU if there is one, else in float32."""
    twin = copy.deepcopy(module)
    # nn.Module.to, since the models' own prints a warning about layers that it does not have.
    nn.Module.to(twin, "cuda" if torch.cuda.is_available() else torch.float32)
    return twin


def measure_ranges(
    module: Model,
    form: QuantizedFormat,
    choice: LayerChoice,
    run: Callable[[Model], None],
    *,
    smooth: bool = True,
) -> tuple[dict[str, LayerRange], dict[str, AttentionRange]]:
    """Ranges by layer name and by attention, measured on a copy of `module` that `run` calls.

    `smooth` lets int8 move outliers into the weights.
    The copy is on the GPU if there is one, else in float32, since few CPUs compute in float16; it
    takes the memory of the weights again, twice for float16 ones. Raises `MissingDependency`, and
    `WeightsError` when a range is not finite or a layer saw no input.
    """
    quantization = _modelopt()
    twin = calibration_twin(module)
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for name in choice.quantized:
        entries.append({"quantizer_name": f"{name}.weight_quantizer", "cfg": _WEIGHTS[form]})
        entries.append({"quantizer_name": f"{name}.input_quantizer", "cfg": _INPUTS[form]})
    for name in choice.attention:
        for part in "qkv":
            entries.append({"quantizer_name": f"{name}.{part}_bmm_quantizer", "cfg": _INPUTS[form]})
    config = {"quant_cfg": entries, "algorithm": _ALGORITHMS[form] if smooth else "max"}
    quiet = contextlib.redirect_stdout(io.StringIO())  # it reports with print
    with warnings.catch_warnings(), quiet, torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            quantization.quantize(twin, config, run)
        except AssertionError as error:
            if "nan" not in str(error):
                raise
            raise _not_finite("some layer") from None
    layers = {
        name: _range(name, twin.get_submodule(name).input_quantizer) for name in choice.quantized
    }
    return layers, {name: _attention_range(name, twin) for name in choice.attention}


def _attention_range(name: str, twin: Model) -> AttentionRange:
    attention = twin.get_submodule(name)
    q, k, v = (
        _range(f"{name}.{part}", getattr(attention, f"{part}_bmm_quantizer")).input_amax
        for part in "qkv"
    )
    return AttentionRange(q / (attention.to_q.out_features / attention.heads) ** 0.5, k, v)


def _not_finite(where: str) -> WeightsError:
    return WeightsError(
        f"Calibration found no finite range for {where}.",
        "Check the weights and the calibration inputs with a --precision fp32 export first.",
    )


def _range(name: str, quantizer: Any) -> LayerRange:
    amax = quantizer.amax
    if amax is None or not bool(torch.isfinite(amax).all()):
        raise _not_finite(f"layer {name}")
    smoothing = quantizer.pre_quant_scale
    return LayerRange(
        float(amax),
        None if smoothing is None else smoothing.detach().float().cpu().numpy().reshape(-1),
    )


def _modelopt() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it has not seen the newest transformers
            import modelopt.torch.quantization as quantization
    except ImportError as error:
        raise MissingDependency(
            f"Quantising needs NVIDIA ModelOpt, and {error.name or error} is missing.",
            f"Install it with: {install_hint('quantize')}",
        ) from None
    return quantization
