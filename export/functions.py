"""Attention manipulation as ONNX model-local functions, one body for every backend.

`DecoupledAttention` is the node that the exported UNet holds in each decoupled block; the other
functions are what it is made of. ONNX Runtime inlines them, TensorRT compiles them, and a plugin of
the same name can take the node's place.

Shape legend: B = R·G rows, R requests, G branches, H heads, M = G·H maps of one request, N query
positions, T image tokens, D head size, J thresholds. Attention maps are kept as [.., T, N], so that
every reduction over positions runs along contiguous memory.

The bodies are written for few TensorRT layers, since SDXL has seventy of these nodes: constants
carry the rank that they meet (a scalar costs a reshape at each use), flags are arithmetic, and a
size is gathered from a shape (a Slice of known bounds becomes some thirty layers).
"""

# The script decorator reads this source, so the bodies are plain calls: a Python loop would become
# an ONNX Loop, which neither a CUDA graph nor operator fusion survives.
# mypy: ignore-errors

import numpy as np
from onnx import numpy_helper
from onnxscript import OnnxFunction, script
from onnxscript import opset20 as op
from onnxscript.values import Opset

from fastface_trt.engines.contract import FUNCTION_DOMAIN, MANIPULATION_COLUMNS

OPSET = 20
DOMAIN = Opset(FUNCTION_DOMAIN, 1)

THRESHOLDS = 31
"""Thresholds per round of `Refine`; four rounds leave a bracket of 32⁻⁴ = 9.5·10⁻⁷."""

FEW_TOKENS = 4
"""Up to so many image tokens a round of the quantile counts for all thresholds at once, which is
fewest nodes; with more, whose maps are larger, it halves five times. What `Quantile` says of its
peak is for these few: by halves it is one value per element, 157 MB for 80 tokens."""


def _tensor(values, dtype=np.float32):
    return numpy_helper.from_array(np.asarray(values, dtype))


def _scalar(value, dtype=np.float32):
    return _tensor([[[[value]]]], dtype)


def _boundaries(rounds):
    """Offsets of the THRESHOLDS inner boundaries after so many rounds, [1,1,1,J,1]."""
    width = (THRESHOLDS + 1.0) ** -rounds
    return _tensor(np.arange(1, THRESHOLDS + 1).reshape(1, 1, 1, -1, 1) * width)


def _column(name):
    """The index that gathers a column of the parameter rows [R,P] as [R,1,1,1]."""
    return _tensor([[[MANIPULATION_COLUMNS.index(name)]]], np.int32)


_ZERO_5D = _tensor([[[[[0.0]]]]])
_TWO, _FOUR, _EIGHT, _SIXTEEN = (_tensor([[[[[2.0**n]]]]]) for n in (1, 2, 3, 4))
_ONE = _scalar(1.0)
_EPSILON = _scalar(1e-6)  # of AdaIN's denominator
_ROUND_1, _ROUND_2, _ROUND_3, _ROUND_4 = (_boundaries(rounds) for rounds in (1, 2, 3, 4))
# A quarter more than the last bracket: rounding must not shut out an element at its upper end.
_BRACKET = _scalar(1.25 * (THRESHOLDS + 1.0) ** -4)
_KIND, _SCALE, _POWER = _column("kind"), _column("scale"), _column("power")
_LEVEL, _SHARPNESS = _column("quantile"), _column("sharpness")
_ADAIN, _INVERT = _column("adain_weight"), _column("invert_first_token")
_UPPER_BOUND = _column("upper_bound")
_N_AXIS, _D_AXIS = _scalar(2, np.int32), _scalar(3, np.int32)  # of q's shape


