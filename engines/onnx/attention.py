"""Attention: from the exported form, which GPU builders fuse, to operators of ONNX Runtime.

The exported form is that of `fastface_trt.export.attention`: Q, K and V [B,N,C] are split into
heads and transposed, Q is scaled, product, softmax, product; in a decoupled block λ · f(A) V' is
added, a call of the exported function; the heads are merged again.

Product, softmax, product become `MultiHeadAttention`, which takes [B,N,C], so the maps and the
transposes around them are gone. λ · f(A) V' becomes one of

- the custom operator of `KERNEL_DOMAIN`, which adds it to the text attention's result;
- an If: where no request asks for the softmask, it is computed on [B,N,C] against block-diagonal K'
  and V' without a transpose of Q ("lean"); where one does, by the exported function, written out.

The result is the same up to the order of sums. What does not have the exported form (the quantised
attentions of an 8-bit export, a text encoder's with their mask, PuLID's text attention, whose
result has a second use, a module whose inner tensors were made outputs) is left as it is.

Shape legend: B rows, R requests, H heads, N query positions, L text positions, T image tokens,
D head size, C = H·D channels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from onnx import helper

from fastface_trt.engines.contract import (
    FUNCTION_DOMAIN,
    FUNCTION_NAME,
    KERNEL_DOMAIN,
    KINDS,
    MANIPULATION_COLUMNS,
)
from fastface_trt.engines.onnx.functions import inline
from fastface_trt.engines.onnx.graph import (
    BOOL,
    FLOAT16,
    FLOAT32,
    MICROSOFT,
    Graph,
    Node,
    attribute,
)

_LARGEST_HEAD = 256
"""Head size up to which flash attention works."""
_HEADS_FIRST, _KEYS_LAST = (0, 2, 1, 3), (0, 2, 3, 1)
"""Of [B,N,H,D]: to [B,H,N,D] (and back), and to [B,H,D,N]."""


@dataclass(frozen=True)
class Split:
    """A tensor [B,N,H·D] that the export splits into heads; `head_size` is 0 if not known."""

    tensor: str
    heads: int
    head_size: int


@dataclass(frozen=True)
class Attention:
    """One attention: q [B,N,C], k and v [B,L,C] before they are split into heads.

    `scale` is the factor of Q Kᵀ, `factor` the tensor that holds it, `dtype` the element type of
    all of them, `output` the [B,N,C] result; `image` is the call that is added to it, None in
    self-attention.
    """

    q: Split
    k: str
    v: str
    scale: float
    factor: str
    dtype: int
    output: str
    image: Node | None


ImageBranch = Callable[[Graph, Attention, Node, str], None]
"""Adds nodes that compute `attention.output` from the call and the text attention's result."""


def attentions(graph: Graph, image_branch: ImageBranch) -> tuple[int, int]:
    """Rewrite every attention of the exported form in float32 or float16.

    A single head too large for the kernels that hold no map (the VAE's, 512) becomes two products
    on [B,N,C]. Returns the number of attentions, and how many of them are decoupled.
    """
    found = [
        one for node in graph.of_type("Softmax") if (one := _attention(graph, node)) is not None
    ]
    for one in found:
        base = one.output if one.image is None else f"{one.output}.text"
        if one.q.heads == 1 and one.q.head_size > _LARGEST_HEAD and one.image is None:
            _single_head(graph, one)
        else:
            _multi_head(graph, one, base)
        if one.image is not None:
            image_branch(graph, one, one.image, base)
    graph.prune()
    return len(found), sum(one.image is not None for one in found)


def _multi_head(graph: Graph, attention: Attention, output: str) -> None:
    inputs = [attention.q.tensor, attention.k, attention.v]
    heads: dict[str, Any] = {"num_heads": attention.q.heads}
    exact = np.finfo(np.float32 if attention.dtype == FLOAT32 else np.float16).eps
    # Without the attribute it is 1/√D; what a float16 export rounds is that, too.
    if abs(attention.scale * attention.q.head_size**0.5 - 1) > exact:
        heads["scale"] = attention.scale
    graph.add("MultiHeadAttention", inputs, output, MICROSOFT, **heads)


