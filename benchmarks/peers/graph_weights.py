"""The weights of an exported module, read from its ONNX files into the PyTorch model it came from.

For full-size peers: the weights are drawn into an export (`bench.weightless`), and PyTorch has to
compute with the same ones.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import nn

from fastface_trt.engines.onnx.file import MODULE_KEY
from fastface_trt.errors import EngineMismatch

_UNNAMED = {"MatMul": "weight", "Mul": "weight", "Add": "bias"}
"""What an unnamed constant beside the data of an operator is to the layer that it came from: the
exporter turns the weights of linear layers over and shapes those of group norms."""


def load_weights(model: nn.Module, graph: Path) -> int:
    """Fill the parameters of `model` from the module exported to file `graph`; returns how many.

    Those that the exported module does not use stay as they are. Raises `EngineMismatch` for the
    graph of another model.
    """
    parameters = dict(model.named_parameters())
    filled = set()
    for name, values in _weights(graph):
        # The module that is exported holds the model under a name of its own.
        parameter = parameters.get(name.partition(".")[2])
        if parameter is None:
            continue
        if values.size != parameter.numel():
            raise EngineMismatch(f"{graph} is the graph of another model than its {name}.", "")
        with torch.no_grad():
            parameter.copy_(torch.tensor(values).reshape(parameter.shape))
        filled.add(name)
    return len(filled)


def _weights(graph: Path) -> Iterator[tuple[str, NDArray[np.generic]]]:
    """Name of the parameter and values, laid out as PyTorch's, of each constant that may be one."""
    model = onnx.load(graph, load_external_data=False)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}

    def values(name: str) -> NDArray[np.generic]:
        return np.asarray(numpy_helper.to_array(tensors[name], str(graph.parent)))

    for name in tensors:
        yield name, values(name)
    for node in model.graph.node:
        layers = [prop.value for prop in node.metadata_props if prop.key == MODULE_KEY]
        if not layers or node.op_type not in _UNNAMED or node.input[1] not in tensors:
            continue
        turned = node.op_type == "MatMul"
        if turned or tensors[node.input[1]].dims[1:] in ([1], [1, 1]):
            found = values(node.input[1])
            yield f"{layers[0]}.{_UNNAMED[node.op_type]}", found.T if turned else found