@script(DOMAIN, default_opset=op)
def Refine(x_RMT1N, low_RMT11, thresholds_J1, position_R1111):
    """Narrow the bracket of an order statistic by counting against J thresholds above `low`.

    The element of 0-based rank ⌊position⌋ is at or above the result, [R,M,T,1,1], and below the
    next threshold: a threshold passes if at most `position` elements lie under it.
    """
    thresholds_RMTJ1 = op.Add(low_RMT11, thresholds_J1)
    is_below = op.Cast(op.Less(x_RMT1N, thresholds_RMTJ1), to=1)
    count_RMTJ1 = op.ReduceSum(is_below, op.Constant(value_ints=[4]), keepdims=1)
    too_high = op.Less(position_R1111, count_RMTJ1)
    passed = op.Where(too_high, low_RMT11, thresholds_RMTJ1)
    return op.ReduceMax(passed, op.Constant(value_ints=[3]), keepdims=1)


@script(DOMAIN, default_opset=op)
def Halve(x_RMT1N, low_RMT11, half_1, position_R1111):
    """`Refine` with the one threshold `half` above `low`: the half that the statistic lies in."""
    middle_RMT11 = op.Add(low_RMT11, half_1)
    is_below = op.Cast(op.Less(x_RMT1N, middle_RMT11), to=1)
    count_RMT11 = op.ReduceSum(is_below, op.Constant(value_ints=[4]), keepdims=1)
    return op.Where(op.Less(position_R1111, count_RMT11), low_RMT11, middle_RMT11)


def _refine_by_halves():
    """`Refine` for many tokens: the same bracket, with one value per element of x, not 31.

    All thresholds are multiples of 2⁻²⁰ below 2, so the sums are exact and the results equal.
    """

    @script(DOMAIN, default_opset=op)
    def Refine(x_RMT1N, low_RMT11, thresholds_J1, position_R1111):
        unit = op.Gather(thresholds_J1, op.Constant(value_ints=[0]), axis=3)
        sixteenths = op.Mul(unit, op.Constant(value=_SIXTEEN))
        eighths = op.Mul(unit, op.Constant(value=_EIGHT))
        quarters = op.Mul(unit, op.Constant(value=_FOUR))
        halves = op.Mul(unit, op.Constant(value=_TWO))
        low_1 = Halve(x_RMT1N, low_RMT11, sixteenths, position_R1111)
        low_2 = Halve(x_RMT1N, low_1, eighths, position_R1111)
        low_3 = Halve(x_RMT1N, low_2, quarters, position_R1111)
        low_4 = Halve(x_RMT1N, low_3, halves, position_R1111)
        return Halve(x_RMT1N, low_4, unit, position_R1111)

    return Refine


@script(DOMAIN, default_opset=op)
def Quantile(x_RMTN, level_R111, last_1111):
    """Linearly interpolated quantile over N of maps with values in [0, 1]; `last` is N − 1.

    x is float32 [R,M,T,N] and level float32 [R,1,1,1] in [0, 1]; the result is [R,M,T,1]. It
    equals numpy.quantile(x, level, axis=-1): with h = level · (N − 1) and k = ⌊h⌋ it is
    x₍ₖ₎ + (h − k)(x₍ₖ₊₁₎ − x₍ₖ₎), exact where x₍ₖ₎ has no other element within 1.2·10⁻⁶ of it and
    off by less than that elsewhere. No sort and no TopK: TensorRT's TopK stops at 3840 elements.

    Peak temporary where a backend does not fuse the comparison into the sum: J values per element
    of x, 244 MB of float32 for 12 rows of 10 heads at 64 × 64 positions.
    """
    over_positions = op.Constant(value_ints=[3])
    position = op.Mul(level_R111, last_1111)
    position_5d = op.Reshape(position, op.Constant(value_ints=[0, 1, 1, 1, 1]))
    x_RMT1N = op.Reshape(x_RMTN, op.Constant(value_ints=[0, 0, 0, 1, -1]))
    low_1 = Refine(x_RMT1N, op.Constant(value=_ZERO_5D), op.Constant(value=_ROUND_1), position_5d)
    low_2 = Refine(x_RMT1N, low_1, op.Constant(value=_ROUND_2), position_5d)
    low_3 = Refine(x_RMT1N, low_2, op.Constant(value=_ROUND_3), position_5d)
    low_4 = Refine(x_RMT1N, low_3, op.Constant(value=_ROUND_4), position_5d)
    low = op.Reshape(low_4, op.Constant(value_ints=[0, 0, 0, 1]))

    # The largest element in the bracket is x₍ₖ₎ itself and the smallest beyond it x₍ₖ₊₁₎, unless
    # the bracket holds x₍ₖ₊₁₎ too: then more than k + 1 elements are not beyond it and the weight,
    # h − (number not beyond − 1), falls to 0. `last` stands for any value of at least 1.
    beyond = op.Greater(x_RMTN, op.Add(low, op.Constant(value=_BRACKET)))
    is_beyond = op.Cast(beyond, to=1)
    lower = op.ReduceMax(op.Sub(x_RMTN, is_beyond), over_positions, keepdims=1)
    upper = op.ReduceMin(op.Where(beyond, x_RMTN, last_1111), over_positions, keepdims=1)
    count = op.ReduceSum(is_beyond, over_positions, keepdims=1)
    weight = op.HardSigmoid(op.Add(op.Sub(position, last_1111), count), alpha=1.0, beta=0.0)
    return op.Add(lower, op.Mul(weight, op.Sub(upper, lower)))


