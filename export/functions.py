"""Attention manipulation as ONNX model-local functions, one body for every backend.

`DecoupledAttention` is the node that the exported UNet holds in each decoupled block; `Quantile`
and `Refine` are what it is made of. ONNX Runtime inlines them, TensorRT-RTX compiles them, and a
plugin of the same name can take the node's place.

Shape legend: B = R·G rows, R requests, G branches, H heads, N query positions, T image tokens,
D head size, J thresholds. Attention maps are kept as [.., T, N], so that every reduction over
positions runs along contiguous memory.
"""

# The script decorator reads this source, so the bodies are plain calls: a Python loop would become
# an ONNX Loop, which neither a CUDA graph nor operator fusion survives.
# mypy: ignore-errors

from onnxscript import opset20 as op
from onnxscript import script
from onnxscript.values import Opset

from fastface_trt.engines.contract import FUNCTION_DOMAIN

OPSET = 20
DOMAIN = Opset(FUNCTION_DOMAIN, 1)


@script(DOMAIN, default_opset=op)
def Refine(x_RGHT1N, low_RGHT11, width, below_R11111):
    """Narrow the bracket of an order statistic sixteenfold by counting against 15 thresholds.

    x is [R,G,H,T,1,N]; the bracket [low, low + width) holds the element of 0-based rank `below`,
    and so does the one returned, [low', low' + width / 16).
    """
    step = op.Div(width, op.Constant(value_float=16.0))
    fractions = op.Constant(
        value_floats=[
            1.0,
            2.0,
            3.0,
            4.0,
            5.0,
            6.0,
            7.0,
            8.0,
            9.0,
            10.0,
            11.0,
            12.0,
            13.0,
            14.0,
            15.0,
        ]
    )
    fractions_J1 = op.Unsqueeze(fractions, op.Constant(value_ints=[1]))
    thresholds_RGHTJ1 = op.Add(low_RGHT11, op.Mul(step, fractions_J1))
    is_below = op.Cast(op.Less(x_RGHT1N, thresholds_RGHTJ1), to=1)
    count_RGHTJ1 = op.ReduceSum(is_below, op.Constant(value_ints=[-1]), keepdims=1)
    # A threshold that has at most `below` elements under it does not pass the statistic; the
    # counts grow with the threshold, so the number of such thresholds is the bracket's index.
    passed = op.Cast(op.LessOrEqual(count_RGHTJ1, below_R11111), to=1)
    index_RGHT11 = op.ReduceSum(passed, op.Constant(value_ints=[-2]), keepdims=1)
    return op.Add(low_RGHT11, op.Mul(step, index_RGHT11)), step