def _single_head(graph: Graph, attention: Attention) -> None:
    logits, maps = f"{attention.output}.logits", f"{attention.output}.maps"
    inputs = [attention.q.tensor, attention.k]
    graph.add("FusedMatMul", inputs, logits, MICROSOFT, transB=1, alpha=attention.scale)
    graph.add("Softmax", [logits], maps, axis=-1)
    graph.add("MatMul", [maps, attention.v], attention.output)


def operator_branch(graph: Graph, attention: Attention, call: Node, base: str) -> None:
    """The custom operator, which scales Q by 1/√D as the exported function does."""
    k, v = _image_tokens(graph, call)
    inputs = [attention.q.tensor, k, v, *call.input[3:5], base, *call.input[5:]]
    heads = attention.q.heads
    graph.add(FUNCTION_NAME, inputs, attention.output, KERNEL_DOMAIN, num_heads=heads)


def lone_operators(graph: Graph) -> int:
    """The custom operator for calls whose result is more than added (PuLID); returns their number.

    A call whose inputs the export does not split into heads stays as it is.
    """
    calls = [node for node in graph.of_type(FUNCTION_NAME) if node.domain == FUNCTION_DOMAIN]
    count = 0
    for call in calls:
        q, k, v = (_split(graph, name) for name in call.input[:3])
        if q is None or k is None or v is None or not q.heads == k.heads == v.heads:
            continue
        merged, apart = f"{call.output[0]}.merged", f"{call.output[0]}.apart"
        mask = list(call.input[5:])
        inputs = [q.tensor, k.tensor, v.tensor, *call.input[3:5], *(["", *mask] if mask else [])]
        graph.add(FUNCTION_NAME, inputs, merged, KERNEL_DOMAIN, num_heads=q.heads)
        graph.add("Reshape", [merged, _by_head(graph, q.heads)], apart)
        graph.add("Transpose", [apart], call.output[0], perm=_HEADS_FIRST)
        count += 1
    graph.prune()
    return count


def if_branch(tokens: int, single: bool) -> ImageBranch:
    """An If per block: lean, or the exported function for a batch where a request needs it.

    `tokens` is T. With `single` the lean branch's products are in float32 whatever the graph's type
    is, which a CPU is faster in; else they are in the graph's type, as exported.
    """

    def write(graph: Graph, attention: Attention, call: Node, base: str) -> None:
        prefix = f"{attention.output}.image."
        k, v = _image_tokens(graph, call)
        manipulation, ip_scale, *mask = call.input[3:]
        asks = _asks_for_the_softmask(graph, manipulation)
        own = attention.dtype
        if single and own != FLOAT32:
            # Outside of the branches: ONNX Runtime gives the casts that it inserts for the CPU's
            # kernels one name inside and outside, and then refuses the graph that it saved.
            q, factor, k, v = (
                graph.add("Cast", [tensor], f"{prefix}{name}.single", to=FLOAT32)
                for name, tensor in (
                    ("q", attention.q.tensor),
                    ("factor", attention.factor),
                    ("k", k),
                    ("v", v),
                )
            )
            attention = replace(
                attention, q=replace(attention.q, tensor=q), factor=factor, dtype=FLOAT32
            )
        dtype = attention.dtype
        inputs = (k, v, manipulation, ip_scale, *mask)
        exported = _exported(graph, f"{prefix}exported.", attention, call, inputs, dtype)
        lean = _lean(graph, f"{prefix}lean.", attention, inputs, tokens, single, dtype)
        graph.add("If", [asks], f"{prefix}added", then_branch=exported, else_branch=lean)
        added = f"{prefix}added"
        if own != dtype:
            added = graph.add("Cast", [added], f"{prefix}typed", to=own)
        graph.add("Add", [base, added], attention.output)

    return write