@script(DOMAIN, default_opset=op)
def Normalize(x_RMTN):
    """norm(X) of Eq. 8: (X − min X) / (max X − min X) per request and token, 0 where X is flat."""
    axes = op.Constant(value_ints=[1, 3])
    minimum = op.ReduceMin(x_RMTN, axes, keepdims=1)
    extent = op.Sub(op.ReduceMax(x_RMTN, axes, keepdims=1), minimum)
    return op.Div(op.Sub(x_RMTN, minimum), op.Clip(extent, op.Constant(value_float=1e-12)))


@script(DOMAIN, default_opset=op)
def Softmask(entering_RMTN, level, sharpness, last):
    """M = norm(σ(d (norm(A) − q))) of Eq. 8, [R,M,T,N], token 0 inverted already.

    The quantile q is that of the un-normalised map and at least 1e-6, as in the authors' code.
    """
    quantile = op.Clip(Quantile(entering_RMTN, level, last), op.Constant(value_float=1e-6))
    shifted = op.Mul(sharpness, op.Sub(Normalize(entering_RMTN), quantile))
    return Normalize(op.Sigmoid(shifted))


@script(DOMAIN, default_opset=op)
def AdaptTokens(x_RMTN, a_RMTN, blend, mean_a, epsilon):
    """w x + (1 − w) AdaIN(x, a) of Eq. 10 over the T tokens, given `blend` = 1 − w.

    AdaIN(x, a) = (x − mean x) · std a / (std x + 1e-6) + mean a with the unbiased std. The common
    factor √(T − 1) is cancelled, so `epsilon` is 1e-6 · √(T − 1).
    """
    axis = op.Constant(value_ints=[2])
    centred = op.Sub(x_RMTN, op.ReduceMean(x_RMTN, axis, keepdims=1))
    norm_a = op.ReduceL2(op.Sub(a_RMTN, mean_a), axis, keepdims=1)
    norm_x = op.ReduceL2(centred, axis, keepdims=1)
    gain = op.Div(norm_a, op.Add(norm_x, epsilon))
    matched = op.Add(op.Mul(gain, centred), mean_a)
    return op.Add(x_RMTN, op.Mul(blend, op.Sub(matched, x_RMTN)))


@script(DOMAIN, default_opset=op)
def AdaptTokensThere(x_RMTN, a_RMTN, blend, there_RMT1):
    """`AdaptTokens` over the tokens that are there (1, else 0); 0 for those that are not."""
    axis = op.Constant(value_ints=[2])
    count = op.ReduceSum(there_RMT1, axis, keepdims=1)
    mean_a = op.Reciprocal(count)  # of a softmax over them
    mean_x = op.Div(op.ReduceSum(op.Mul(x_RMTN, there_RMT1), axis, keepdims=1), count)
    centred = op.Mul(op.Sub(x_RMTN, mean_x), there_RMT1)
    norm_a = op.ReduceL2(op.Mul(op.Sub(a_RMTN, mean_a), there_RMT1), axis, keepdims=1)
    root = op.Sqrt(op.Sub(count, op.Constant(value=_ONE)))
    epsilon = op.Mul(root, op.Constant(value=_EPSILON))
    gain = op.Div(norm_a, op.Add(op.ReduceL2(centred, axis, keepdims=1), epsilon))
    matched = op.Add(op.Mul(gain, centred), mean_a)
    blended = op.Add(x_RMTN, op.Mul(blend, op.Sub(matched, x_RMTN)))
    return op.Mul(blended, there_RMT1)


