"""Floating-point operations of an ONNX module, and the bytes that it must move.

A multiplication and the addition that takes its product are two operations. Products of matrices
are told apart by what they multiply: a convolution, a linear layer (one factor is made of weights),
or an attention (both factors depend on the module's inputs). Everything else is counted in
elements and kept out of the total: it is below a percent, and what it costs is memory traffic.

Counted is what the exported graph says. A backend may do more (padding) or less (Winograd's
convolutions), which is why a measured rate can exceed a machine's.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Final, Literal

from fastface_trt.bench.static_graph import StaticNode, StaticTensor, read_static_graph
from fastface_trt.errors import InvalidRequest

Kind = Literal["convolution", "linear", "attention"]

_VIEWS: Final = frozenset(
    ("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Shape", "Size", "Constant")
)
_MOVES: Final = _VIEWS.union(
    ("Cast", "CastLike", "Concat", "ConstantOfShape", "Expand", "Pad", "Range", "Resize"),
    ("Gather", "GatherElements", "GatherND", "ScatterElements", "ScatterND", "OneHot"),
    ("Slice", "Split", "Tile", "Transpose", "Where"),
)
_NORMS: Final = frozenset(("Softmax", "LogSoftmax", "ArgMax", "ArgMin")).union(
    ("AveragePool", "MaxPool", "GlobalAveragePool", "BatchNormalization", "GroupNormalization"),
    ("InstanceNormalization", "LayerNormalization", "LpNormalization", "RMSNormalization"),
)
_UNKNOWN_INSIDE: Final = frozenset(("If", "Loop", "Scan", "LSTM", "GRU", "RNN"))


@dataclass(frozen=True, slots=True)
class OperationCount:
    """What one call of a module has to compute and to move.

    convolution, linear, attention: floating-point operations of the products of matrices.
    elementwise: elements written by pointwise operators and read by reductions and norms.
    weight_bytes as they are stored in the ONNX file; of a table that rows are taken from, only
    those rows. input_bytes, output_bytes of the module. activation_bytes: what the operators would
    read and write beside weights if none were fused and nothing stayed in a cache.
    """

    convolution: int
    linear: int
    attention: int
    elementwise: int
    weight_bytes: int
    input_bytes: int
    output_bytes: int
    activation_bytes: int
    operators: Mapping[str, int]

    @property
    def flops(self) -> int:
        """Floating-point operations of all products of matrices."""
        return self.convolution + self.linear + self.attention

    @property
    def flops_without_attention(self) -> int:
        """The same without the products of two activations, as some publications count."""
        return self.convolution + self.linear

    @property
    def bytes(self) -> int:
        """Bytes that must move whatever the backend fuses: weights, inputs and outputs."""
        return self.weight_bytes + self.input_bytes + self.output_bytes


def count_module(path: Path, sizes: Mapping[str, int]) -> OperationCount:
    """Count the operations of one call of the ONNX module at `path`.

    `sizes` gives a number for each dynamic size (batch, requests, height and width in latent
    pixels, …); what the module lacks is ignored. Weights are not read. Raises `InvalidRequest` for
    a file that cannot be followed and for operators with a body of their own, `MissingDependency`
    without onnx.
    """
    graph = read_static_graph(path, sizes)
    totals: Counter[Kind] = Counter()
    operators: Counter[str] = Counter()
    elementwise = traffic = 0
    for node in graph.nodes:
        if all(tensor.weight for tensor in node.outputs):
            continue  # computed once when the engine is built
        if node.op in _UNKNOWN_INSIDE:
            raise InvalidRequest(
                f"{path} has an operator {node.op}, whose operations depend on values.",
                "Count a module without control flow.",
            )
        operators[node.op] += 1
        product = _product(node)
        if product is not None:
            kind, flops = product
            totals[kind] += flops
        else:
            elementwise += _elements(node)
        if node.op not in _VIEWS:
            moved = [t for t in (*node.inputs, *node.outputs) if t is not None and not t.weight]
            if any(tensor.dtype != "INT64" for tensor in moved):  # not arithmetic on sizes
                traffic += sum(tensor.bytes for tensor in moved)
    return OperationCount(
        convolution=totals["convolution"],
        linear=totals["linear"],
        attention=totals["attention"],
        elementwise=elementwise,
        weight_bytes=_weight_bytes(graph.weights, graph.nodes),
        input_bytes=sum(tensor.bytes for tensor in graph.inputs),
        output_bytes=sum(tensor.bytes for tensor in graph.outputs),
        activation_bytes=traffic,
        operators=dict(operators.most_common()),
    )


def _product(node: StaticNode) -> tuple[Kind, int] | None:
    """Kind and operations of a product of matrices; None for any other operator."""
    inputs = [tensor for tensor in node.inputs if tensor is not None]
    if not inputs or not node.outputs:
        return None
    out = node.outputs[0].elements
    match node.op:
        case "Conv" | "ConvInteger":  # each output takes one filter: [out, in / group, k…]
            return "convolution", 2 * out * prod(inputs[1].shape[1:])
        case "QLinearConv":
            return "convolution", 2 * out * prod(inputs[3].shape[1:])
        case "ConvTranspose":  # each input meets one filter: [in, out / group, k…]
            return "convolution", 2 * inputs[0].elements * prod(inputs[1].shape[1:])
        case "MatMul" | "MatMulInteger":
            return _kind(*inputs[:2]), 2 * out * inputs[0].shape[-1]
        case "QLinearMatMul":
            return _kind(inputs[0], inputs[3]), 2 * out * inputs[0].shape[-1]
        case "Gemm":
            inner = inputs[0].shape[0 if node.attributes.get("transA") else 1]
            return _kind(*inputs[:2]), 2 * out * inner
        case "Einsum":
            return _einsum(node, inputs)
        case "Attention":
            return "attention", _attention(node, inputs)
    return None


def _kind(first: StaticTensor, second: StaticTensor) -> Kind:
    return "linear" if first.weight or second.weight else "attention"


def _einsum(node: StaticNode, inputs: list[StaticTensor]) -> tuple[Kind, int] | None:
    """Two operations per point of the index space that two factors span; sums are elementwise."""
    if len(inputs) != 2:
        return None
    equation = node.attributes["equation"].decode().replace(" ", "")
    sizes: dict[str, int] = {}
    for term, tensor in zip(equation.split("->")[0].split(","), inputs, strict=True):
        if "." in term:
            raise InvalidRequest(
                f"Einsum {equation} has an ellipsis, which is not counted.", "Write its indices."
            )
        sizes |= dict(zip(term, tensor.shape, strict=True))
    return _kind(*inputs), 2 * prod(sizes.values())


def _attention(node: StaticNode, inputs: list[StaticTensor]) -> int:
    """Q Kᵀ and A V of ONNX's Attention, of [B,H,N,D] or [B,N,H·D]; a mask saves nothing here."""
    q, k, v = inputs[:3]
    if len(q.shape) == 4:
        rows, heads, queries, width = q.shape
        keys, value_width = k.shape[2], v.shape[3]
    else:
        rows, queries, channels = q.shape
        heads, key_heads = node.attributes["q_num_heads"], node.attributes["kv_num_heads"]
        width, value_width = channels // heads, v.shape[2] // key_heads
        keys = k.shape[1]
    return int(2 * rows * heads * queries * keys * (width + value_width))


def _elements(node: StaticNode) -> int:
    """Elements that an operator other than a product of matrices computes on."""
    if node.op in _MOVES or not node.outputs:
        return 0
    first = next((tensor for tensor in node.inputs if tensor is not None), node.outputs[0])
    if not (first.floating or node.outputs[0].floating):
        return 0  # sizes and indices
    reduces = node.op.startswith("Reduce") or node.op in _NORMS
    return first.elements if reduces else node.outputs[0].elements


def _weight_bytes(weights: tuple[StaticTensor, ...], nodes: tuple[StaticNode, ...]) -> int:
    rows_only: dict[str, int] = {}
    used: set[str] = set()
    for node in nodes:
        for position, tensor in enumerate(node.inputs):
            if tensor is None or not tensor.weight:
                continue
            if node.op == "Gather" and position == 0 and not node.outputs[0].weight:
                rows_only[tensor.name] = rows_only.get(tensor.name, 0) + node.outputs[0].bytes
            else:
                used.add(tensor.name)
    total = 0
    for weight in weights:
        if weight.name in used:
            total += weight.bytes
        else:
            total += min(weight.bytes, rows_only.get(weight.name, 0))
    return total


__all__ = ["Kind", "OperationCount", "count_module"]
