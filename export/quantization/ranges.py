"""The ranges of a module's layers, measured by NVIDIA ModelOpt while the module runs.

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
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fastface_trt.errors import MissingDependency, WeightsError
from fastface_trt.export.model import Model
from fastface_trt.export.precision import QuantizedFormat
from fastface_trt.export.quantization.layers import LayerChoice

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
            "Install it with: pip install 'fastface-trt[quantize]'.",
        ) from None
    return quantization