@script(DOMAIN, default_opset=op)
def Deviation(x_RMTN, covariance_RMTT):
    """Unbiased std over D of xᵀ V', [R,M,1,N], as √(xᵀ C x) with C the covariance of V'."""
    squares = op.Mul(x_RMTN, op.MatMul(covariance_RMTT, x_RMTN))
    # Rounding may leave a tiny negative variance.
    return op.Sqrt(op.Relu(op.ReduceSum(squares, op.Constant(value_ints=[2]), keepdims=1)))


@script(DOMAIN, default_opset=op)
def AdaptOutput(f_RMTN, a_RMTN, v_RMTD, blend, freedom, ip_scale):
    """λ (w h + (1 − w) AdaIN(h, h₀)) of Eq. 10 over D, h = fᵀ V', h₀ = aᵀ V', as [R,M,N,D].

    `blend` is 1 − w, `freedom` D − 1 and `ip_scale` λ. All statistics of h and h₀ follow from the
    T × T covariance of V', so that [N,D] values are written once: with V' = C + mean V' it is
    λ ((f + (1 − w)(a − f))ᵀ V' + (1 − w)(g f − a)ᵀ C), g = std h₀ / (std h + 1e-6).
    """
    centred_RMTD = op.Sub(v_RMTD, op.ReduceMean(v_RMTD, op.Constant(value_ints=[3]), keepdims=1))
    product_RMTT = op.MatMul(centred_RMTD, op.Transpose(centred_RMTD, perm=[0, 1, 3, 2]))
    covariance = op.Div(product_RMTT, freedom)
    std_f = op.Add(Deviation(f_RMTN, covariance), op.Constant(value=_EPSILON))
    gain = op.Div(Deviation(a_RMTN, covariance), std_f)
    plain = op.Add(f_RMTN, op.Mul(blend, op.Sub(a_RMTN, f_RMTN)))
    matched = op.Mul(blend, op.Sub(op.Mul(gain, f_RMTN), a_RMTN))
    weights = op.Transpose(op.Concat(plain, matched, axis=2), perm=[0, 1, 3, 2])
    return op.MatMul(weights, op.Mul(ip_scale, op.Concat(v_RMTD, centred_RMTD, axis=2)))


