"""What modules compute in, which types they show outside, and what stays float32 inside.

| precision | computes in | latents, noise, pictures | text and image features |
|---|---|---|---|
| fp32 | float32 | float32 | float32 |
| fp16 | float16 | float32 | float16 |
| bf16 | bfloat16 | float32 | float32, since numpy has no bfloat16 |
| fp8, int8 | float16; quantised layers of the UNet in 8 bits | float32 | float16 |

Latents are float32 everywhere because a scheduler adds small steps to them. Features have the type
that the module which takes them computes in, so that a tensor goes from engine to engine as it is.
"""

from typing import Any, Literal, TypeAlias, get_args

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

Precision = Literal["fp32", "fp16", "bf16", "fp8", "int8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
QuantizedFormat = Literal["fp8", "int8"]
QUANTIZED_FORMATS: tuple[QuantizedFormat, ...] = get_args(QuantizedFormat)
StoredType = Literal["fp32", "fp16", "bf16"]
_STORED: dict[Precision, StoredType] = {
    "fp32": "fp32",
    "fp16": "fp16",
    "bf16": "bf16",
    "fp8": "fp16",
    "int8": "fp16",
}
_DTYPES: dict[StoredType, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
Model: TypeAlias = Any
"""A diffusers or transformers module. Their attributes are made at run time from a configuration,
so a type checker knows none of them; naming the type says at least what is meant."""


def stored_type(precision: Precision) -> StoredType:
    """The type of the weights that are not quantised."""
    return _STORED[precision]


def compute_dtype(precision: Precision) -> torch.dtype:
    """The torch type in which everything that is not quantised computes."""
    return _DTYPES[_STORED[precision]]


def boundary_dtype(compute: torch.dtype) -> torch.dtype:
    """The type of text and image features at the inputs and outputs of modules."""
    return torch.float32 if compute == torch.bfloat16 else compute


class Float32GroupNorm(nn.GroupNorm):
    """Group normalisation in float32 of half-precision activations, in and out in their type.

    Eager PyTorch accumulates in float32 too. ONNX has no word for it here: the exporter writes
    InstanceNormalization, which (unlike LayerNormalization with its `stash_type`) leaves the type
    of the statistics to the backend, and at 1024² a group of the VAE holds 4·10⁶ values.
    """

    def forward(self, x: Tensor) -> Tensor:
        """GroupNorm of x [B,C,...], computed in float32."""
        weight, bias = self.weight.float(), self.bias.float()
        return functional.group_norm(x.float(), self.num_groups, weight, bias, self.eps).to(x.dtype)


def keep_group_norms_in_float32(module: nn.Module) -> None:
    """Turn every half-precision GroupNorm below `module` into a `Float32GroupNorm`, in place."""
    for owner in list(module.modules()):
        for name, norm in list(owner.named_children()):
            if type(norm) is not nn.GroupNorm or norm.weight.dtype == torch.float32:
                continue
            wide = Float32GroupNorm(norm.num_groups, norm.num_channels, norm.eps, device="meta")
            wide.weight, wide.bias = norm.weight, norm.bias
            setattr(owner, name, wide)
