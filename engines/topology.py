"""What of an ONNX graph stays the same when only its weights change.

A built engine can take the weights of another module exactly when everything else agrees: nodes,
how they are wired, attributes, functions, shapes, and every constant that is no weight. A topology
is a list of parts, each with a label that a person understands and a digest, so that two topologies
are compared part by part and the first difference has a name.
"""

import hashlib
from collections.abc import Iterator, Sequence

from fastface_trt.engines.onnx_file import Initializer, OnnxFile

Topology = tuple[str, ...]
"""`LABEL DIGEST` of every part: opsets and functions, inputs and outputs, constants, nodes."""

_MODEL_OPSET, _MODEL_FUNCTION = 8, 25
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_INPUT, _GRAPH_OUTPUT, _GRAPH_SPARSE = 1, 5, 11, 12, 15
_FUNCTION_NAME = 1
_NODE_WORDS = frozenset((3, 6, 9))
"""Fields of a node that say nothing about what it computes: name, documentation, metadata."""

_FRACTIONAL = ("float16", "bfloat16", "float32", "float64", "float8_e4m3fn")
_QUANTISED = ("int8", "uint8")


def is_weight(one: Initializer) -> bool:
    """Whether an initialiser may differ between two modules of one topology.

    Everything with more than one element that training or a LoRA changes; single numbers and
    integers (axes, shapes, bounds) are part of the graph, and builders fold them by value.
    """
    return one.dtype in (*_FRACTIONAL, *_QUANTISED) and _elements(one) > 1


def topology(onnx: OnnxFile) -> Topology:
    """The topology of a model file; raises `ExportIncomplete` for a file that is cut."""
    return tuple(f"{label} {digest}" for label, digest in _parts(onnx))


def first_difference(ours: Sequence[str], theirs: Sequence[str]) -> str | None:
    """The label of the first part that differs, None when the topologies are equal."""
    for mine, other in zip(ours, theirs, strict=False):
        if mine != other:
            return (other or mine).rpartition(" ")[0]
    if len(ours) != len(theirs):
        longer = max(ours, theirs, key=len)
        return longer[min(len(ours), len(theirs))].rpartition(" ")[0]
    return None


def _parts(onnx: OnnxFile) -> Iterator[tuple[str, str]]:
    for field, value in onnx.fields(onnx.model):
        if not isinstance(value, memoryview):
            continue
        if field == _MODEL_OPSET:
            yield "the operator sets", _digest(value)
        elif field == _MODEL_FUNCTION:
            name = next((bytes(v) for f, v in onnx.fields(value) if f == _FUNCTION_NAME), b"")  # type: ignore[arg-type]
            yield f"function {name.decode(errors='replace')}", _digest(value)
    for field, value in onnx.fields(onnx.graph):
        if not isinstance(value, memoryview):
            continue
        if field in (_GRAPH_INPUT, _GRAPH_OUTPUT):
            yield "the inputs" if field == _GRAPH_INPUT else "the outputs", _digest(value)
        elif field == _GRAPH_SPARSE:
            yield "a sparse weight", _digest(value)
        elif field == _GRAPH_INITIALIZER:
            yield _initializer(onnx, value)
        elif field == _GRAPH_NODE:
            yield _node(onnx, value)


def _initializer(onnx: OnnxFile, message: memoryview) -> tuple[str, str]:
    one = onnx.read_initializer(message)
    if one is None:  # its elements are stored one by one, which no large weight is
        return "a constant", _digest(message)
    shape = f"{one.dtype} {one.shape}".encode()
    return f"initialiser {one.name}", _digest(shape if is_weight(one) else shape + bytes(one.data))


def _node(onnx: OnnxFile, message: memoryview) -> tuple[str, str]:
    node = onnx.read_node(message)
    digest = hashlib.sha256()
    for field, value in onnx.fields(message):
        if field not in _NODE_WORDS:
            content = bytes(value) if isinstance(value, memoryview) else str(value).encode()
            digest.update(f"{field} {len(content)} ".encode() + content)
    where = f" of {node.scope}" if node.scope else ""
    return f"node {node.op_type}{where}", digest.hexdigest()[:16]


def _elements(one: Initializer) -> int:
    count = 1
    for size in one.shape:
        count *= size
    return count


def _digest(content: memoryview | bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