def _attention(graph: Graph, softmax: Node) -> Attention | None:
    product = graph.made_by(softmax.input[0], "MatMul")
    scaled = product and graph.made_by(product.input[0], "Mul")
    weighted = graph.only_use(softmax.output[0], "MatMul")
    if product is None or scaled is None or weighted is None or attribute(softmax, "axis") != -1:
        return None
    q, v = _split(graph, scaled.input[0]), _split(graph, weighted.input[1])
    k, k_scale = _split(graph, product.input[1], _KEYS_LAST), 1.0
    if k is None:
        k, k_scale = _torch_keys(graph, product.input[1])
    if q is None or k is None or v is None or not q.heads == k.heads == v.heads:
        return None
    result, image = weighted.output[0], None
    total = graph.only_use(result, "Add")
    if total is not None:
        others = [name for name in total.input if name != result]
        image = graph.made_by(others[0], FUNCTION_NAME) if len(others) == 1 else None
        split = [_split(graph, name) for name in image.input[:3]] if image is not None else []
        if len(split) != 3 or split[0] != q or any(x is None or x.heads != q.heads for x in split):
            return None
        result = total.output[0]
    back = graph.only_use(result, "Transpose")
    merge = back and graph.only_use(back.output[0], "Reshape")
    if back is None or merge is None or attribute(back, "perm") != _HEADS_FIRST:
        return None
    factor = scaled.input[1]
    scale, dtype = _number(graph, factor), graph.dtype(factor)
    if scale is None or dtype not in (FLOAT32, FLOAT16):
        return None
    output = merge.output[0]
    return Attention(q, k.tensor, v.tensor, scale * k_scale, factor, dtype, output, image)


def _torch_keys(graph: Graph, keys: str) -> tuple[Split | None, float]:
    """What keys [B,H,D,L] of torch's own attention are split from, and their factor.

    Its exporter puts √(1/√D) on Q and on K, and turns K as [B·H,L,D], between two reshapes.
    """
    scaled = graph.made_by(keys, "Mul")
    apart = scaled and graph.made_by(scaled.input[0], "Reshape")
    turned = apart and graph.made_by(apart.input[0], "Transpose")
    merged = turned and graph.made_by(turned.input[0], "Reshape")
    if scaled is None or turned is None or merged is None or attribute(turned, "perm") != (0, 2, 1):
        return None, 1.0
    split, scale = _split(graph, merged.input[0]), _number(graph, scaled.input[1])
    flat, whole = graph.shape(merged.output[0]) or (), graph.shape(scaled.input[0]) or ()
    if split is None or scale is None or len(flat) != 3 or len(whole) != 4:
        return None, 1.0
    return (split, scale) if flat[2] == whole[2] == split.head_size else (None, 1.0)


def _number(graph: Graph, tensor: str) -> float | None:
    """The value of a constant of one element."""
    value = graph.value(tensor)
    return float(value.item()) if value is not None and value.size == 1 else None


def _split(graph: Graph, tensor: str, order: tuple[int, ...] = _HEADS_FIRST) -> Split | None:
    """What `tensor` is split from, where it is [B,N,H,D] transposed to `order`."""
    transpose = graph.made_by(tensor, "Transpose")
    reshape = transpose and graph.made_by(transpose.input[0], "Reshape")
    if transpose is None or reshape is None or attribute(transpose, "perm") != order:
        return None
    sizes = graph.sizes(reshape.input[1]) or []
    if len(sizes) != 4 or not isinstance(sizes[2], int):
        return None
    channels = (graph.shape(reshape.input[0]) or ("?",))[-1]
    size = channels // sizes[2] if isinstance(channels, int) else sizes[3]
    return Split(reshape.input[0], sizes[2], size if isinstance(size, int) and size > 0 else 0)


def _image_tokens(graph: Graph, call: Node) -> tuple[str, str]:
    """K' and V' [B,T,C]; `_attention` made sure that they are split."""
    found = [split for name in call.input[1:3] if (split := _split(graph, name)) is not None]
    k, v = found
    return k.tensor, v.tensor


def _by_head(graph: Graph, heads: int) -> str:
    return graph.constant(f"form.by_head.{heads}", [0, 0, heads, -1], np.int64)


