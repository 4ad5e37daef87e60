"""Giving `fastface::DecoupledAttention` a body of two plugin nodes, without the onnx package.

TensorRT's parser prefers a model's own function to a plugin of the same name, and a plugin here is
one kernel launch while the function needs two. So the function stays and its body is replaced. The
graph, its weights, and the other functions keep their bytes; the numbers below are the field
numbers of ModelProto and FunctionProto in onnx.proto3.
"""

from collections import defaultdict
from typing import TypeGuard

from fastface_trt.engines.contract import FUNCTION_DOMAIN, FUNCTION_NAME
from fastface_trt.engines.onnx_nodes import node
from fastface_trt.engines.protobuf import bytes_field, fields
from fastface_trt.engines.tensorrt.plugin import OUTPUT_PLUGIN, STATISTICS_PLUGIN
from fastface_trt.errors import ExportIncomplete

_MODEL_FUNCTIONS = 25
_FUNCTION_NAME, _FUNCTION_INPUT, _FUNCTION_OUTPUT, _FUNCTION_NODE = 1, 4, 5, 7
_FUNCTION_DOMAIN, _FUNCTION_VALUE_INFO = 10, 12


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
    inputs = [name.decode() for name in contents[_FUNCTION_INPUT]]
    outputs = [name.decode() for name in contents[_FUNCTION_OUTPUT]]
    if len(inputs) != 5 or len(outputs) != 1:
        raise ExportIncomplete(
            f"The function {FUNCTION_NAME} of this model has {len(inputs)} inputs and "
            f"{len(outputs)} outputs, not 5 and 1.",
            "Export it again with this version.",
        )
    q, k, _, manipulation, _ = inputs
    scratch = ["attention_maps", "row_statistics"]
    body = [
        _plugin(STATISTICS_PLUGIN, [q, k, manipulation], scratch),
        _plugin(OUTPUT_PLUGIN, [*inputs, *scratch], outputs),
    ]
    dropped = (_FUNCTION_NODE, _FUNCTION_VALUE_INFO)
    kept = (bytes(field.whole) for field in fields(function) if field.number not in dropped)
    return b"".join((*kept, *(bytes_field(_FUNCTION_NODE, one) for one in body)))


def _plugin(name: str, inputs: list[str], outputs: list[str]) -> bytes:
    domain = FUNCTION_DOMAIN
    return node(name, inputs, outputs, {"plugin_namespace": domain}, name=name, domain=domain)
