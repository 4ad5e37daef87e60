"""Channels last: convolutions as NhwcConv, and no transpose between them and what is around them.

Shape legend: B rows, C channels (O output, I input ones of a weight), H × W picture, L = H·W.
"""

from collections.abc import Callable
from typing import Final

import numpy as np

from fastface_trt.engines.onnx.graph import (
    FLOAT16,
    FLOAT32,
    MICROSOFT,
    Graph,
    Node,
    Shape,
    attribute,
)
from fastface_trt.engines.onnx.norms import TO_FIRST, TO_LAST

_ELEMENTWISE: Final = {
    *("Abs", "Add", "Cast", "Clip", "Div", "Exp", "Gelu", "Identity", "Max", "Min", "Mul", "Neg"),
    *("Pow", "Relu", "Round", "Sigmoid", "Sqrt", "Sub", "Tanh"),
}
_PERMUTATIONS: Final = {3: (0, 2, 1), 4: TO_LAST}
"""From channels first to channels last, by rank."""
_BACK: Final = {3: (0, 2, 1), 4: TO_FIRST}


def convolutions(graph: Graph) -> int:
    """NhwcConv for every 2-D convolution in float32 or float16; returns their number.

    Takes Conv with a weight [O,I,kH,kW] of the model, whose transposition to [O,kH,kW,I] ONNX
    Runtime folds. Leaves alone weights that are computed, as those of a quantised export
    (DequantizeLinear): their layout is that of the scale's axis, too. Transposes around the
    operator are left to `channels_last`.
    """
    count = 0
    for conv in graph.of_type("Conv"):
        weight, output = conv.input[1], conv.output[0]
        shape = graph.shape(weight)
        types = (FLOAT32, FLOAT16)
        padded = attribute(conv, "auto_pad", "NOTSET") in ("NOTSET", "VALID")
        if not (shape and len(shape) == 4 and padded and graph.is_weight(weight)):
            continue
        if graph.dtype(weight) not in types:
            continue
        # The name ends in the weight's, by which a refit knows the folded copy.
        last = f"nhwc_{weight}"
        if graph.made_by(last) is None:
            graph.add("Transpose", [weight], last, perm=TO_LAST)
        names = ("dilations", "group", "kernel_shape", "pads", "strides")
        found = {name: attribute(conv, name) for name in names}
        kept = {name: value for name, value in found.items() if value is not None}
        x = graph.add("Transpose", [conv.input[0]], f"{output}.conv.x", perm=TO_LAST)
        y = f"{output}.conv.y"
        graph.add("NhwcConv", [x, last, *conv.input[2:]], y, MICROSOFT, **kept)
        graph.add("Transpose", [y], output, perm=TO_FIRST)
        count += 1
    graph.prune()
    return count


def channels_last(graph: Graph) -> None:
    """Let what lies between operators with channels last compute with channels last, too.

    Goes through the graph in order and knows for a tensor [B,C,H,W] or [B,C,L] its twin with
    channels last, where there is one. An elementwise operator, a concatenation of channels, a
    resize, a reshape of pictures to positions or back moves to the twins of what it takes. A
    transpose to channels last of a tensor with a twin is the twin; the transpose of a twin to
    channels first stays for those who need it, which in the end are the graph's outputs and what is
    not known here.
    """
    pass_ = _Pass(graph)
    for node in graph.in_order():
        pass_.visit(node)
    graph.prune()


