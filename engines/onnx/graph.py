"""An ONNX graph that can be rewritten: who makes a tensor, who uses it, its shape; nodes to add.

Weights stay where they are: external data is neither read nor moved, except small constants that a
rewrite asks for. Names of tensors are kept, so a rewrite replaces the node that makes a tensor and
leaves those that use it alone.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper, shape_inference

from fastface_trt.errors import ExportIncomplete

Node = Any
"""An onnx.NodeProto."""
Array = NDArray[Any]
Shape = tuple[int | str, ...]
"""Sizes; a text where a size is only known at run time, equal texts for equal sizes."""

FLOAT32: Final[int] = onnx.TensorProto.FLOAT
FLOAT16: Final[int] = onnx.TensorProto.FLOAT16
BOOL: Final[int] = onnx.TensorProto.BOOL
MICROSOFT: Final = "com.microsoft"
"""The domain of ONNX Runtime's own operators."""

_LARGEST_READ = 4096
"""Elements of a constant that `Graph.value` reads; larger ones are weights."""


def attribute(node: Node, name: str, default: Any = None) -> Any:
    """The value of a node's attribute; lists of numbers come as tuples, texts as str."""
    for one in node.attribute:
        if one.name == name:
            value = helper.get_attribute_value(one)
            if isinstance(value, bytes):
                return value.decode()
            return tuple(value) if isinstance(value, (list, tuple)) else value
    return default


def subgraphs(node: Node) -> Iterator[Any]:
    """The graphs in a node's attributes: the branches of an If, the body of a Loop."""
    for one in node.attribute:
        if one.type == onnx.AttributeProto.GRAPH:
            yield one.g
        yield from one.graphs


