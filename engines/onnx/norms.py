"""Group normalisation as one operator of ONNX Runtime's CUDA provider.

Shape legend: B rows, C channels, H × W picture, L = H·W positions.
"""

import numpy as np

from fastface_trt.engines.onnx.graph import FLOAT16, FLOAT32, MICROSOFT, Graph, Node, attribute

_LARGEST_GROUP = 512
"""Channels of a group that the kernel takes; their number must be even, too."""

TO_LAST, TO_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)
"""From [B,C,H,W] to [B,H,W,C], and back."""


def group_norms(graph: Graph) -> int:
    """GroupNorm with channels last, a SiLU that follows included; returns their number.

    Takes what the exporter makes of torch's GroupNorm: a reshape to [B,groups,·], an
    InstanceNormalization with scale 1 and bias 0, a reshape back, weight and bias [C,1,1]. Casts to
    float32 before and back after it go: the kernel takes float16, and adds up in float32. So does
    GroupNorm of a picture that was reshaped to [B,C,L] (the VAE's attention); the reshape comes
    after the norm then. Transposes around the operator are left to `layout.channels_last`.

    Leaves alone what the kernel refuses: groups of an odd number of channels or of more than 512,
    types other than float32 and float16.
    """
    count = sum(_group_norm(graph, node) for node in graph.of_type("InstanceNormalization"))
    graph.prune()
    return count


def _group_norm(graph: Graph, instance: Node) -> bool:
    grouped = graph.made_by(instance.input[0], "Reshape")
    restored = graph.only_use(instance.output[0], "Reshape")
    scaled = restored and graph.only_use(restored.output[0], "Mul")
    shifted = scaled and graph.only_use(scaled.output[0], "Add")
    if grouped is None or restored is None or scaled is None or shifted is None:
        return False
    source = grouped.input[0]
    sizes = graph.value(grouped.input[1])
    shape = graph.shape(source)
    gamma = _other(scaled, restored.output[0])
    beta = _other(shifted, scaled.output[0])
    if (
        sizes is None
        or shape is None
        or len(shape) not in (3, 4)
        or len(sizes) != 3
        or sizes[0] != 0
        or sizes[2] != -1
        or not _is_shape_of(graph, restored.input[1], source)
        or not _is_identity(graph, instance)
    ):
        return False
    channels, groups = shape[1], int(sizes[1])
    if not isinstance(channels, int) or groups < 1 or channels % groups:
        return False
    group = channels // groups
    affine = (channels, *(1,) * (len(shape) - 2))
    if group % 2 or group > _LARGEST_GROUP or graph.shape(gamma) != affine:
        return False
    if graph.shape(beta) != affine or not (graph.is_weight(gamma) and graph.is_weight(beta)):
        return False
    end = shifted.output[0]
    source, end = _without_casts(graph, source, end)
    if graph.dtype(source) not in (FLOAT32, FLOAT16):
        return False
    picture = source if len(shape) == 4 else _picture(graph, source)
    if picture is None:
        return False
    end, silu = _with_silu(graph, end)
    weights = [_vector(graph, name) for name in (gamma, beta)]
    x, y = f"{end}.norm.x", f"{end}.norm.y"
    graph.add("Transpose", [picture], x, perm=TO_LAST)
    graph.add(
        "GroupNorm",
        [x, *weights],
        y,
        MICROSOFT,
        activation=int(silu),
        channels_last=1,
        epsilon=attribute(instance, "epsilon", 1e-5),
        groups=groups,
    )
    if len(shape) == 4:
        graph.add("Transpose", [y], end, perm=TO_FIRST)
        return True
    flat = graph.made_by(source, "Reshape")
    assert flat is not None  # `_picture` looked
    first = graph.add("Transpose", [y], f"{end}.norm.first", perm=TO_FIRST)
    graph.describe(first, picture)
    graph.add("Reshape", [first, flat.input[1]], end, allowzero=attribute(flat, "allowzero", 0))
    return True


def _other(node: Node, tensor: str) -> str:
    """The other input of a node with two."""
    return str(node.input[1] if node.input[0] == tensor else node.input[0])


def _is_shape_of(graph: Graph, shape: str, tensor: str) -> bool:
    node = graph.made_by(shape, "Shape")
    whole = node is not None and not attribute(node, "start", 0) and attribute(node, "end") is None
    return node is not None and whole and node.input[0] == tensor


def _is_identity(graph: Graph, instance: Node) -> bool:
    """Whether the scale is 1 and the bias 0 for every group."""
    scale, bias = (graph.value(name) for name in instance.input[1:3])
    return scale is not None and bias is not None and bool(np.all(scale == 1) and np.all(bias == 0))


def _without_casts(graph: Graph, source: str, end: str) -> tuple[str, str]:
    """The tensors outside of casts from float16 before and back after, where there are both."""
    widened = graph.made_by(source, "Cast")
    narrowed = graph.only_use(end, "Cast")
    if widened is None or narrowed is None:
        return source, end
    inner = widened.input[0]
    if graph.dtype(inner) != FLOAT16 or attribute(narrowed, "to") != FLOAT16:
        return source, end
    return inner, narrowed.output[0]


def _picture(graph: Graph, flat: str) -> str | None:
    """The [B,C,H,W] that `flat` [B,C,L] is a reshape of."""
    reshape = graph.made_by(flat, "Reshape")
    shape = graph.shape(flat)
    before = graph.shape(reshape.input[0]) if reshape is not None else None
    if reshape is None or shape is None or before is None or len(before) != 4:
        return None
    return reshape.input[0] if before[:2] == shape[:2] else None


def _with_silu(graph: Graph, tensor: str) -> tuple[str, bool]:
    """What x · sigmoid(x) makes of `tensor`, if that is all that it is used for."""
    uses = graph.uses(tensor)
    sigmoid = next((node for node in uses if node.op_type == "Sigmoid"), None)
    if len(uses) != 2 or sigmoid is None or tensor in graph.outputs:
        return tensor, False
    product = graph.only_use(sigmoid.output[0], "Mul")
    if product is None or set(product.input) != {tensor, sigmoid.output[0]}:
        return tensor, False
    return product.output[0], True


def _vector(graph: Graph, weight: str) -> str:
    """A weight [C,1,1] as float32 [C]. The name ends in the weight's, by which a refit knows it."""
    name = f"channels_{weight}"
    if graph.made_by(name) is None:
        if graph.dtype(weight) != FLOAT32:
            weight = graph.add("Cast", [weight], f"single_{weight}", to=FLOAT32)
        graph.add("Reshape", [weight, graph.constant("form.vector", [-1], np.int64)], name)
    return name