class _Pass:
    """One walk; `last` holds the twins by the names of the tensors."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.last: dict[str, str] = {}
        self.rules: dict[str, Callable[[Node], None]] = {
            "Transpose": self._transpose,
            "Reshape": self._reshape,
            "Concat": self._concat,
            "Resize": self._resize,
            "Shape": self._shape,
        }
        self.rules |= dict.fromkeys(_ELEMENTWISE, self._elementwise)

    def visit(self, node: Node) -> None:
        rule = self.rules.get(node.op_type)
        if node.domain == "" and rule is not None:
            rule(node)

    def _transpose(self, node: Node) -> None:
        tensor, output, perm = node.input[0], node.output[0], attribute(node, "perm")
        if self.graph.is_weight(tensor):
            return
        if tensor in self.last and perm == _PERMUTATIONS.get(len(perm)):
            self.graph.replace(output, self.last[tensor])
        elif perm == TO_FIRST:
            self.last[output] = tensor
        elif perm == (0, 2, 1):  # of either meaning: each is the other's twin
            self.last[output], self.last[tensor] = tensor, output
        elif perm == TO_LAST:
            self.last[tensor] = output

    def _elementwise(self, node: Node) -> None:
        shape = self.graph.shape(node.output[0])
        if shape is None or len(shape) not in _PERMUTATIONS or len(node.output) != 1:
            return
        if not any(name in self.last for name in node.input):
            return
        if any(self._operand(name, shape) is None for name in node.input):
            return
        inputs = [made() for name in node.input if (made := self._operand(name, shape)) is not None]
        self._move(node, inputs, shape)

    def _concat(self, node: Node) -> None:
        shape = self.graph.shape(node.output[0])
        ranked = shape is not None and len(shape) in _PERMUTATIONS
        if shape is None or not ranked or attribute(node, "axis") not in (1, 1 - len(shape)):
            return
        if any(name in self.last for name in node.input):
            self._move(node, [self._twin(name, shape) for name in node.input], shape, axis=-1)

    def _resize(self, node: Node) -> None:
        """With scales, or sizes, for all four axes."""
        tensor, shape = node.input[0], self.graph.shape(node.output[0])
        given = list(node.input[1:]) + [""] * (4 - len(node.input))
        roi, scales, sizes = given
        known = shape is not None and len(shape) == 4 and attribute(node, "axes") is None
        if shape is None or not known or tensor not in self.last or roi:
            return
        values = self.graph.value(scales) if scales else None
        if values is not None and len(values) == 4:
            scales = self.graph.constant(f"{scales}.last", values[list(TO_LAST)], np.float32)
            self._move(node, [self.last[tensor], "", scales], shape)
        elif sizes and (permuted := self._permuted_sizes(sizes, TO_LAST)) is not None:
            self._move(node, [self.last[tensor], "", "", permuted], shape)

    def _shape(self, node: Node) -> None:
        """The shape of a twin, in the other order."""
        tensor, shape = node.input[0], self.graph.shape(node.input[0])
        if tensor not in self.last or shape is None:
            return
        first, end = attribute(node, "start", 0), attribute(node, "end")
        order = list(_BACK[len(shape)])[first:end]
        whole = self.graph.add("Shape", [self.last[tensor]], f"{node.output[0]}.last")
        name = "form.axes." + ".".join(map(str, order))
        axes = self.graph.constant(name, order, np.int64)
        self.graph.add("Gather", [whole, axes], node.output[0], axis=0)

    def _reshape(self, node: Node) -> None:
        """Pictures to positions, [B,C,H,W] to [B,C,L], and back."""
        tensor, output = node.input[0], node.output[0]
        before, after = self.graph.shape(tensor), self.graph.shape(output)
        if tensor not in self.last or before is None or after is None or before[:2] != after[:2]:
            return
        channels = before[1]
        if "?" in before[:2] or not isinstance(channels, int):
            return
        twin = f"{output}.last"
        if (len(before), len(after)) == (4, 3):
            flat = self.graph.constant(f"form.flat.{channels}", [0, -1, channels], np.int64)
            self.last[output] = self.graph.add("Reshape", [self.last[tensor], flat], twin)
        elif (len(before), len(after)) == (3, 4):
            sizes = self._permuted_sizes(node.input[1], TO_LAST)
            if sizes is not None:
                allow = attribute(node, "allowzero", 0)
                inputs = [self.last[tensor], sizes]
                self.last[output] = self.graph.add("Reshape", inputs, twin, allowzero=allow)
        if output in self.last:
            self.graph.add("Transpose", [twin], output, perm=_BACK[len(after)])

    def _permuted_sizes(self, sizes: str, order: tuple[int, ...]) -> str | None:
        values = self.graph.value(sizes)
        if values is not None and len(values) == len(order) and 0 not in values:
            return self.graph.constant(f"{sizes}.last", values[list(order)], np.int64)
        concat = self.graph.made_by(sizes, "Concat")
        parts = self.graph.sizes(sizes)
        if concat is None or parts is None or len(parts) != len(order):
            return None
        name = f"{sizes}.last"
        if self.graph.made_by(name) is None:
            self.graph.add("Concat", [concat.input[axis] for axis in order], name, axis=0)
        return name

    def _move(self, node: Node, inputs: list[str], shape: Shape, **changed: int) -> None:
        """Let `node` compute the twin of its output."""
        output = node.output[0]
        kept = {one.name: attribute(node, one.name) for one in node.attribute} | changed
        twin = f"{output}.last"
        self.graph.add(node.op_type, inputs, twin, **kept)
        self.graph.add("Transpose", [twin], output, perm=_BACK[len(shape)])
        self.last[output] = twin

    def _operand(self, name: str, shape: Shape) -> Callable[[], str] | None:
        """How to make an operand of a result of `shape` fit its twin, None where it cannot."""
        own = self.graph.shape(name) if name else ()
        if own is None or len(own) > len(shape):
            return None
        if name in self.last and len(own) == len(shape):
            return lambda: self.last[name]
        if all(size == 1 for size in own):
            return lambda: name
        padded = (1,) * (len(shape) - len(own)) + own
        if all(size == 1 for size in padded[2:]):
            return lambda: self._channels(name, own, len(shape))
        return (lambda: self._twin(name, shape)) if len(own) == len(shape) else None

    def _channels(self, name: str, own: Shape, rank: int) -> str:
        """A value per channel, [C,1,1] or [B,C,1,1], as [1,1,C] or [B,1,1,C]."""
        made = f"{name}.channels.{rank}"
        if self.graph.made_by(made) is None:
            sizes = [0] * (len(own) == rank) + [1] * (rank - 2) + [-1]
            target = self.graph.constant("form." + ".".join(map(str, sizes)), sizes, np.int64)
            self.graph.add("Reshape", [name, target], made)
        return made

    def _twin(self, name: str, shape: Shape) -> str:
        if name not in self.last:
            twin = f"{name}.last"
            perm = _PERMUTATIONS[len(shape)]
            self.last[name] = self.graph.add("Transpose", [name], twin, perm=perm)
        return self.last[name]
