"""Attention and group normalisation in an exported graph: spelled out, or as ONNX's own operators.

Spelled out (the default) is what every version of every backend reads: products and a softmax,
reshapes and an InstanceNormalization. `Attention` (opset 23) and `GroupNormalization` (opset 21)
say what is meant, so that a builder has nothing to recognise: TensorRT makes IAttention and
INormalizationLayer of them. Which one runs faster is for a card to say (not run on a GPU so far).

The exporter writes them under a domain of ours, and `use_onnx_operators` moves them into ONNX's: at
a later opset it would also rewrite what was not asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import onnx_ir as ir
import torch
from torch import Tensor, nn

from fastface_trt.export.precision import Model

Spelling = Literal["spelled", "onnx"]

_DOMAIN = "fastface.onnx"
_OPSETS = {"Attention": 23, "GroupNormalization": 21}


@dataclass(frozen=True)
class Operators:
    """How the UNet's self and text attention, and the group norms of UNet and VAE, are written.

    Image attention is a function of its own either way, and the VAE's one attention stays spelled
    out: no fused kernel takes a head of 512 channels.
    """

    attention: Spelling = "spelled"
    group_norm: Spelling = "spelled"

    def apply(self, model: Model) -> None:
        """Tell a UNet's or VAE's modules, in place; eager results stay what they are."""
        for processor in getattr(model, "attn_processors", {}).values():
            processor.attention_operator = self.attention
        if self.group_norm == "onnx":
            for module in model.modules():
                if isinstance(module, nn.GroupNorm):
                    module.__class__ = OnnxGroupNorm


SPELLED = Operators()


class OnnxGroupNorm(nn.GroupNorm):
    """GroupNorm of x [B,C,...] that is exported as GroupNormalization-21, in and out in x's type.

    The operator's `stash_type` says that statistics are float32 whatever the type.
    """

    def forward(self, x: Tensor) -> Tensor:
        """GroupNorm of x, computed in float32."""
        if not torch.onnx.is_in_onnx_export():
            weight, bias = self.weight.float(), self.bias.float()
            norm = nn.functional.group_norm
            return norm(x.float(), self.num_groups, weight, bias, self.eps).to(x.dtype)
        attributes = {"epsilon": float(self.eps), "num_groups": self.num_groups, "stash_type": 1}
        return _symbolic("GroupNormalization", (x, self.weight, self.bias), attributes)


def onnx_attention(q_BHND: Tensor, k_BHLD: Tensor, v_BHLD: Tensor) -> Tensor:
    """softmax(Q Kᵀ / √D) V as one node, [B,H,N,D]; only while a graph is exported."""
    return _symbolic("Attention", (q_BHND, k_BHLD, v_BHLD), {"scale": q_BHND.shape[-1] ** -0.5})


def use_onnx_operators(model: ir.Model) -> None:
    """Move the operators that were exported under our domain into ONNX's, and raise its opset."""
    for node in model.graph:
        if node.domain == _DOMAIN:
            node.domain = ""
            needed = _OPSETS[node.op_type]
            model.opset_imports[""] = max(model.opset_imports[""], needed)
    model.opset_imports.pop(_DOMAIN, None)


def _symbolic(name: str, inputs: Sequence[Tensor], attributes: dict[str, Any]) -> Tensor:
    like = inputs[0]
    return torch.onnx.ops.symbolic(
        f"{_DOMAIN}::{name}", inputs, attributes, dtype=like.dtype, shape=like.shape, version=1
    )