def decoupled_attention_function(tokens: int) -> OnnxFunction:
    """`DecoupledAttention` for T = `tokens` image tokens."""
    first_token = _tensor(np.eye(1, tokens).reshape(1, 1, tokens, 1))
    mean_weight = _scalar(1.0 / tokens)  # of a softmax over the tokens
    epsilon = _scalar(1e-6 * max(tokens - 1, 1) ** 0.5)

    @script(DOMAIN, default_opset=op)
    def DecoupledAttention(q_BHND, k_BHTD, v_BHTD, manipulation_RP, ip_scale_R):
        """λ · f(A) V' of Eq. 6 with A = softmax(Q K'ᵀ / √D), result [B,H,N,D] in the dtype of q.

        manipulation is float32 [R, columns] and ip_scale (λ) float32 [R], one row per request; the
        columns are those of `fastface_trt.engines.contract`. The map and its statistics are float32
        whatever q is: with few tokens that costs nothing beside the text attention. Beside the
        peak of `Quantile`, one float32 copy of the result is the largest temporary.
        """
        sizes = op.Shape(q_BHND)
        lengths = op.Cast(sizes, to=1)
        width = op.Gather(lengths, op.Constant(value=_D_AXIS))
        one = op.Constant(value=_ONE)
        last = op.Sub(op.Gather(lengths, op.Constant(value=_N_AXIS)), one)
        freedom = op.Sub(width, one)

        kind = op.Gather(manipulation_RP, op.Constant(value=_KIND), axis=1)
        scale = op.Gather(manipulation_RP, op.Constant(value=_SCALE), axis=1)
        power = op.Gather(manipulation_RP, op.Constant(value=_POWER), axis=1)
        level = op.Gather(manipulation_RP, op.Constant(value=_LEVEL), axis=1)
        sharpness = op.Gather(manipulation_RP, op.Constant(value=_SHARPNESS), axis=1)
        adain_weight = op.Gather(manipulation_RP, op.Constant(value=_ADAIN), axis=1)
        invert = op.Gather(manipulation_RP, op.Constant(value=_INVERT), axis=1)
        upper_bound = op.Gather(manipulation_RP, op.Constant(value=_UPPER_BOUND), axis=1)
        # HardSigmoid is clip(α x + β, 0, 1): 1 for kind 2, and 1 − w.
        softmask = op.HardSigmoid(kind, alpha=1.0, beta=-1.0)
        is_softmask = op.Cast(softmask, to=9)
        is_manipulated = op.Cast(kind, to=9)
        blend = op.Mul(softmask, op.HardSigmoid(adain_weight, alpha=-1.0, beta=1.0))
        inverted = op.Mul(op.Mul(softmask, invert), op.Constant(value=first_token))

        # The scale goes onto the smaller factor before the product: fp16 logits stay small.
        scaled_k = op.Div(k_BHTD, op.CastLike(op.Sqrt(width), k_BHTD))
        logits = op.MatMul(scaled_k, op.Transpose(q_BHND, perm=[0, 1, 3, 2]))
        a_BHTN = op.Softmax(op.Cast(logits, to=1), axis=2)
        by_request = op.Concat(op.Shape(ip_scale_R), op.Constant(value_ints=[-1, 0, 0]), axis=0)
        a = op.Reshape(a_BHTN, by_request)
        v = op.Cast(op.Reshape(v_BHTD, by_request), to=1)

        # |i − x| is 1 − x, or peak − x, for inverted tokens of maps in [0, peak], x for the others.
        entering = op.Abs(op.Sub(inverted, a))
        mask = Softmask(entering, level, sharpness, last)
        raised = op.Where(is_softmask, mask, op.Pow(a, power))
        bounded = op.Min(op.Mul(scale, raised), upper_bound)  # Eq. 7 and 9
        peak = op.ReduceMax(bounded, op.Constant(value_ints=[3]), keepdims=1)
        leaving = op.Abs(op.Sub(op.Mul(inverted, peak), bounded))
        adapted = AdaptTokens(
            leaving, a, blend, op.Constant(value=mean_weight), op.Constant(value=epsilon)
        )
        f = op.Where(is_manipulated, adapted, a)

        ip_scale = op.Reshape(ip_scale_R, op.Constant(value_ints=[-1, 1, 1, 1]))
        hidden = AdaptOutput(f, a, v, blend, freedom, ip_scale)
        return op.Reshape(op.CastLike(hidden, q_BHND), sizes)

    return DecoupledAttention