def _asks_for_the_softmask(graph: Graph, manipulation: str) -> str:
    """Whether any of the requests [R,columns] does, a scalar bool."""
    prefix = f"{manipulation}.form."
    if graph.made_by(f"{prefix}asks") is None:
        first = graph.constant("form.first", [MANIPULATION_COLUMNS.index("kind")], np.int64)
        kinds = graph.add("Gather", [manipulation, first], f"{prefix}kinds", axis=1)
        highest = graph.add("ReduceMax", [kinds], f"{prefix}highest", keepdims=0)
        below = graph.constant("form.below_softmask", KINDS.index("softmask") - 0.5, np.float32)
        graph.add("Greater", [highest, below], f"{prefix}asks")
    return f"{prefix}asks"


def _exported(
    graph: Graph,
    prefix: str,
    attention: Attention,
    call: Node,
    inputs: Sequence[str],
    dtype: int,
) -> Any:
    """The branch that does what the exported function does, with its transposes."""
    k, v, *others = inputs
    by_head = _by_head(graph, attention.q.heads)
    merged = graph.constant("form.merged", [0, 0, -1], np.int64)
    nodes = []
    for name, tensor in (("q", attention.q.tensor), ("k", k), ("v", v)):
        apart = f"{prefix}{name}.split"
        nodes += [
            helper.make_node("Reshape", [tensor, by_head], [apart], apart),
            helper.make_node(
                "Transpose", [apart], [f"{prefix}{name}"], f"{prefix}{name}", perm=_HEADS_FIRST
            ),
        ]
    written = helper.make_node(
        call.op_type,
        [f"{prefix}q", f"{prefix}k", f"{prefix}v", *others],
        [f"{prefix}hidden"],
        domain=call.domain,
    )
    nodes += inline(graph, written, f"{prefix}function.")
    back, out = f"{prefix}back", f"{prefix}out"
    nodes += [
        helper.make_node("Transpose", [f"{prefix}hidden"], [back], back, perm=_HEADS_FIRST),
        helper.make_node("Reshape", [back, merged], [out], out),
    ]
    return _branch("softmask", nodes, out, dtype)


