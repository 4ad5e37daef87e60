"""Giving `fastface::DecoupledAttention` a body of two plugin nodes, without the onnx package.

TensorRT's parser prefers a model's own function to a plugin of the same name, and a plugin here is
one kernel launch while the function needs two. So the function stays and its body is replaced. The
graph, its weights, and the other functions keep their bytes; the numbers below are the field
numbers of ModelProto, FunctionProto, NodeProto and AttributeProto in onnx.proto3.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import TypeGuard

from fastface_trt.engines.contract import FUNCTION_DOMAIN, FUNCTION_NAME
from fastface_trt.engines.protobuf import bytes_field, fields, number_field
from fastface_trt.engines.tensorrt.plugin import OUTPUT_PLUGIN, STATISTICS_PLUGIN
from fastface_trt.errors import ExportIncomplete

_MODEL_FUNCTIONS = 25
_FUNCTION_NAME, _FUNCTION_INPUT, _FUNCTION_OUTPUT, _FUNCTION_NODE = 1, 4, 5, 7
_FUNCTION_DOMAIN, _FUNCTION_VALUE_INFO = 10, 12
_NODE_INPUT, _NODE_OUTPUT, _NODE_NAME, _NODE_OP_TYPE, _NODE_ATTRIBUTE, _NODE_DOMAIN = (
    1,
    2,
    3,
    4,
    5,
    7,
)
_ATTRIBUTE_NAME, _ATTRIBUTE_STRING, _ATTRIBUTE_TYPE, _STRING = 1, 4, 20, 3


def with_plugins(model: memoryview) -> bytes:
    """An ONNX model whose decoupled attentions are the two plugins of `plugin`.

    `model` is the serialised ModelProto; external data stays where it lies. A model without the
    function comes back unchanged. Raises `ExportIncomplete` for bytes that are no ONNX model.
    """
    try:
        return b"".join(
            bytes_field(_MODEL_FUNCTIONS, _plugin_body(field.value))
            if field.number == _MODEL_FUNCTIONS and _is_ours(field.value)
            else bytes(field.whole)
            for field in fields(model)
        )
    except ValueError as error:
        raise ExportIncomplete(
            f"The model file is no complete ONNX model: {error}.", "Export it again."
        ) from None


def _is_ours(function: int | memoryview) -> TypeGuard[memoryview]:
    if not isinstance(function, memoryview):
        return False
    contents = _contents(function)
    return (contents[_FUNCTION_NAME], contents[_FUNCTION_DOMAIN]) == (
        [FUNCTION_NAME.encode()],
        [FUNCTION_DOMAIN.encode()],
    )


def _contents(message: memoryview) -> defaultdict[int, list[bytes]]:
    """The bytes, texts and messages of a message by field number."""
    found: defaultdict[int, list[bytes]] = defaultdict(list)
    for field in fields(message):
        if isinstance(field.value, memoryview):
            found[field.number].append(bytes(field.value))
    return found


def _plugin_body(function: memoryview) -> bytes:
    contents = _contents(function)
    inputs, outputs = contents[_FUNCTION_INPUT], contents[_FUNCTION_OUTPUT]
    if len(inputs) != 5 or len(outputs) != 1:
        raise ExportIncomplete(
            f"The function {FUNCTION_NAME} of this model has {len(inputs)} inputs and "
            f"{len(outputs)} outputs, not 5 and 1.",
            "Export it again with this version.",
        )
    q, k, _, manipulation, _ = inputs
    scratch = [b"attention_maps", b"row_statistics"]
    body = [
        _node(STATISTICS_PLUGIN, [q, k, manipulation], scratch),
        _node(OUTPUT_PLUGIN, [*inputs, *scratch], outputs),
    ]
    dropped = (_FUNCTION_NODE, _FUNCTION_VALUE_INFO)
    kept = (bytes(field.whole) for field in fields(function) if field.number not in dropped)
    return b"".join((*kept, *(bytes_field(_FUNCTION_NODE, node) for node in body)))


def _node(plugin: str, inputs: Sequence[bytes], outputs: Sequence[bytes]) -> bytes:
    namespace = (
        bytes_field(_ATTRIBUTE_NAME, b"plugin_namespace")
        + bytes_field(_ATTRIBUTE_STRING, FUNCTION_DOMAIN.encode())
        + number_field(_ATTRIBUTE_TYPE, _STRING)
    )
    return b"".join(
        (
            *(bytes_field(_NODE_INPUT, name) for name in inputs),
            *(bytes_field(_NODE_OUTPUT, name) for name in outputs),
            bytes_field(_NODE_NAME, plugin.encode()),
            bytes_field(_NODE_OP_TYPE, plugin.encode()),
            bytes_field(_NODE_ATTRIBUTE, namespace),
            bytes_field(_NODE_DOMAIN, FUNCTION_DOMAIN.encode()),
        )
    )
