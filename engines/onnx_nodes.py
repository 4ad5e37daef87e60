"""Writing nodes, constants and graphs of an ONNX model, without the onnx package.

Enough for a backend to give a part of a graph another form before it builds an engine. The numbers
are the field numbers of onnx.proto3.
"""

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fastface_trt.engines.onnx_file import ELEMENT_TYPES
from fastface_trt.engines.protobuf import bytes_field, number_field

_NODE_INPUT, _NODE_OUTPUT, _NODE_NAME, _NODE_OP_TYPE, _NODE_ATTRIBUTE, _NODE_DOMAIN = (
    1,
    2,
    3,
    4,
    5,
    7,
)
_ATTRIBUTE_NAME, _ATTRIBUTE_INT, _ATTRIBUTE_STRING, _ATTRIBUTE_GRAPH = 1, 3, 4, 6
_ATTRIBUTE_INTS, _ATTRIBUTE_TYPE = 8, 20
_TYPE_INT, _TYPE_STRING, _TYPE_GRAPH, _TYPE_INTS = 2, 3, 5, 7
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_RAW = 1, 2, 8, 9
_GRAPH_NODE, _GRAPH_NAME, _GRAPH_OUTPUT = 1, 2, 12
_VALUE_NAME, _VALUE_TYPE, _TYPE_TENSOR, _TENSOR_ELEMENT = 1, 2, 1, 1
_OPSET_DOMAIN, _OPSET_VERSION = 1, 2

_ELEMENT_NUMBERS: Final = {name: number for number, name in ELEMENT_TYPES.items()}

Attribute = int | str | Sequence[int] | bytes
"""A whole number, a text, several whole numbers, or the bytes of a graph."""


def node(
    op_type: str,
    inputs: Sequence[str],
    outputs: Sequence[str],
    attributes: Mapping[str, Attribute] | None = None,
    *,
    name: str = "",
    domain: str = "",
) -> bytes:
    """A NodeProto; whole numbers in attributes are at least 0."""
    return b"".join(
        (
            *(bytes_field(_NODE_INPUT, one.encode()) for one in inputs),
            *(bytes_field(_NODE_OUTPUT, one.encode()) for one in outputs),
            bytes_field(_NODE_NAME, (name or outputs[0]).encode()),
            bytes_field(_NODE_OP_TYPE, op_type.encode()),
            *(
                bytes_field(_NODE_ATTRIBUTE, _attribute(*item))
                for item in (attributes or {}).items()
            ),
            bytes_field(_NODE_DOMAIN, domain.encode()) if domain else b"",
        )
    )


def initializer(name: str, array: NDArray[np.generic]) -> bytes:
    """A TensorProto that holds `array`."""
    return b"".join(
        (
            *(number_field(_TENSOR_DIMS, size) for size in array.shape),
            number_field(_TENSOR_TYPE, _ELEMENT_NUMBERS[array.dtype.name]),
            bytes_field(_TENSOR_NAME, name.encode()),
            bytes_field(_TENSOR_RAW, array.tobytes()),
        )
    )


def subgraph(name: str, nodes: Sequence[bytes], outputs: Mapping[str, str]) -> bytes:
    """A GraphProto without inputs, a branch of an `If`; `outputs` maps names to element types."""
    return b"".join(
        (
            *(bytes_field(_GRAPH_NODE, one) for one in nodes),
            bytes_field(_GRAPH_NAME, name.encode()),
            *(bytes_field(_GRAPH_OUTPUT, _value(*output)) for output in outputs.items()),
        )
    )


def opset_import(domain: str, version: int) -> bytes:
    """An OperatorSetIdProto."""
    return bytes_field(_OPSET_DOMAIN, domain.encode()) + number_field(_OPSET_VERSION, version)


def _value(name: str, dtype: str) -> bytes:
    element = number_field(_TENSOR_ELEMENT, _ELEMENT_NUMBERS[dtype])
    kind = bytes_field(_VALUE_TYPE, bytes_field(_TYPE_TENSOR, element))
    return bytes_field(_VALUE_NAME, name.encode()) + kind


def _attribute(name: str, value: Attribute) -> bytes:
    if isinstance(value, bytes):
        content, kind = bytes_field(_ATTRIBUTE_GRAPH, value), _TYPE_GRAPH
    elif isinstance(value, str):
        content, kind = bytes_field(_ATTRIBUTE_STRING, value.encode()), _TYPE_STRING
    elif isinstance(value, int):
        content, kind = number_field(_ATTRIBUTE_INT, value), _TYPE_INT
    else:
        content = b"".join(number_field(_ATTRIBUTE_INTS, one) for one in value)
        kind = _TYPE_INTS
    return (
        bytes_field(_ATTRIBUTE_NAME, name.encode()) + content + number_field(_ATTRIBUTE_TYPE, kind)
    )
