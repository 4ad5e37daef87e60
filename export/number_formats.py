"""Number formats of weights: which are read as they are, which by their scales, which are refused.

A weight in fp64, fp32, fp16, bf16 or a plain cast to fp8 is its own value. Scaled fp8 keeps a scale
beside each weight, and the value is W = s · W₈, with s of the whole tensor, of each output channel,
or of each block. Other formats keep companions (tables, zero points, packed nibbles) that only
their library can read; a file that has them is refused by name, since its weights read as they
are would be noise.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fastface_trt.errors import WeightsError

PLAIN = "Use the model's file in fp16, bf16 or fp32; fp8 is read too, plain or with scales."

_FLOATS = ("F64", "F32", "F16", "BF16")
_FP8 = ("F8_E4M3", "F8_E5M2")
_COUNTS = ("I64", "I32", "I16", "BOOL")
"""Of positions and counters, which are no weights."""

_SCALES = (".scale_weight", ".weight_scale", ".weight_scale_inv", ".weight_scale_2")
_BESIDE_FP8 = re.compile(r"(^|\.)(scaled_fp8|scale_input|input_scale|comfy_quant)$")
"""Marks of scaled fp8, and scales of activations: what a value of a weight does not need."""

_FOREIGN = (
    (r"\.quant_state\.bitsandbytes__fp4$", "FP4 of bitsandbytes"),
    (
        r"\.(absmax|quant_map|nested_absmax|nested_quant_map)$|\.quant_state\.",
        "NF4 of bitsandbytes",
    ),
    (r"\.(SCB|weight_format)$", "LLM.int8 of bitsandbytes"),
    (r"weight\.(_data|_scale|_shift)$", "quanto's format"),
    (r"\.(_weight_)?qdata$|_qdata$", "torchao's format"),
    (r"\.(wscales|wzeros|smooth_factor)$", "SVDQuant of Nunchaku"),
    (r"\.(qweight|qzeros|packed_weight|weight_packed)$", "GPTQ's, AWQ's or another packed format"),
)
_OF_CONFIG = {
    "bitsandbytes": "bitsandbytes' format",
    "quanto": "quanto's format",
    "torchao": "torchao's format",
    "gguf": "GGUF",
    "modelopt": "ModelOpt's format",
}


@dataclass(frozen=True)
class TensorHeader:
    """Type by safetensors' name (F32, F16, BF16, F8_E4M3 …) and shape of one tensor."""

    dtype: str
    shape: tuple[int, ...]


def plain_tensors(
    file: str, tensors: Mapping[str, TensorHeader]
) -> tuple[dict[str, TensorHeader], dict[str, str]]:
    """The weights among a file's tensors, and for each that has one the name of its scale.

    Raises `WeightsError` for a file in a format that nobody reads here.
    """
    for pattern, form in _FOREIGN:
        found = [name for name in tensors if re.search(pattern, name)]
        if found:
            raise _foreign(file, form, f"{found[0]} and {len(found) - 1} more like it")
    scales: dict[str, str] = {}
    for name in tensors:
        ending = next((e for e in _SCALES if name.endswith(e)), None)
        if ending and (weight := f"{name.removesuffix(ending)}.weight") in tensors:
            if weight in scales:
                raise _foreign(file, "a format with two scales a weight (NVFP4)", name)
            scales[weight] = name
    is_fp8 = any(header.dtype in _FP8 for header in tensors.values())
    hidden = set(scales.values())
    hidden |= {name for name in tensors if is_fp8 and _BESIDE_FP8.search(name)}
    weights = {name: header for name, header in tensors.items() if name not in hidden}
    for name, header in weights.items():
        if header.dtype not in (*_FLOATS, *_FP8, *_COUNTS):
            form = {"I8": "int8", "U8": "packed bytes"}.get(header.dtype, header.dtype)
            raise _foreign(file, form, f"{name} and others")
    for name, scale in scales.items():
        if tensors[scale].dtype not in _FLOATS:
            raise _foreign(file, "a format with packed scales (MXFP8)", scale)
        _blocks(file, name, tensors[name].shape, tensors[scale].shape)
    return weights, scales


def dequantised(weight: Tensor, scale: Tensor) -> Tensor:
    """W = s · W₈ in float32; shapes as `plain_tensors` found them to fit."""
    factors = scale.float()
    for axis, times in enumerate(_blocks("", "", tuple(weight.shape), tuple(scale.shape))):
        if factors.ndim <= axis:
            factors = factors.unsqueeze(-1)
        if factors.shape[axis] > 1:
            factors = factors.repeat_interleave(times, dim=axis)
    return weight.float() * factors


def check_config(what: str, config: Mapping[str, object]) -> None:
    """Raise `WeightsError` where a model's configuration says that its weights are quantised."""
    stated = config.get("quantization_config")
    if stated:
        method = str(stated.get("quant_method")) if isinstance(stated, Mapping) else ""
        raise _foreign(what, _OF_CONFIG.get(method, method or "a quantised format"), "config.json")


def _foreign(file: str, form: str, evidence: str) -> WeightsError:
    return WeightsError(
        f"{file} holds weights in {form}, which cannot be read here ({evidence}).", PLAIN
    )


def _blocks(file: str, name: str, shape: tuple[int, ...], scale: tuple[int, ...]) -> list[int]:
    """Along each axis, how many of a weight's numbers share one of its scale's."""
    padded = scale + (1,) * (len(shape) - len(scale))
    if scale and scale != (1,) * len(scale) and len(padded) != len(shape):
        padded = ()
    if all(n == 1 for n in scale):
        return list(shape)
    if not padded or any(s == 0 or n % s for n, s in zip(shape, padded, strict=True)):
        raise WeightsError(
            f"{file} has scales of shape {list(scale)} for {name} of shape {list(shape)}.", PLAIN
        )
    return [n // s for n, s in zip(shape, padded, strict=True)]