@script(DOMAIN, default_opset=op)
def Quantile(x_RGHTN, level_R):
    """Linearly interpolated quantile over N, exact up to 10⁻⁶ of the value range.

    x is float32 [R,G,H,T,N] and level float32 [R] in [0, 1]; the result is [R,G,H,T,1]. It equals
    numpy.quantile(x, level, axis=-1): with h = level · (N − 1) and k = ⌊h⌋ it is
    x₍ₖ₎ + (h − k)(x₍ₖ₊₁₎ − x₍ₖ₎). No sort and no TopK: TensorRT's TopK stops at 3840 elements.
    """
    last = op.Constant(value_ints=[-1])
    minimum = op.ReduceMin(x_RGHTN, last, keepdims=1)
    extent = op.Sub(op.ReduceMax(x_RGHTN, last, keepdims=1), minimum)
    # A constant row has extent 0; dividing it by 1 keeps it at 0 throughout.
    flat = op.Equal(extent, op.Constant(value_float=0.0))
    divisor = op.Where(flat, op.Constant(value_float=1.0), extent)
    unit_RGHT1N = op.Unsqueeze(
        op.Div(op.Sub(x_RGHTN, minimum), divisor), op.Constant(value_ints=[4])
    )

    size = op.Cast(op.Shape(x_RGHTN, start=4, end=5), to=1)
    position_R = op.Mul(level_R, op.Sub(size, op.Constant(value_float=1.0)))
    position = op.Unsqueeze(position_R, op.Constant(value_ints=[1, 2, 3, 4, 5]))
    rank = op.Floor(position)
    fraction = op.Sub(position, rank)

    # The bracket starts a little wider than [0, 1], since its upper end is exclusive.
    low_0 = op.Mul(op.Unsqueeze(minimum, op.Constant(value_ints=[4])), op.Constant(value_float=0.0))
    low_1, width_1 = Refine(unit_RGHT1N, low_0, op.Constant(value_float=1.00001), rank)
    low_2, width_2 = Refine(unit_RGHT1N, low_1, width_1, rank)
    low_3, width_3 = Refine(unit_RGHT1N, low_2, width_2, rank)
    low_4, width_4 = Refine(unit_RGHT1N, low_3, width_3, rank)
    low_5, width_5 = Refine(unit_RGHT1N, low_4, width_4, rank)

    # The largest element under the bracket's end is the statistic itself, unless the bracket holds
    # further elements, and then all of them lie within its 10⁻⁶.
    under = op.Less(unit_RGHT1N, op.Add(low_5, width_5))
    lower = op.ReduceMax(
        op.Where(under, unit_RGHT1N, op.Constant(value_float=-1.0)), last, keepdims=1
    )
    above = op.ReduceMin(
        op.Where(under, op.Constant(value_float=2.0), unit_RGHT1N), last, keepdims=1
    )
    count = op.ReduceSum(op.Cast(under, to=1), last, keepdims=1)
    next_is_here = op.Less(op.Add(rank, op.Constant(value_float=1.0)), count)
    upper = op.Where(next_is_here, lower, op.Min(above, op.Constant(value_float=1.0)))
    unit_quantile = op.Add(lower, op.Mul(fraction, op.Sub(upper, lower)))
    return op.Add(minimum, op.Mul(extent, op.Squeeze(unit_quantile, op.Constant(value_ints=[4]))))


@script(DOMAIN, default_opset=op)
def Normalize(x_RGHTN):
    """norm(X) of Eq. 8: (X − min X) / (max X − min X) per request and token, 0 where X is flat."""
    axes = op.Constant(value_ints=[1, 2, 4])
    minimum = op.ReduceMin(x_RGHTN, axes, keepdims=1)
    extent = op.Sub(op.ReduceMax(x_RGHTN, axes, keepdims=1), minimum)
    return op.Div(op.Sub(x_RGHTN, minimum), op.Max(extent, op.Constant(value_float=1e-12)))


@script(DOMAIN, default_opset=op)
def MatchStatistics(x, reference, weight, axis, size):
    """w x + (1 − w) AdaIN(x, reference) of Eq. 10 along one axis of `size` elements.

    AdaIN(x, r) = (x − mean x) · std r / (std x + 1e-6) + mean r, with the unbiased std.
    """
    mean_x = op.ReduceMean(x, axis, keepdims=1)
    mean_r = op.ReduceMean(reference, axis, keepdims=1)
    centred = op.Sub(x, mean_x)
    deviation = op.Sub(reference, mean_r)
    freedom = op.Sub(size, op.Constant(value_float=1.0))
    std_x = op.Sqrt(op.Div(op.ReduceSum(op.Mul(centred, centred), axis, keepdims=1), freedom))
    std_r = op.Sqrt(op.Div(op.ReduceSum(op.Mul(deviation, deviation), axis, keepdims=1), freedom))
    gain = op.Div(std_r, op.Add(std_x, op.Constant(value_float=1e-6)))
    blended = op.Add(op.Mul(centred, gain), mean_r)
    return op.Add(op.Mul(weight, x), op.Mul(op.Sub(op.Constant(value_float=1.0), weight), blended))


