"""What follows a linear layer, in one operator of ONNX Runtime's CUDA provider: bias and the rest.

Shape legend: B rows, N positions, C channels.
"""

from typing import Final

from fastface_trt.engines.onnx.graph import FLOAT16, FLOAT32, MICROSOFT, Graph, Node, attribute

_SPLIT_WIDTHS: Final = (2560, 5120, 10240)
"""Channels before the split that the kernel BiasSplitGelu is compiled for."""
_BIAS_WIDTHS: Final = (320, 640, 1280)
"""Channels that the kernel BiasAdd takes."""


def split_gelus(graph: Graph) -> int:
    """BiasSplitGelu for x · gelu(y) of (x, y) = split(z + bias); returns their number.

    Takes z [B,N,2C], two equal parts, the exact GELU of the second. Leaves alone a GEGLU without a
    bias, which the operator needs, and widths for which there is no kernel.
    """
    count = 0
    for gelu in graph.of_type("Gelu"):
        split = graph.made_by(gelu.input[0], "Split")
        product = graph.only_use(gelu.output[0], "Mul")
        if split is None or product is None or attribute(gelu, "approximate", "none") != "none":
            continue
        whole = graph.shape(split.input[0]) or ()
        halves = [graph.shape(name) for name in split.output]
        if (
            list(split.output[1:]) != [gelu.input[0]]
            or set(product.input) != {split.output[0], gelu.output[0]}
            or not all(graph.only_use(name) for name in split.output)
            or len(whole) != 3
            or whole[2] not in _SPLIT_WIDTHS
            or any(half is None or half[2] != int(whole[2]) // 2 for half in halves)
        ):
            continue
        biased = _biased(graph, split.input[0])
        if biased is not None:
            graph.add("BiasSplitGelu", biased, product.output[0], MICROSOFT)
            count += 1
    graph.prune()
    return count


def skip_layer_norms(graph: Graph) -> int:
    """SkipLayerNormalization for a norm of x + bias + residual; returns their number.

    Takes LayerNormalization over the last axis of a sum [B,N,C], with a bias of the norm; the
    linear layer's bias goes in where there is one. The sum is the operator's fourth output, which
    the next residual uses. ONNX Runtime adds up a float16 norm's statistics in float16, unless the
    provider's option enable_skip_layer_norm_strict_mode is set.
    """
    count = 0
    for norm in graph.of_type("LayerNormalization"):
        total = graph.made_by(norm.input[0], "Add")
        shape = graph.shape(norm.input[0]) or ()
        if total is None or len(shape) != 3 or attribute(norm, "axis", -1) not in (-1, 2):
            continue
        vectors = list(norm.input[1:3])
        if (
            len(vectors) != 2
            or len(norm.output) != 1
            or attribute(norm, "stash_type", 1) != 1
            or any(graph.shape(name) != shape[2:] for name in vectors)
            or any(graph.dtype(name) != graph.dtype(norm.input[0]) for name in vectors)
            or not _is_residual_sum(graph, total)
        ):
            continue
        biased, residual = _biased_and_residual(graph, total)
        inputs = [biased[0], residual, *vectors, *biased[1:]]
        outputs = [norm.output[0]]
        if graph.only_use(norm.input[0]) is None:
            outputs += ["", "", norm.input[0]]
        epsilon = attribute(norm, "epsilon", 1e-5)
        graph.add("SkipLayerNormalization", inputs, outputs, MICROSOFT, epsilon=epsilon)
        count += 1
    graph.prune()
    return count


def bias_adds(graph: Graph) -> int:
    """BiasAdd for x + bias + residual that no norm follows; returns their number.

    Takes [B,N,C] with C of 320, 640 or 1280: the kernel refuses others. Comes after
    `skip_layer_norms`, which does more with the same pattern.
    """
    count = 0
    for total in graph.of_type("Add"):
        shape = graph.shape(total.output[0]) or ()
        if len(shape) != 3 or shape[2] not in _BIAS_WIDTHS or not _is_residual_sum(graph, total):
            continue
        biased, residual = _biased_and_residual(graph, total)
        if len(biased) == 2:
            graph.add("BiasAdd", [*biased, residual], total.output[0], MICROSOFT)
            count += 1
    graph.prune()
    return count


def _biased_and_residual(graph: Graph, total: Node) -> tuple[list[str], str]:
    """The summand that is a linear layer, with its bias if it has one, and the other summand."""
    first, second = total.input
    for one, other in ((first, second), (second, first)):
        found = _biased(graph, one)
        if found is not None:
            return found, other
    return [first], second


def _biased(graph: Graph, tensor: str) -> list[str] | None:
    """x [B,N,C] and the weight [C] that is added to it alone to make `tensor`."""
    add = graph.made_by(tensor, "Add")
    if add is None or graph.only_use(tensor) is None:
        return None
    shape = graph.shape(tensor) or ()
    for x, bias in (tuple(add.input), tuple(add.input)[::-1]):
        fits = graph.shape(bias) == shape[2:] and graph.is_weight(bias)
        if fits and len(graph.shape(x) or ()) == 3 and (graph.shape(x) or ())[2] == shape[2]:
            return [x, bias]
    return None


def _is_residual_sum(graph: Graph, total: Node) -> bool:
    """Whether two tensors [B,N,C] of one shape are added, in a type that the kernels take.

    Sizes that only a run knows count as equal: an exporter spells a broadcast as a size of 1.
    """
    one, other = (graph.shape(name) or () for name in total.input)
    if len(one) != 3 or len(other) != 3 or graph.dtype(total.output[0]) not in (FLOAT32, FLOAT16):
        return False
    pairs = zip(one, other, strict=True)
    return one[2] == other[2] and all(a == b or 1 not in (a, b) for a, b in pairs)
