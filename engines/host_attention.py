"""Attention in the form that a CPU runs fastest, put into a graph before ONNX Runtime optimises it.

An export spells attention out, the form that GPU builders fuse. On a CPU three things cost: the
[B,H,N,L] maps and the transposes around them, and the softmask, which every decoupled block
computes whether any request asks for it or not. So

- product, softmax, product become ONNX Runtime's `MultiHeadAttention`, which takes [B,N,C];
- a decoupled block asks once whether any request uses the softmask. Where none does, λ · f(A) V' is
  computed on [B,N,C] against block-diagonal K' and V', without a transpose of Q; where one does,
  the exported function runs as it is.

The result is the same up to the order of float32 sums. What does not have the exported form (the
quantised attentions of an 8-bit export, a module whose inner tensors were made outputs) is left as
it is.

Shape legend: B rows, R requests, H heads, N query positions, L text positions, T image tokens,
D head size, C = H·D channels.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fastface_trt.engines.attention_graph import HEADS_FIRST, Attention, AttentionGraph, Item
from fastface_trt.engines.contract import (
    FUNCTION_DOMAIN,
    FUNCTION_NAME,
    KINDS,
    MANIPULATION_COLUMNS,
)
from fastface_trt.engines.onnx_file import Node, OnnxFile
from fastface_trt.engines.onnx_nodes import initializer, node, opset_import, subgraph
from fastface_trt.engines.protobuf import bytes_field, fields, text

VERSION = 1
"""Part of an engine's identity: another form of the same module is another engine."""

_MODEL_GRAPH, _MODEL_OPSET, _MODEL_FUNCTIONS = 7, 8, 25
_FUNCTION_NAME, _FUNCTION_NODE, _FUNCTION_DOMAIN = 1, 7, 10
_NODE_OP_TYPE, _NODE_DOMAIN = 4, 7
_GRAPH_NODE, _GRAPH_INITIALIZER = 1, 5
_MICROSOFT = "com.microsoft"
_FLOAT32 = 1
_BOOL = 9


@dataclass
class _New:
    """Nodes that take the place of others, constants that they share by name, a suffix per call.

    Each call of the exported function has copies of it and of what it calls, named with the suffix:
    ONNX Runtime gives what it inlines from one function the same names in every branch, and then
    refuses the graph that it wrote.
    """

    nodes: list[Item] = field(default_factory=list)
    constants: dict[str, NDArray[np.generic]] = field(default_factory=dict)
    suffixes: list[str] = field(default_factory=list)

    def add(self, op_type: str, inputs: Sequence[str], output: str, **attributes: int) -> str:
        """A node of the main graph with one output, whose name it returns."""
        message = node(op_type, inputs, [output], attributes)
        self.append(message, Node(output, op_type, "", (output,), tuple(inputs)))
        return output

    def append(self, message: bytes, described: Node) -> None:
        """A node that was serialised elsewhere."""
        self.nodes.append(Item(described, message))

    def constant(self, name: str, values: object, dtype: type[np.generic]) -> str:
        """A constant called `name`; equal names mean equal values."""
        self.constants[name] = np.asarray(values, dtype)
        return name


def host_form(onnx: OnnxFile, tokens: int) -> bytes | None:
    """The model with its attentions in host form, None when it has none of the exported form.

    `tokens` is T. External data stays where it lies, so the bytes need the model's folder. Raises
    `ExportIncomplete` for a file that is cut.
    """
    graph = AttentionGraph(onnx)
    new = _New()
    replaced: dict[str, list[Item]] = {}
    for attention in graph.attentions():
        start = len(new.nodes)
        _write(new, attention, graph, tokens)
        replaced[attention.output] = new.nodes[start:]
    if not replaced:
        return None
    items = [
        one
        for item in graph.items
        for one in replaced.get(next(iter(item.node.outputs), ""), [item])
    ]
    return _with_graph(onnx, _needed(items, graph.outputs), new)


def _write(new: _New, attention: Attention, graph: AttentionGraph, tokens: int) -> None:
    """Nodes that compute one attention in host form."""
    image = attention.image
    prompt = attention.output if image is None else f"{attention.output}.host.text"
    inputs = [attention.q, attention.k, attention.v]
    call = node(
        "MultiHeadAttention", inputs, [prompt], {"num_heads": attention.heads}, domain=_MICROSOFT
    )
    new.append(call, Node(prompt, "MultiHeadAttention", "", (prompt,), tuple(inputs)))
    if image is not None:
        branch = _image_branch(new, attention, image, graph, tokens)
        new.add("Add", [prompt, branch], attention.output)


