"""Attentions in a TensorRT network and whether their form is the one that TensorRT fuses.

NVIDIA's guide on fused attention asks for product → softmax → product in one 16-bit type, scaled
before the first product, with no cast between. Reshapes and transposes do not matter.
"""

import re
from dataclasses import dataclass

_VIEWS = {"SHUFFLE", "SQUEEZE", "UNSQUEEZE"}
_CALL = r"([^|\[\]:\s]+) \({}\)"


@dataclass(frozen=True)
class Layer:
    """One layer of a parsed network; inputs and outputs are tensor names."""

    name: str
    type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dtype: str
    metadata: str = ""

    def call_of(self, function: str) -> str | None:
        """Name of the node that calls `function` around this layer, None outside of any."""
        found = re.search(_CALL.format(function), self.metadata)
        return found[1] if found else None


@dataclass(frozen=True)
class Attention:
    """One softmax with its products; `faults` says what keeps TensorRT from fusing it."""

    softmax: str
    dtype: str
    faults: tuple[str, ...]


class _Graph:
    def __init__(self, layers: list[Layer]) -> None:
        self._producer = {tensor: layer for layer in layers for tensor in layer.outputs}
        self._consumers: dict[str, list[Layer]] = {}
        for layer in layers:
            for tensor in layer.inputs[:1] if layer.type in _VIEWS else layer.inputs:
                self._consumers.setdefault(tensor, []).append(layer)

    def before(self, tensor: str) -> Layer | None:
        """What computes a tensor, reshapes and transposes left out; None for a graph input."""
        layer = self._producer.get(tensor)
        while layer is not None and layer.type in _VIEWS:
            layer = self._producer.get(layer.inputs[0])
        return layer

    def after(self, tensor: str) -> list[Layer]:
        """What uses a tensor's values, reshapes and transposes and size queries left out."""
        found = []
        for layer in self._consumers.get(tensor, ()):
            if layer.type in _VIEWS:
                found += self.after(layer.outputs[0])
            elif layer.type != "SHAPE":
                found.append(layer)
        return found

    def scaled(self, tensor: str) -> bool:
        """Whether the tensor is something times a constant."""
        layer = self.before(tensor)
        if layer is None or layer.type != "ELEMENTWISE":
            return False
        sources = [self.before(name) for name in layer.inputs]
        return any(source is not None and source.type == "CONSTANT" for source in sources)


def find_attentions(layers: list[Layer], outside: str) -> list[Attention]:
    """Every softmax that lies outside of the calls of function `outside`, with its faults."""
    graph = _Graph(layers)
    return [
        Attention(layer.name, layer.dtype, tuple(_faults(graph, layer)))
        for layer in layers
        if layer.type == "SOFTMAX" and layer.call_of(outside) is None
    ]


def _faults(graph: _Graph, softmax: Layer) -> list[str]:
    faults = []
    product = graph.before(softmax.inputs[0])
    if product is None or product.type != "MATRIX_MULTIPLY":
        faults.append(f"{product.type if product else 'an input'} before the softmax")
    else:
        scaled = [graph.scaled(tensor) for tensor in product.inputs]
        if sum(scaled) != 1:
            faults.append("scale on both factors" if all(scaled) else "no scale on Q or K")
        if product.dtype != softmax.dtype:
            faults.append(f"product in {product.dtype}, softmax in {softmax.dtype}")
    following = graph.after(softmax.outputs[0])
    if [layer.type for layer in following] != ["MATRIX_MULTIPLY"]:
        names = " and ".join(layer.type for layer in following) or "nothing"
        faults.append(f"{names} after the softmax")
    elif following[0].dtype != softmax.dtype:
        faults.append(f"softmax in {softmax.dtype}, product in {following[0].dtype}")
    return faults
