"""An ONNX graph with every size known: dynamic sizes filled in, shapes followed node by node.

onnx's own shape inference stops where a size goes through arithmetic (height · width before a
Reshape). Here each node is inferred by onnx with the values of its small inputs at hand, and small
whole-number results are computed as they come, so nothing stays unknown. Weights are never read:
their shape is in the graph, wherever their data lies.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

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