def _image_branch(
    new: _New, attention: Attention, call: Node, graph: AttentionGraph, tokens: int
) -> str:
    """λ · f(A) V' as [B,N,C], by one of two branches."""
    prefix = f"{attention.output}.host."
    _, k_heads, v_heads, manipulation, ip_scale = call.inputs
    split = [graph.split(name) for name in (k_heads, v_heads)]
    k, v = (found[0] for found in split if found is not None)
    first = new.constant("host.first", [0], np.int64)
    kinds = new.add("Gather", [manipulation, first], f"{prefix}kinds", axis=1)
    highest = new.add("ReduceMax", [kinds], f"{prefix}highest", keepdims=0)
    below = new.constant("host.below_softmask", KINDS.index("softmask") - 0.5, np.float32)
    asks = new.add("Greater", [highest, below], f"{prefix}asks")

    result = f"{prefix}image"
    exported = _exported(new, f"{prefix}exported.", attention, (k, v, manipulation, ip_scale))
    lean = _lean(new, f"{prefix}lean.", attention, (k, v, manipulation, ip_scale), tokens)
    message = node("If", [asks], [result], {"then_branch": exported, "else_branch": lean.graph})
    # A branch sees the tensors around it without naming them as inputs of the If.
    seen = (asks, attention.q, k, v, attention.scale, manipulation, ip_scale, *lean.seen)
    new.append(message, Node(result, "If", "", (result,), seen))
    return result


def _exported(
    new: _New, prefix: str, attention: Attention, inputs: tuple[str, str, str, str]
) -> bytes:
    """The branch that calls the exported function, with its transposes."""
    k, v, manipulation, ip_scale = inputs
    by_head = new.constant(f"host.by_head.{attention.heads}", [0, 0, attention.heads, -1], np.int64)
    merged = new.constant("host.merged", [0, 0, -1], np.int64)
    nodes, split = [], []
    for name, tensor in (("q", attention.q), ("k", k), ("v", v)):
        nodes += [
            node("Reshape", [tensor, by_head], [f"{prefix}{name}.split"]),
            node(
                "Transpose", [f"{prefix}{name}.split"], [f"{prefix}{name}"], {"perm": HEADS_FIRST}
            ),
        ]
        split.append(f"{prefix}{name}")
    called = [*split, manipulation, ip_scale]
    new.suffixes.append(f"_{len(new.suffixes)}")
    function = FUNCTION_NAME + new.suffixes[-1]
    nodes += [
        node(function, called, [f"{prefix}hidden"], domain=FUNCTION_DOMAIN),
        node("Transpose", [f"{prefix}hidden"], [f"{prefix}back"], {"perm": HEADS_FIRST}),
        node("Reshape", [f"{prefix}back", merged], [f"{prefix}out"]),
    ]
    return subgraph("softmask", nodes, {f"{prefix}out": attention.dtype})


@dataclass(frozen=True)
class _Branch:
    graph: bytes
    seen: tuple[str, ...]


def _lean(
    new: _New,
    prefix: str,
    attention: Attention,
    inputs: tuple[str, str, str, str],
    tokens: int,
) -> _Branch:
    """The branch for kinds `off` and `scale_power`, Eq. 1 and 7, on [B,N,C].

    With K' spread to [B,H·T,C], zero outside of each head's own channels, Q K'ᵀ is one product
    [B,N,H·T]; V' likewise.
    """
    k, v, manipulation, ip_scale = inputs
    heads = attention.heads
    columns = {}
    for column in ("kind", "scale", "power", "upper_bound"):
        index = new.constant(
            f"host.column.{column}", [[MANIPULATION_COLUMNS.index(column)]], np.int64
        )
        columns[column] = new.add(
            "Gather", [manipulation, index], f"{prefix}{column}", axis=1
        )  # [R,1,1]
    manipulated = new.add("Cast", [columns["kind"]], f"{prefix}manipulated", to=_BOOL)
    per_request = new.constant("host.per_request", [-1, 1, 1], np.int64)
    scale_R11 = new.add("Reshape", [ip_scale, per_request], f"{prefix}ip_scale")
    requests = new.add("Shape", [ip_scale], f"{prefix}requests")
    rest = new.constant(f"host.maps.{tokens}", [-1, tokens], np.int64)
    by_request = new.add("Concat", [requests, rest], f"{prefix}by_request", axis=0)
    apart = new.constant(f"host.apart.{heads}.{tokens}", [0, 1, tokens, heads, -1], np.int64)
    spread = new.constant(f"host.spread.{heads}.{tokens}", [0, heads * tokens, -1], np.int64)
    own = new.constant(f"host.own.{heads}", np.eye(heads).reshape(heads, 1, heads, 1), np.float32)
    maps = new.constant(f"host.maps.{heads}.{tokens}", [0, 0, heads, tokens], np.int64)

    nodes: list[bytes] = []

    def add(
        op_type: str, inputs: Sequence[str], name: str, **attributes: int | Sequence[int]
    ) -> str:
        nodes.append(node(op_type, inputs, [f"{prefix}{name}"], attributes))
        return f"{prefix}{name}"

    def block_diagonal(tensor_BTC: str, name: str) -> str:
        single = add("Cast", [tensor_BTC], f"{name}.single", to=_FLOAT32)
        by_head = add("Reshape", [single, apart], f"{name}.by_head")
        return add("Reshape", [add("Mul", [by_head, own], f"{name}.own"), spread], f"{name}.spread")

    scaled_k = add("Mul", [k, attention.scale], "k.scaled")
    keys = add("Transpose", [block_diagonal(scaled_k, "k")], "keys", perm=(0, 2, 1))
    q = add("Cast", [attention.q], "q.single", to=_FLOAT32)
    logits = add("MatMul", [q, keys], "logits")
    a_BNHT = add("Softmax", [add("Reshape", [logits, maps], "logits.maps")], "a", axis=3)
    a = add("Reshape", [a_BNHT, by_request], "a.by_request")
    raised = add(
        "Mul", [columns["scale"], add("Pow", [a, columns["power"]], "power_of_a")], "raised"
    )
    bounded = add("Min", [raised, columns["upper_bound"]], "bounded")
    f = add("Where", [manipulated, bounded, a], "f")
    weighted = add("Mul", [f, scale_R11], "f.weighted")
    f_BNM = add("Reshape", [weighted, add("Shape", [logits], "logits.shape")], "f.merged")
    hidden = add("MatMul", [f_BNM, block_diagonal(v, "v")], "hidden")
    out = add("CastLike", [hidden, attention.q], "out")
    seen = (*columns.values(), manipulated, scale_R11, by_request)
    return _Branch(subgraph("lean", nodes, {out: attention.dtype}), seen)