def _lean(
    graph: Graph,
    prefix: str,
    attention: Attention,
    inputs: Sequence[str],
    tokens: int,
    single: bool,
    dtype: int,
) -> Any:
    """The branch for kinds `off` and `scale_power`, Eq. 1 and 7, on [B,N,C].

    With K' spread to [B,H·T,C], zero outside of each head's own channels, Q K'ᵀ is one product
    [B,N,H·T]; V' likewise.
    """
    k, v, manipulation, ip_scale, *mask = inputs
    heads = attention.q.heads
    columns = {name: _column(graph, manipulation, name) for name in _LEAN_COLUMNS}  # [R,1,1]
    manipulated = f"{manipulation}.form.manipulated"
    if graph.made_by(manipulated) is None:
        graph.add("Cast", [columns["kind"]], manipulated, to=BOOL)
    scale_R11, by_request = f"{ip_scale}.form.scale", f"{ip_scale}.form.by_request"
    if graph.made_by(by_request) is None:
        per_request = graph.constant("form.per_request", [-1, 1, 1], np.int64)
        graph.add("Reshape", [ip_scale, per_request], scale_R11)
        requests = graph.add("Shape", [ip_scale], f"{ip_scale}.form.requests")
        rest = graph.constant(f"form.maps.{tokens}", [-1, tokens], np.int64)
        graph.add("Concat", [requests, rest], by_request, axis=0)
    product = FLOAT32 if single else dtype
    numpy_type = np.float32 if product == FLOAT32 else np.float16
    own_name = f"form.own.{heads}.{np.dtype(numpy_type).name}"
    own = graph.constant(own_name, np.eye(heads).reshape(heads, 1, heads, 1), numpy_type)
    apart = graph.constant(f"form.apart.{heads}.{tokens}", [0, 1, tokens, heads, -1], np.int64)
    spread = graph.constant(f"form.spread.{heads}.{tokens}", [0, heads * tokens, -1], np.int64)
    maps = graph.constant(f"form.maps.{heads}.{tokens}", [0, 0, heads, tokens], np.int64)

    nodes: list[Node] = []

    def add(op_type: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        name = f"{prefix}{name}"
        nodes.append(helper.make_node(op_type, inputs, [name], name, **attributes))
        return name

    def typed(tensor: str, name: str) -> str:
        """`tensor`, which has the graph's type, in that of the products."""
        return add("Cast", [tensor], f"{name}.typed", to=product) if single else tensor

    def block_diagonal(tensor_BTC: str, name: str) -> str:
        by_head = add("Reshape", [typed(tensor_BTC, name), apart], f"{name}.by_head")
        return add("Reshape", [add("Mul", [by_head, own], f"{name}.own"), spread], f"{name}.spread")

    scaled_k = add("Mul", [k, attention.factor], "k.scaled")
    keys = add("Transpose", [block_diagonal(scaled_k, "k")], "keys", perm=(0, 2, 1))
    q = typed(attention.q.tensor, "q")
    logits = add("MatMul", [q, keys], "logits")
    wide = logits if product == FLOAT32 else add("Cast", [logits], "logits.wide", to=FLOAT32)
    by_head_BNHT = add("Reshape", [wide, maps], "logits.maps")
    there: list[str] = []
    if mask:
        masked_B11T, there_B11T = _mask(graph, mask[0])
        by_head_BNHT = add("Add", [by_head_BNHT, masked_B11T], "logits.masked")
        per_request = add("Shape", [by_head_BNHT], "logits.maps.shape")
        there_BNHT = add("Expand", [there_B11T, per_request], "there")
        there = [add("Reshape", [there_BNHT, by_request], "there.by_request")]
    a_BNHT = add("Softmax", [by_head_BNHT], "a", axis=3)
    a = add("Reshape", [a_BNHT, by_request], "a.by_request")
    raised = add(
        "Mul", [columns["scale"], add("Pow", [a, columns["power"]], "power_of_a")], "raised"
    )
    bounded = add("Min", [raised, columns["upper_bound"]], "bounded")
    f = add("Where", [manipulated, bounded, a], "f")
    if there:  # a token that is not there has a share of 0, and 0 to the power of 0 is 1
        f = add("Mul", [f, *there], "f.there")
    weighted = add("Mul", [f, scale_R11], "f.weighted")
    f_BNM = add("Reshape", [weighted, add("Shape", [logits], "logits.shape")], "f.merged")
    f_typed = f_BNM if product == FLOAT32 else add("Cast", [f_BNM], "f.typed", to=product)
    hidden = add("MatMul", [f_typed, block_diagonal(v, "v")], "hidden")
    out = add("CastLike", [hidden, attention.q.tensor], "out")
    return _branch("lean", nodes, out, dtype)


def _mask(graph: Graph, mask: str) -> tuple[str, str]:
    """The mask of the tokens as [B,1,1,T], and 1 where they are there and 0 where not."""
    apart, there = f"{mask}.form.apart", f"{mask}.form.there"
    if graph.made_by(apart) is None:
        axes = graph.constant("form.mask_axes", [1, 2], np.int64)
        graph.add("Exp", [graph.add("Unsqueeze", [mask, axes], apart)], there)
    return apart, there


_LEAN_COLUMNS = ("kind", "scale", "power", "upper_bound")


def _column(graph: Graph, manipulation: str, name: str) -> str:
    """One parameter of every request, [R,1,1]."""
    column = f"{manipulation}.form.{name}"
    if graph.made_by(column) is None:
        at = graph.constant(f"form.column.{name}", [[MANIPULATION_COLUMNS.index(name)]], np.int64)
        graph.add("Gather", [manipulation, at], column, axis=1)
    return column


def _branch(name: str, nodes: Sequence[Node], output: str, dtype: int) -> Any:
    shown = helper.make_tensor_value_info(output, dtype, None)
    return helper.make_graph(nodes, name, [], [shown])