@script(DOMAIN, default_opset=op)
def Softmask(a_RGHTN, invert, level_R, sharpness, scale, upper_bound, adain_weight):
    """AM2, Eq. 8 to 10 with appendix E: the manipulated map Ŝ, [R,G,H,T,N] float32.

    Token 0 enters inverted where `invert` is 1 and leaves as max_N(S₀) − S₀. The quantile is that
    of the un-normalised map, as in the authors' code.
    """
    size = op.Shape(a_RGHTN, start=3, end=4)
    tokens = op.Range(op.Constant(value_int=0), op.Squeeze(size), op.Constant(value_int=1))
    first_T1 = op.Unsqueeze(op.Equal(tokens, op.Constant(value_int=0)), op.Constant(value_ints=[1]))
    inverted = op.And(first_T1, op.Greater(invert, op.Constant(value_float=0.5)))

    entering = op.Where(inverted, op.Sub(op.Constant(value_float=1.0), a_RGHTN), a_RGHTN)
    quantile = op.Max(Quantile(entering, level_R), op.Constant(value_float=1e-6))
    shifted = op.Mul(sharpness, op.Sub(Normalize(entering), quantile))
    mask = op.Min(op.Mul(scale, Normalize(op.Sigmoid(shifted))), upper_bound)
    peak = op.ReduceMax(mask, op.Constant(value_ints=[-1]), keepdims=1)
    leaving = op.Where(inverted, op.Sub(peak, mask), mask)
    return MatchStatistics(
        leaving, a_RGHTN, adain_weight, op.Constant(value_ints=[3]), op.Cast(size, to=1)
    )


@script(DOMAIN, default_opset=op)
def DecoupledAttention(q_BHND, k_BHTD, v_BHTD, manipulation_RP, ip_scale_R):
    """λ · f(A) V' of Eq. 6 with A = softmax(Q K'ᵀ / √D), result [B,H,N,D] in the dtype of q.

    manipulation is float32 [R, columns] and ip_scale (λ) float32 [R], one row per request; the
    columns are those of `fastface_trt.engines.contract`. The map and its statistics are float32
    whatever q is: with T = 4 tokens that costs nothing beside the text attention.
    """
    # Rows of the parameters as [R,1,1,1,1], to meet maps of [R,G,H,T,N].
    rows = op.Unsqueeze(manipulation_RP, op.Constant(value_ints=[2, 3, 4]))
    kind, scale, power, level, sharpness, adain_weight, invert, upper_bound = op.Split(
        rows, axis=1, num_outputs=8
    )

    # 1/√D goes onto q before the product: fp16 logits stay small, and TensorRT's fused attention
    # looks for it there.
    head_size = op.CastLike(op.Shape(q_BHND, start=3, end=4), q_BHND)
    scaled = op.Div(q_BHND, op.Sqrt(head_size))
    logits_BHTN = op.Cast(op.MatMul(k_BHTD, op.Transpose(scaled, perm=[0, 1, 3, 2])), to=1)
    a_BHTN = op.Softmax(logits_BHTN, axis=2)

    requests = op.Shape(manipulation_RP, start=0, end=1)
    split_rows = op.Concat(
        requests, op.Constant(value_ints=[-1]), op.Shape(a_BHTN, start=1, end=4), axis=0
    )
    a = op.Reshape(a_BHTN, split_rows)
    split_values = op.Concat(
        requests, op.Constant(value_ints=[-1]), op.Shape(v_BHTD, start=1, end=4), axis=0
    )
    v = op.Reshape(op.Cast(v_BHTD, to=1), split_values)

    is_scale_power = op.Equal(kind, op.Constant(value_float=1.0))
    is_softmask = op.Equal(kind, op.Constant(value_float=2.0))
    level_R = op.Squeeze(level, op.Constant(value_ints=[1, 2, 3, 4]))

    scale_power = op.Min(op.Mul(scale, op.Pow(a, power)), upper_bound)  # Eq. 7
    softmask = Softmask(a, invert, level_R, sharpness, scale, upper_bound, adain_weight)
    f = op.Where(is_softmask, softmask, op.Where(is_scale_power, scale_power, a))

    swap = op.Transpose(f, perm=[0, 1, 2, 4, 3])
    hidden = op.MatMul(swap, v)
    untouched = op.MatMul(op.Transpose(a, perm=[0, 1, 2, 4, 3]), v)
    width = op.Cast(op.Shape(v, start=4, end=5), to=1)
    matched = MatchStatistics(hidden, untouched, adain_weight, op.Constant(value_ints=[4]), width)
    chosen = op.Where(is_softmask, matched, hidden)
    scaled_by_lambda = op.Mul(
        chosen, op.Unsqueeze(ip_scale_R, op.Constant(value_ints=[1, 2, 3, 4]))
    )
    return op.CastLike(op.Reshape(scaled_by_lambda, op.Shape(q_BHND)), q_BHND)


FUNCTIONS = (Refine, Quantile, Normalize, MatchStatistics, Softmask, DecoupledAttention)
"""Every function of the domain, callees before callers."""
