"""Finding attentions of the exported form in an ONNX graph, without the onnx package.

The form is that of `fastface_trt.export.attention`: Q, K and V [B,N,C] are split into heads and
transposed, Q is scaled, product, softmax, product; in a decoupled block the image branch is added;
the heads are merged again.

Shape legend: B rows, H heads, N query positions, L text positions, C channels.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastface_trt.engines.contract import FUNCTION_NAME
from fastface_trt.engines.onnx_file import Initializer, Node, OnnxFile
from fastface_trt.engines.protobuf import fields

_GRAPH_NODE, _GRAPH_OUTPUT, _VALUE_NAME = 1, 12, 1
_NODE_ATTRIBUTE, _ATTRIBUTE_INTS = 5, 8
HEADS_FIRST, KEYS_LAST = (0, 2, 1, 3), (0, 2, 3, 1)
"""Of [B,N,H,D]: to [B,H,N,D] (and back), and to [B,H,D,N]."""


@dataclass(frozen=True)
class Item:
    """A node of the graph with its serialised message."""

    node: Node
    message: bytes


@dataclass(frozen=True)
class Attention:
    """One attention: q [B,N,C], k and v [B,L,C] before they are split into heads.

    `scale` names the factor of Q, `dtype` the element type of all of them, `output` the [B,N,C]
    result; `image` is the decoupled branch that is added to it, None in self-attention.
    """

    q: str
    k: str
    v: str
    scale: str
    dtype: str
    heads: int
    output: str
    image: Node | None


class AttentionGraph:
    """The nodes of a model's graph, and which of them make an attention."""

    def __init__(self, onnx: OnnxFile) -> None:
        self.items: list[Item] = []
        self.outputs: list[str] = []
        for number, value in onnx.fields(onnx.graph):
            if number == _GRAPH_NODE and isinstance(value, memoryview):
                self.items.append(Item(onnx.read_node(value), bytes(value)))
            elif number == _GRAPH_OUTPUT and isinstance(value, memoryview):
                self.outputs += [
                    bytes(text).decode()
                    for inner, text in onnx.fields(value)
                    if inner == _VALUE_NAME and isinstance(text, memoryview)
                ]
        self._initializers = onnx.initializers
        self._producer = {name: item for item in self.items for name in item.node.outputs}
        self._consumers: dict[str, list[Item]] = defaultdict(list)
        for item in self.items:
            for name in item.node.inputs:
                self._consumers[name].append(item)

    def attentions(self) -> Iterator[Attention]:
        """Every attention of the exported form, in the graph's order."""
        for item in self.items:
            if item.node.op_type == "Softmax":
                found = self._attention(item.node)
                if found is not None:
                    yield found

    def split(self, tensor: str, order: tuple[int, ...] = HEADS_FIRST) -> tuple[str, int] | None:
        """x [B,N,C] and H, where `tensor` is x split into heads and transposed to `order`."""
        transpose = self._made_by(tensor, "Transpose")
        reshape = transpose and self._made_by(transpose.node.inputs[0], "Reshape")
        if not transpose or not reshape or _permutation(transpose.message) != order:
            return None
        heads = self._heads(reshape.node.inputs[1])
        return (reshape.node.inputs[0], heads) if heads else None

    def _attention(self, softmax: Node) -> Attention | None:
        product = self._made_by(softmax.inputs[0], "MatMul")
        scaled = product and self._made_by(product.node.inputs[0], "Mul")
        weighted = self._only_use(softmax.outputs[0], "MatMul")
        if not product or not scaled or not weighted:
            return None
        q, k = self.split(scaled.node.inputs[0]), self.split(product.node.inputs[1], KEYS_LAST)
        v = self.split(weighted.node.inputs[1])
        if not q or not k or not v or not q[1] == k[1] == v[1]:
            return None
        result, image = weighted.node.outputs[0], None
        total = self._only_use(result, "Add")
        if total:
            (other,) = [name for name in total.node.inputs if name != result] or [""]
            call = self._made_by(other, FUNCTION_NAME)
            if not call or not self._is_splittable(call.node):
                return None
            result, image = total.node.outputs[0], call.node
        back = self._only_use(result, "Transpose")
        merge = back and self._only_use(back.node.outputs[0], "Reshape")
        if not back or not merge or _permutation(back.message) != HEADS_FIRST:
            return None
        scale = scaled.node.inputs[1]
        if scale not in self._initializers:
            return None
        dtype, output = self._initializers[scale].dtype, merge.node.outputs[0]
        return Attention(q[0], k[0], v[0], scale, dtype, q[1], output, image)

    def _is_splittable(self, call: Node) -> bool:
        return all(self.split(name) is not None for name in call.inputs[:3])

    def _made_by(self, tensor: str, op_type: str) -> Item | None:
        item = self._producer.get(tensor)
        return item if item and item.node.op_type == op_type else None

    def _only_use(self, tensor: str, op_type: str) -> Item | None:
        """The node that takes `tensor`, if it is the only one and nobody outside sees it."""
        uses = self._consumers[tensor]
        if len(uses) != 1 or tensor in self.outputs or uses[0].node.op_type != op_type:
            return None
        return uses[0]

    def _heads(self, shape: str) -> int | None:
        """The third entry of a shape: a constant, or one of what a Concat puts together."""
        known = self._initializers.get(shape)
        if known is not None:
            values = _numbers(known)
            return values[2] if len(values) == 4 else None
        parts = self._made_by(shape, "Concat")
        third = (
            parts and len(parts.node.inputs) == 4 and self._initializers.get(parts.node.inputs[2])
        )
        return _numbers(third)[0] if third else None


def _numbers(tensor: Initializer) -> list[int]:
    """Values of a constant of whole numbers."""
    array: NDArray[np.generic] = np.frombuffer(tensor.data, tensor.dtype)
    return [int(value) for value in array]


def _permutation(message: bytes) -> tuple[int, ...]:
    """`perm` of a Transpose, empty where it has none."""
    for one in fields(memoryview(message)):
        if one.number == _NODE_ATTRIBUTE and isinstance(one.value, memoryview):
            return tuple(
                axis
                for inner in fields(one.value)
                if inner.number == _ATTRIBUTE_INTS
                # Packed or one by one: both spellings of a repeated number are in use.
                for axis in ([inner.value] if isinstance(inner.value, int) else bytes(inner.value))
            )
    return ()