def _needed(items: Sequence[Item], outputs: Sequence[str]) -> list[bytes]:
    """Messages of the nodes that the outputs depend on, in order."""
    used, kept = set(outputs), []
    for item in reversed(items):
        if not used.isdisjoint(item.node.outputs):
            used.update(item.node.inputs)
            kept.append(item.message)
    return kept[::-1]


def _with_graph(onnx: OnnxFile, nodes: Sequence[bytes], new: _New) -> bytes:
    """The model's bytes with other nodes, and the constants and functions of the new ones."""
    kept = (bytes(one.whole) for one in fields(onnx.graph) if one.number != _GRAPH_NODE)
    graph = b"".join(
        (
            *(bytes_field(_GRAPH_NODE, one) for one in nodes),
            *kept,
            *(
                bytes_field(_GRAPH_INITIALIZER, initializer(name, array))
                for name, array in new.constants.items()
            ),
        )
    )
    rest = (bytes(one.whole) for one in fields(onnx.model) if one.number != _MODEL_GRAPH)
    return b"".join(
        (
            *rest,
            bytes_field(_MODEL_GRAPH, graph),
            bytes_field(_MODEL_OPSET, opset_import(_MICROSOFT, 1)),
            *(bytes_field(_MODEL_FUNCTIONS, one) for one in _copies(onnx, new.suffixes)),
        )
    )


def _copies(onnx: OnnxFile, suffixes: Sequence[str]) -> Iterator[bytes]:
    """The exported functions, which call each other, once more for every suffix to their names."""
    functions = [
        one.value
        for one in fields(onnx.model)
        if one.number == _MODEL_FUNCTIONS and isinstance(one.value, memoryview)
    ]
    for suffix in suffixes:
        for function in functions:
            if _text(function, _FUNCTION_DOMAIN) == FUNCTION_DOMAIN:
                yield b"".join(_renamed_function(function, suffix))


def _renamed_function(function: memoryview, suffix: str) -> Iterator[bytes]:
    for one in fields(function):
        if one.number == _FUNCTION_NAME and isinstance(one.value, memoryview):
            yield bytes_field(_FUNCTION_NAME, bytes(one.value) + suffix.encode())
        elif one.number == _FUNCTION_NODE and isinstance(one.value, memoryview):
            yield bytes_field(_FUNCTION_NODE, b"".join(_renamed_call(one.value, suffix)))
        else:
            yield bytes(one.whole)


def _renamed_call(message: memoryview, suffix: str) -> Iterator[bytes]:
    """A node of a function; one that calls another function calls its copy."""
    ours = _text(message, _NODE_DOMAIN) == FUNCTION_DOMAIN
    for one in fields(message):
        if ours and one.number == _NODE_OP_TYPE and isinstance(one.value, memoryview):
            yield bytes_field(_NODE_OP_TYPE, bytes(one.value) + suffix.encode())
        else:
            yield bytes(one.whole)


def _text(message: memoryview, number: int) -> str:
    """A text of a message, empty where it has none."""
    for one in fields(message):
        if one.number == number and isinstance(one.value, memoryview):
            return text(one.value)
    return ""
