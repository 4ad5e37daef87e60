"""Giving `fastface::DecoupledAttention` a body of two plugin nodes, without the onnx package.

TensorRT's parser prefers a model's own function to a plugin of the same name, and a plugin here is
one kernel launch while the function needs two. So the function stays and its body is replaced. The
graph, its weights, and the other functions keep their bytes; the numbers below are the field
numbers of ModelProto, FunctionProto, NodeProto and AttributeProto in onnx.proto3.
"""

from collections.abc import Iterator, Sequence

from fastface_trt.engines.contract import FUNCTION_DOMAIN, FUNCTION_NAME
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
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

Field = tuple[int, bytes, bytes]  # number, content, and the whole field with its tag


def with_plugins(model: bytes) -> bytes:
    """An ONNX model whose decoupled attentions are the two plugins of `plugin`.

    `model` is the serialised ModelProto; external data stays where it lies. A model without the
    function comes back unchanged. Raises `ExportIncomplete` for bytes that are no ONNX model.
    """
    parts = []
    for number, content, whole in _fields(model):
        if number == _MODEL_FUNCTIONS and _is_ours(content):
            whole = _bytes_field(_MODEL_FUNCTIONS, _plugin_body(content))
        parts.append(whole)
    return b"".join(parts)


def _is_ours(function: bytes) -> bool:
    texts = {number: content for number, content, _ in _fields(function)}
    name, domain = texts.get(_FUNCTION_NAME), texts.get(_FUNCTION_DOMAIN)
    return (name, domain) == (FUNCTION_NAME.encode(), FUNCTION_DOMAIN.encode())


def _plugin_body(function: bytes) -> bytes:
    fields = list(_fields(function))
    inputs = [content for number, content, _ in fields if number == _FUNCTION_INPUT]
    outputs = [content for number, content, _ in fields if number == _FUNCTION_OUTPUT]
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
    kept = b"".join(whole for number, _, whole in fields if number not in dropped)
    return kept + b"".join(_bytes_field(_FUNCTION_NODE, node) for node in body)


def _node(plugin: str, inputs: Sequence[bytes], outputs: Sequence[bytes]) -> bytes:
    namespace = (
        _bytes_field(_ATTRIBUTE_NAME, b"plugin_namespace")
        + _bytes_field(_ATTRIBUTE_STRING, FUNCTION_DOMAIN.encode())
        + _varint(_ATTRIBUTE_TYPE << 3 | _VARINT)
        + _varint(_STRING)
    )
    return b"".join(
        (
            *(_bytes_field(_NODE_INPUT, name) for name in inputs),
            *(_bytes_field(_NODE_OUTPUT, name) for name in outputs),
            _bytes_field(_NODE_NAME, plugin.encode()),
            _bytes_field(_NODE_OP_TYPE, plugin.encode()),
            _bytes_field(_NODE_ATTRIBUTE, namespace),
            _bytes_field(_NODE_DOMAIN, FUNCTION_DOMAIN.encode()),
        )
    )


def _fields(message: bytes) -> Iterator[Field]:
    """The fields of a serialised message; `content` is empty for numbers."""
    position = 0
    while position < len(message):
        start = position
        tag, position = _read_varint(message, position)
        content_from, kind = position, tag & 7
        if kind == _VARINT:
            _, position = _read_varint(message, position)
            content_from = position
        elif kind == _BYTES:
            length, content_from = _read_varint(message, position)
            position = content_from + length
        elif kind in (_FIXED32, _FIXED64):
            position += 4 if kind == _FIXED32 else 8
            content_from = position
        else:
            raise _broken()
        if position > len(message):
            raise _broken()
        yield tag >> 3, message[content_from:position], message[start:position]


def _read_varint(message: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(message):
            break
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise _broken()


def _bytes_field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | _BYTES) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _broken() -> ExportIncomplete:
    return ExportIncomplete("The model file is no complete ONNX model.", "Export it again.")
