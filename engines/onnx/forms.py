"""Forms of an exported module: what ONNX Runtime's CPU and CUDA providers run fastest.

An export spells everything out in the way that GPU builders (TensorRT) recognise. ONNX Runtime
recognises little of it, so a form is written when an engine is built:

| rewrite | exported | becomes | CPU | CUDA |
|---|---|---|---|---|
| attention | product, softmax, product by head | MultiHeadAttention on [B,N,C] | yes | yes |
| decoupled_attention | a call of the exported function | `If`, or the custom operator | If | both |
| group_norm | InstanceNormalization between reshapes, SiLU | GroupNorm, channels last | | yes |
| convolution | Conv | NhwcConv, no transpose between it and a norm | | yes |
| split_gelu | bias, split, GELU, product | BiasSplitGelu | | yes |
| skip_layer_norm | bias, residual, LayerNormalization | SkipLayerNormalization | | yes |
| bias_add | bias, residual, where no norm follows | BiasAdd | | yes |

No model-local function is left in a form: every call is written out (`functions`). Each rewrite
leaves alone what does not have its pattern, and what the provider's kernel does not take.

A prototype of the CUDA form ran on an H100 with the same operators. Not run on a GPU: what is new
here, the If of `branches`, the VAE's attention as two products, BiasAdd into a picture.

The package `onnx` is imported when a form is made, never to open an engine.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

VERSION: Final = 2
"""Part of an engine's identity: another form of the same module is another engine."""

Manipulation = Literal["operator", "branches"]
"""How a CUDA form computes λ f(A) V': by the custom operator, or by an If that needs none."""


@dataclass(frozen=True)
class Form:
    """A rewritten model, and how often each rewrite found its pattern.

    `model` is a serialised ModelProto; its external data stays in the folder of the export, which
    ONNX Runtime is told by `session.model_external_initializers_file_folder_path`.
    """

    model: bytes
    counts: Mapping[str, int]


def cpu_form(path: Path, tokens: int | None) -> Form | None:
    """The module with its attentions in the CPU's form, None where it has none to rewrite.

    `tokens` is the number of image tokens, None for a module that takes none. Raises
    `ExportIncomplete` for a file that is no complete model.
    """
    from fastface_trt.engines.onnx.attention import attentions, if_branch
    from fastface_trt.engines.onnx.functions import inline_all
    from fastface_trt.engines.onnx.graph import Graph

    if tokens is None:
        return None
    graph = Graph(path)
    attention, decoupled = attentions(graph, if_branch(tokens, single=True))
    if not attention:
        return None
    inline_all(graph)
    return Form(graph.finish(), {"attention": attention, "decoupled_attention": decoupled})


def cuda_form(path: Path, tokens: int | None, manipulation: Manipulation) -> Form | None:
    """The module in the CUDA provider's form, None where there is nothing to rewrite.

    `tokens` as for `cpu_form`. An If waits for the host, so a form with "branches" cannot be
    captured as a CUDA graph; one with "operator" wants the library of
    `fastface_trt.engines.kernels.operator_library`. Raises `ExportIncomplete` as `cpu_form` does.
    """
    from fastface_trt.engines.onnx.attention import (
        attentions,
        if_branch,
        lone_operators,
        operator_branch,
    )
    from fastface_trt.engines.onnx.functions import inline_all
    from fastface_trt.engines.onnx.graph import Graph
    from fastface_trt.engines.onnx.layout import channels_last, convolutions
    from fastface_trt.engines.onnx.linear import bias_adds, skip_layer_norms, split_gelus
    from fastface_trt.engines.onnx.norms import group_norms

    graph = Graph(path)
    operator = manipulation == "operator"
    branch = operator_branch if operator else if_branch(tokens or 0, single=False)
    counts = dict(zip(("attention", "decoupled_attention"), attentions(graph, branch), strict=True))
    if operator:
        counts["decoupled_attention"] += lone_operators(graph)
    counts["group_norm"] = group_norms(graph)
    counts["convolution"] = convolutions(graph)
    channels_last(graph)
    counts["split_gelu"] = split_gelus(graph)
    counts["skip_layer_norm"] = skip_layer_norms(graph)
    counts["bias_add"] = bias_adds(graph)
    if not any(counts.values()):
        return None
    inline_all(graph)
    return Form(graph.finish(), counts)