def masked_attention_function(tokens: int) -> OnnxFunction:
    """`DecoupledAttention` for up to T = `tokens` image tokens, which a mask says are there."""
    first_token = _tensor(np.eye(1, tokens).reshape(1, 1, tokens, 1))

    @script(DOMAIN, default_opset=op)
    def DecoupledAttention(q_BHND, k_BHTD, v_BHTD, manipulation_RP, ip_scale_R, token_mask_BT):
        """`DecoupledAttention` over the tokens that are there, as if there were no others.

        token_mask is float32 [B,T], see `fastface_trt.engines.contract`.
        """
        sizes = op.Shape(q_BHND)
        lengths = op.Cast(sizes, to=1)
        width = op.Gather(lengths, op.Constant(value=_D_AXIS))
        one = op.Constant(value=_ONE)
        last = op.Sub(op.Gather(lengths, op.Constant(value=_N_AXIS)), one)
        freedom = op.Sub(width, one)

        kind = op.Gather(manipulation_RP, op.Constant(value=_KIND), axis=1)
        scale = op.Gather(manipulation_RP, op.Constant(value=_SCALE), axis=1)
        power = op.Gather(manipulation_RP, op.Constant(value=_POWER), axis=1)
        level = op.Gather(manipulation_RP, op.Constant(value=_LEVEL), axis=1)
        sharpness = op.Gather(manipulation_RP, op.Constant(value=_SHARPNESS), axis=1)
        adain_weight = op.Gather(manipulation_RP, op.Constant(value=_ADAIN), axis=1)
        invert = op.Gather(manipulation_RP, op.Constant(value=_INVERT), axis=1)
        upper_bound = op.Gather(manipulation_RP, op.Constant(value=_UPPER_BOUND), axis=1)
        # HardSigmoid is clip(α x + β, 0, 1): 1 for kind 2, and 1 − w.
        softmask = op.HardSigmoid(kind, alpha=1.0, beta=-1.0)
        is_softmask = op.Cast(softmask, to=9)
        is_manipulated = op.Cast(kind, to=9)
        blend = op.Mul(softmask, op.HardSigmoid(adain_weight, alpha=-1.0, beta=1.0))
        inverted = op.Mul(op.Mul(softmask, invert), op.Constant(value=first_token))

        # The scale goes onto the smaller factor before the product: fp16 logits stay small.
        scaled_k = op.Div(k_BHTD, op.CastLike(op.Sqrt(width), k_BHTD))
        logits = op.MatMul(scaled_k, op.Transpose(q_BHND, perm=[0, 1, 3, 2]))
        mask_B1T1 = op.Unsqueeze(token_mask_BT, op.Constant(value_ints=[1, 3]))
        a_BHTN = op.Softmax(op.Add(op.Cast(logits, to=1), mask_B1T1), axis=2)
        by_request = op.Concat(op.Shape(ip_scale_R), op.Constant(value_ints=[-1, 0, 0]), axis=0)
        a = op.Reshape(a_BHTN, by_request)
        one_row = op.Constant(value_ints=[1])
        by_head = op.Concat(one_row, op.Gather(sizes, one_row), one_row, one_row, axis=0)
        there = op.Reshape(op.Expand(op.Exp(mask_B1T1), by_head), by_request)
        v = op.Cast(op.Reshape(v_BHTD, by_request), to=1)

        # |i − x| is 1 − x, or peak − x, for inverted tokens of maps in [0, peak], x for the others.
        entering = op.Abs(op.Sub(inverted, a))
        softmask_of_a = Softmask(entering, level, sharpness, last)
        raised = op.Where(is_softmask, softmask_of_a, op.Pow(a, power))
        bounded = op.Min(op.Mul(scale, raised), upper_bound)  # Eq. 7 and 9
        peak = op.ReduceMax(bounded, op.Constant(value_ints=[3]), keepdims=1)
        leaving = op.Abs(op.Sub(op.Mul(inverted, peak), bounded))
        adapted = AdaptTokensThere(leaving, a, blend, there)
        f = op.Where(is_manipulated, adapted, a)

        ip_scale = op.Reshape(ip_scale_R, op.Constant(value_ints=[-1, 1, 1, 1]))
        hidden = AdaptOutput(f, a, v, blend, freedom, ip_scale)
        return op.Reshape(op.CastLike(hidden, q_BHND), sizes)

    return DecoupledAttention


def attention_functions(tokens: int, *, masked: bool = False) -> tuple[OnnxFunction, ...]:
    """Every function of the domain for T = `tokens` image tokens, callees before callers.

    With `masked` the node has a sixth input, which says which of the tokens are there.
    """
    refine = (Refine,) if tokens <= FEW_TOKENS else (Halve, _refine_by_halves())
    shared = (*refine, Quantile, Normalize, Softmask)
    if masked:
        adapt, attention = AdaptTokensThere, masked_attention_function(tokens)
    else:
        adapt, attention = AdaptTokens, decoupled_attention_function(tokens)
    return (*shared, adapt, Deviation, AdaptOutput, attention)