class Graph:
    """The main graph of the model in file `path`.

    Raises `ExportIncomplete` when the file is missing or is no complete model.
    """

    def __init__(self, path: Path) -> None:
        try:
            self.model = onnx.load(str(path), load_external_data=False)
        except FileNotFoundError:
            raise ExportIncomplete(f"{path} is missing.", "Export it again.") from None
        except Exception as error:  # protobuf's own class, which has moved between its versions
            raise ExportIncomplete(
                f"{path} is not an ONNX model: {error}.", "Export it again."
            ) from None
        self._folder = path.parent
        graph = self.model.graph
        self.outputs = [one.name for one in graph.output]
        self.inputs = [one.name for one in graph.input]
        self._initializers = {one.name: one for one in graph.initializer}
        self._types: dict[str, tuple[int, Shape | None]] = {}
        inferred = shape_inference.infer_shapes(self.model, data_prop=True).graph
        for one in (*graph.value_info, *inferred.input, *inferred.output, *inferred.value_info):
            self._types[one.name] = _described(one.type.tensor_type)
        self._nodes: dict[int, Node] = {}  # by id(): a message has no hash
        self._place: dict[int, int] = {}
        self._producer: dict[str, Node] = {}
        self._uses: dict[str, dict[int, Node]] = defaultdict(dict)
        for node in graph.node:
            self.append(node)

    # What the graph holds

    @property
    def nodes(self) -> list[Node]:
        """The nodes, in no order that matters after a rewrite."""
        return list(self._nodes.values())

    def of_type(self, *op_types: str) -> list[Node]:
        """The nodes of these types."""
        return [node for node in self._nodes.values() if node.op_type in op_types]

    def made_by(self, tensor: str, *op_types: str) -> Node | None:
        """The node that makes `tensor`, if it is one of these types (any if none is named)."""
        node = self._producer.get(tensor)
        return node if node is not None and (not op_types or node.op_type in op_types) else None

    def uses(self, tensor: str) -> list[Node]:
        """The nodes that take `tensor`, those included whose branches see it."""
        return list(self._uses[tensor].values())

    def only_use(self, tensor: str, *op_types: str) -> Node | None:
        """The node that takes `tensor`, if it is the only one and nobody outside sees it."""
        uses = self._uses[tensor]
        if len(uses) != 1 or tensor in self.outputs:
            return None
        (node,) = uses.values()
        return node if not op_types or node.op_type in op_types else None

    def shape(self, tensor: str) -> Shape | None:
        """The shape of a tensor of the export, None where it is not known."""
        if tensor in self._initializers:
            return tuple(self._initializers[tensor].dims)
        return self._types.get(tensor, (0, None))[1]

    def dtype(self, tensor: str) -> int:
        """Element type (onnx.TensorProto.DataType) of a tensor of the export, 0 if not known."""
        if tensor in self._initializers:
            return int(self._initializers[tensor].data_type)
        return self._types.get(tensor, (0, None))[0]

    def is_weight(self, tensor: str) -> bool:
        """Whether `tensor` is an initialiser, or one in another type."""
        cast = self.made_by(tensor, "Cast")
        return (cast.input[0] if cast is not None else tensor) in self._initializers

    def value(self, tensor: str) -> Array | None:
        """The values of a small constant, None for anything else."""
        known = self._initializers.get(tensor)
        if known is None or math.prod(known.dims) > _LARGEST_READ:
            return None
        try:
            array: Array = numpy_helper.to_array(known, str(self._folder))
        except Exception as error:
            raise ExportIncomplete(
                f"The data of {tensor} cannot be read: {error}.", "Export it again."
            ) from None
        return array

    def sizes(self, shape: str) -> list[str | int] | None:
        """What a shape [n] is put together of: numbers, or names of one-element tensors."""
        known = self.value(shape)
        if known is not None:
            return [int(size) for size in known.ravel()]
        concat = self.made_by(shape, "Concat")
        if concat is None or any(self.shape(part) != (1,) for part in concat.input):
            return None
        found = [(part, self.value(part)) for part in concat.input]
        return [part if number is None else int(number[0]) for part, number in found]

    def in_order(self) -> list[Node]:
        """The nodes that the outputs depend on, each after those that it depends on."""
        needed: dict[int, Node] = {}
        names = list(self.outputs)
        while names:
            node = self.made_by(names.pop())
            if node is not None and id(node) not in needed:
                needed[id(node)] = node
                names += _seen(node)
        done: set[int] = set()
        order: list[Node] = []
        # By place, so that what was exported one after the other stays so: ONNX Runtime's
        # optimiser fuses the first pair that fits.
        first = sorted(needed.values(), key=lambda node: self._place[id(node)])
        stack = [(node, False) for node in reversed(first)]
        while stack:
            node, ready = stack.pop()
            if id(node) in done:
                continue
            if ready:
                done.add(id(node))
                order.append(node)
                continue
            stack.append((node, True))
            makers = (self.made_by(name) for name in reversed(list(_seen(node))))
            stack += [(one, False) for one in makers if one is not None and id(one) not in done]
        return order

    # What changes it

    def append(self, node: Node, place: int | None = None) -> None:
        """Add a node that was made elsewhere, at the end or at the `place` of another."""
        self._nodes[id(node)] = node
        self._place[id(node)] = len(self._place) if place is None else place
        self._producer.update((name, node) for name in node.output if name)
        for name in _seen(node):
            self._uses[name][id(node)] = node

    def remove(self, node: Node) -> None:
        """Take a node out; another one must make what it made, if anybody needs it."""
        del self._nodes[id(node)]
        for name in node.output:
            if self._producer.get(name) is node:
                del self._producer[name]
        for name in _seen(node):
            self._uses[name].pop(id(node), None)

    def add(
        self,
        op_type: str,
        inputs: Sequence[str],
        output: str | Sequence[str],
        domain: str = "",
        **attributes: Any,
    ) -> str:
        """Add a node; it takes the place of the one that made its outputs. Returns the first."""
        outputs = [output] if isinstance(output, str) else list(output)
        place = None
        for name in outputs:
            before = self.made_by(name)
            if before is not None:
                self.remove(before)
                place = self._place[id(before)]
        made = helper.make_node(op_type, inputs, outputs, outputs[0], domain=domain, **attributes)
        self.append(made, place)
        return outputs[0]

    def describe(self, tensor: str, other: str) -> None:
        """Say that a new tensor has the type and shape of another one."""
        self._types[tensor] = self._types[other]

    def constant(self, name: str, values: object, dtype: type[np.generic]) -> str:
        """A constant called `name`; equal names mean equal values."""
        if name not in self._initializers:
            self.initializer(numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def initializer(self, tensor: Any) -> str:
        """Add an onnx.TensorProto under its name, unless there is one."""
        if tensor.name not in self._initializers:
            self.model.graph.initializer.append(tensor)
            self._initializers[tensor.name] = self.model.graph.initializer[-1]
        return str(tensor.name)

    def replace(self, tensor: str, other: str) -> None:
        """Let all that use `tensor` use `other`, which equals it."""
        if tensor in self.outputs:
            self.add("Identity", [other], tensor)
        for node in self.uses(tensor):
            if tensor not in node.input:  # a branch sees it
                self.add("Identity", [other], tensor)
                continue
            self.remove(node)
            node.input[:] = [other if name == tensor else name for name in node.input]
            self.append(node, self._place[id(node)])

    def prune(self) -> None:
        """Take out the nodes that no output depends on, so that they count as no use."""
        needed = {id(node) for node in self.in_order()}
        for node in self.nodes:
            if id(node) not in needed:
                self.remove(node)

    def finish(self) -> bytes:
        """The serialised model: sorted, without what nothing needs."""
        order = self.in_order()
        graph = self.model.graph
        seen = {name for node in order for name in _seen(node)} | set(self.outputs)
        kept = [one for one in graph.initializer if one.name in seen]
        # Names of sizes are worth keeping: by them ONNX Runtime knows that two shapes are equal.
        made = {name for node in order for name in node.output}
        known = [one for one in graph.value_info if one.name in made]
        for field in (graph.node, graph.initializer, graph.value_info):
            del field[:]
        graph.node.extend(order)
        graph.initializer.extend(kept)
        graph.value_info.extend(known)
        called = {(node.domain, node.op_type) for node in _all_nodes(graph)}
        functions = [one for one in self.model.functions if (one.domain, one.name) in called]
        del self.model.functions[:]
        self.model.functions.extend(functions)
        versions = {one.domain: one.version for one in self.model.opset_import}
        domains = {domain for domain, _ in called} | {""}
        del self.model.opset_import[:]
        self.model.opset_import.extend(
            helper.make_opsetid(domain, versions.get(domain, 1)) for domain in sorted(domains)
        )
        return bytes(self.model.SerializeToString())


def _described(tensor: Any) -> tuple[int, Shape | None]:
    if not tensor.HasField("shape"):
        return tensor.elem_type, None
    sizes = (
        one.dim_value if one.HasField("dim_value") else one.dim_param for one in tensor.shape.dim
    )
    return tensor.elem_type, tuple(size if size != "" else "?" for size in sizes)


def _seen(node: Node) -> Iterator[str]:
    """The tensors that a node takes, or its branches see."""
    yield from (name for name in node.input if name)
    for graph in subgraphs(node):
        made = {one.name for one in (*graph.input, *graph.initializer)}
        made |= {name for inner in graph.node for name in inner.output}
        for inner in graph.node:
            yield from (name for name in _seen(inner) if name not in made)
        yield from (one.name for one in graph.output if one.name not in made)


def _all_nodes(graph: Any) -> Iterator[Node]:
    for node in graph.node:
        yield node
        for inner in subgraphs(node):
            yield from _all_nodes(inner)
