"""Floating-point operations of an ONNX module, and the bytes that it must move.

A multiplication and the addition that takes its product are two operations. Products of matrices
are told apart by what they multiply: a convolution, a linear layer (one factor is made of weights),
or an attention (both factors depend on the module's inputs). Everything else is counted in
elements and kept out of the total: it is below a percent, and what it costs is memory traffic.

Counted is what the exported graph says. A backend may do more (padding) or less (Winograd's
convolutions), which is why a measured rate can exceed a machine's.

For that every size must be known, and onnx's own shape inference stops where a size goes through
arithmetic (height · width before a Reshape). Here each node is inferred by onnx with the values of
its small inputs at hand, and small whole-number results are computed as they come. Weights are
never read: their shape is in the graph, wherever their data lies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from fastface_trt.errors import InvalidRequest, MissingDependency

_FOLLOWED = 1024
"""Constants of at most so many elements may be sizes, and are followed by value."""

_FLOAT_BITS: Final = {
    "FLOAT": 32,
    "FLOAT16": 16,
    "BFLOAT16": 16,
    "DOUBLE": 64,
    "FLOAT8E4M3FN": 8,
    "FLOAT8E5M2": 8,
}
_OTHER_BITS: Final = {
    "INT64": 64,
    "UINT64": 64,
    "INT32": 32,
    "UINT32": 32,
    "INT16": 16,
    "UINT16": 16,
    "INT8": 8,
    "UINT8": 8,
    "BOOL": 8,
    "INT4": 4,
    "UINT4": 4,
}
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


@dataclass(frozen=True, slots=True)
class StaticTensor:
    """A tensor of the graph. `weight`: it depends on no input of the module, only on constants."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    weight: bool

    @property
    def elements(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size in bytes, sub-byte types packed."""
        bits = _FLOAT_BITS.get(self.dtype) or _OTHER_BITS.get(self.dtype, 0)
        return (self.elements * bits + 7) // 8

    @property
    def floating(self) -> bool:
        """Whether its elements are floating-point numbers of any width."""
        return self.dtype in _FLOAT_BITS


@dataclass(frozen=True, slots=True)
class StaticNode:
    """A node with its tensors; an input that was left out is None."""

    op: str
    name: str
    attributes: Mapping[str, Any]
    inputs: tuple[StaticTensor | None, ...]
    outputs: tuple[StaticTensor, ...]


@dataclass(frozen=True, slots=True)
class StaticGraph:
    """The nodes of a module in topological order, functions inlined, every shape known."""

    inputs: tuple[StaticTensor, ...]
    outputs: tuple[StaticTensor, ...]
    weights: tuple[StaticTensor, ...]
    nodes: tuple[StaticNode, ...]


def read_static_graph(path: Path, sizes: Mapping[str, int]) -> StaticGraph:
    """Read an ONNX file, its weights left out, with its dynamic sizes set to `sizes`.

    Names in `sizes` that the module lacks are ignored, so one mapping serves all modules. Raises
    `InvalidRequest` for a file that is no ONNX model, a size that is not given, and an operator
    whose shape onnx cannot infer; `MissingDependency` without onnx.
    """
    try:
        import onnx
        from onnx import inliner
    except ImportError as error:
        raise MissingDependency("Counting operations needs onnx.", "pip install onnx") from error
    try:
        model = inliner.inline_local_functions(onnx.load(path, load_external_data=False))
    except Exception as error:  # onnx passes on what protobuf and the disk raise
        raise InvalidRequest(f"{path} is not an ONNX model: {error}.") from error
    follower = _Follower(onnx, model, path)
    for value in model.graph.input:
        follower.add_input(value, sizes)
    for initializer in model.graph.initializer:
        follower.add_weight(initializer)
    nodes = tuple(follower.nodes())
    known = follower.tensors
    return StaticGraph(
        tuple(known[value.name] for value in model.graph.input),
        tuple(known[value.name] for value in model.graph.output),
        tuple(known[value.name] for value in model.graph.initializer),
        nodes,
    )


class _Follower:
    """Walks a graph and knows type, shape and, where they are small, values of what it passed."""

    def __init__(self, onnx: Any, model: Any, path: Path) -> None:
        self.tensors: dict[str, StaticTensor] = {}
        self._onnx = onnx
        self._model = model
        self._path = path
        self._types: dict[str, Any] = {}
        self._values: dict[str, Any] = {}
        self._opsets = {entry.domain: entry.version for entry in model.opset_import}

    def add_input(self, value: Any, sizes: Mapping[str, int]) -> None:
        shape = []
        for dimension in value.type.tensor_type.shape.dim:
            name = dimension.dim_param
            if name and name not in sizes:
                raise InvalidRequest(
                    f"{self._path} has the dynamic size {name}, and no number was given for it.",
                    f"Give a number for {name}.",
                )
            shape.append(int(sizes[name]) if name else int(dimension.dim_value))
        self._add(value.name, value.type.tensor_type.elem_type, shape, weight=False)

    def add_weight(self, tensor: Any) -> None:
        self._add(tensor.name, tensor.data_type, tensor.dims, weight=True)
        external = tensor.data_location == self._onnx.TensorProto.EXTERNAL
        if not external and prod(tensor.dims) <= _FOLLOWED:
            self._values[tensor.name] = tensor

    def nodes(self) -> Iterator[StaticNode]:
        for node in self._model.graph.node:
            self._infer(node)
            self._follow(node)
            yield StaticNode(
                node.op_type,
                node.name,
                {a.name: self._onnx.helper.get_attribute_value(a) for a in node.attribute},
                tuple(self.tensors[name] if name else None for name in node.input),
                tuple(self.tensors[name] for name in node.output if name),
            )

    def _add(self, name: str, dtype: int, shape: Sequence[int], *, weight: bool) -> None:
        type_name = self._onnx.TensorProto.DataType.Name(dtype)
        self.tensors[name] = StaticTensor(name, type_name, tuple(shape), weight)
        self._types[name] = self._onnx.helper.make_tensor_type_proto(dtype, list(shape))

    def _infer(self, node: Any) -> None:
        given = [name for name in node.input if name]
        try:
            schema = self._onnx.defs.get_schema(
                node.op_type, self._opsets[node.domain], node.domain
            )
            types = self._onnx.shape_inference.infer_node_outputs(
                schema,
                node,
                {name: self._types[name] for name in given},
                {name: self._values[name] for name in given if name in self._values},
                opset_imports=list(self._model.opset_import),
                ir_version=self._model.ir_version,
            )
            weight = all(self.tensors[name].weight for name in given)
            for name in filter(None, node.output):
                tensor = types[name].tensor_type
                if not all(size.HasField("dim_value") for size in tensor.shape.dim):
                    raise ValueError(f"the shape of {name} stays unknown")
                shape = [size.dim_value for size in tensor.shape.dim]
                self._add(name, tensor.elem_type, shape, weight=weight)
        except Exception as error:
            raise InvalidRequest(
                f"{self._path}: no shape for operator {node.op_type} ({node.name}): {error}.",
                "Count the module as it was exported, not what a backend made of it.",
            ) from error

    def _follow(self, node: Any) -> None:
        """Compute the node's value where it may be a size: small, and made of known values."""
        outputs = [self.tensors[name] for name in node.output if name]
        if any(o.elements > _FOLLOWED or o.floating for o in outputs) and node.op_type not in (
            "Constant",
            "Cast",
        ):
            return
        if node.op_type == "Shape":
            shape = np.array(self.tensors[node.input[0]].shape, np.int64)
            bounds = {a.name: a.i for a in node.attribute}
            shape = shape[bounds.get("start", 0) : bounds.get("end", len(shape))]
            self._values[node.output[0]] = self._onnx.numpy_helper.from_array(shape)
            return
        if any(name not in self._values for name in node.input if name):
            return
        from onnx.reference import ReferenceEvaluator

        feeds = {
            name: self._onnx.numpy_helper.to_array(self._values[name])
            for name in node.input
            if name
        }
        results = ReferenceEvaluator(node).run(None, feeds)
        for name, result in zip(filter(None, node.output), results, strict=True):
            if np.size(result) <= _FOLLOWED:
                self._values[name] = self._onnx.numpy_helper.from_array(np.asarray(result))
