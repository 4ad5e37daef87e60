"""Explicit quantisation written into an exported graph, in the form that TensorRT reads.

A layer y = x W becomes y = DQ(Q(x)) · DQ(W₈). Codes are symmetric without zero points; an input has
one scale, a weight one scale (fp8) or one per output channel (int8). Weights are stored as codes,
so the file halves. Scales have the compute type: in a strongly typed network the type of a scale is
the type that DequantizeLinear returns. Codes are computed with the scale as it is stored, so its
rounding costs nothing. With SmoothQuant x is first multiplied by a factor per channel, and W
divided by it.

The attention softmax(Q Kᵀ / √D) V of a block takes its scaled queries, turned keys, softmax and
values as DQ(Q(x)) next to its two products, where TensorRT's fused fp8 attention looks for them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from fastface_trt.engines.onnx.file import MODULE_KEY
from fastface_trt.export.precision import QuantizedFormat
from fastface_trt.export.quantization.ranges import AttentionRange, LayerRange

LARGEST: Mapping[QuantizedFormat, float] = {"fp8": 448.0, "int8": 127.0}
_CODES: dict[QuantizedFormat, type] = {"fp8": ml_dtypes.float8_e4m3fn, "int8": np.int8}
_LAYERS = ("MatMul", "Gemm", "Conv")

Floats = NDArray[np.floating]
Codes = NDArray[np.generic]


@dataclass(frozen=True)
class QuantizationPlan:
    """The ranges of the layers and attentions to quantise, by PyTorch name below `root`."""

    form: QuantizedFormat
    ranges: Mapping[str, LayerRange]
    attention: Mapping[str, AttentionRange] = field(default_factory=dict)
    root: str = "unet"


def scale_of(amax: Floats | float, form: QuantizedFormat, dtype: np.dtype) -> Floats:
    """amax / largest code in `dtype`; 1 for a range of nothing, and never rounded to 0."""
    exact = np.asarray(amax, dtype=np.float64) / LARGEST[form]
    smallest = float(np.finfo(dtype).smallest_subnormal)
    return np.where(exact == 0, 1.0, np.maximum(exact, smallest)).astype(dtype)


def encode(values: Floats, scale: Floats, form: QuantizedFormat) -> Codes:
    """Round to nearest even and saturate, as QuantizeLinear does; `scale` broadcasts."""
    limit = LARGEST[form]
    ratio = np.clip(values.astype(np.float32) / scale.astype(np.float32), -limit, limit)
    return (np.rint(ratio) if form == "int8" else ratio).astype(_CODES[form])


def quantize_graph(model: ir.Model, plan: QuantizationPlan) -> None:
    """Quantise the layers and attentions of `plan` in `model`, in place.

    Raises `LookupError` when one of the plan is not in the graph exactly once.
    """
    writer = _Writer(model, plan.form)
    found: set[str] = set()

    def first(name: str) -> None:
        if name in found:
            raise LookupError(f"{name} is more than once in the graph.")
        found.add(name)

    for node in list(model.graph):
        name = _layer_name(node, plan.root)
        if name is not None and name in plan.ranges:
            first(name)
            writer.quantize(node, name, plan.ranges[name])
        attention = _attention_name(node, plan.root)
        if attention is not None and attention in plan.attention:
            first(attention)
            writer.quantize_attention(node, attention, plan.attention[attention])
    missing = plan.ranges.keys() | plan.attention.keys()
    missing -= found
    if missing:
        raise LookupError(f"Not in the graph: {', '.join(sorted(missing)[:5])}.")
    writer.drop_unused_weights()


def _layer_name(node: ir.Node, root: str) -> str | None:
    """The PyTorch name of the layer whose product this node is."""
    if node.op_type not in _LAYERS or node.inputs[1] is None:
        return None
    if node.inputs[1].const_value is None:
        return None  # a product of two activations
    return _below(root, node)


def _attention_name(node: ir.Node, root: str) -> str | None:
    """The PyTorch name of the attention whose first product this node is: (scaled Q) Kᵀ."""
    if node.op_type != "MatMul":
        return None
    q, users = node.inputs[0], list(node.outputs[0].uses())
    scaled = q is not None and q.producer() is not None and q.producer().op_type == "Mul"
    if not scaled or len(users) != 1 or users[0].node.op_type != "Softmax":
        return None
    return _below(root, node)


def _below(root: str, node: ir.Node) -> str | None:
    module = node.metadata_props.get(MODULE_KEY, "")
    return module.removeprefix(f"{root}.") if module.startswith(f"{root}.") else None


class _Writer:
    """Adds the nodes and initialisers to one model."""

    def __init__(self, model: ir.Model, form: QuantizedFormat) -> None:
        self._model = model
        self._form: QuantizedFormat = form
        self._shared: dict[tuple[str, float], ir.Value] = {}
        self._replaced: list[ir.Value] = []
        # Without a zero point QuantizeLinear would return uint8.
        self._zero = self._initializer("quantization.zero", np.zeros((), _CODES[form]))

    def quantize(self, node: ir.Node, name: str, ranges: LayerRange) -> None:
        x, weight = node.inputs[0], node.inputs[1]
        assert x is not None
        assert weight is not None
        assert weight.const_value is not None
        values = weight.const_value.numpy()
        dtype = values.dtype
        inputs, outputs = _axes(node)
        if ranges.smoothing is not None:
            factors = ranges.smoothing.astype(dtype)
            x = self._node(node, "Mul", [x, self._initializer(f"{name}.smoothing", factors)], x)
            values = values.astype(np.float32) / _along(factors, inputs, values.ndim)
        scale = scale_of(ranges.input_amax, self._form, dtype)
        node.replace_input_with(0, self._input(node, f"{name}.input", x, scale))
        node.replace_input_with(1, self._weight(node, name, weight, values, outputs, dtype))
        self._replaced.append(weight)

    def quantize_attention(self, scores: ir.Node, name: str, ranges: AttentionRange) -> None:
        softmax = next(iter(scores.outputs[0].uses())).node
        (use,) = softmax.outputs[0].uses()
        for node, at, part, amax in (
            (scores, 0, "q", ranges.q_amax),
            (scores, 1, "k", ranges.k_amax),
            (use.node, 0, "softmax", 1.0),  # no more than 1 by its meaning, so not measured
            (use.node, 1, "v", ranges.v_amax),
        ):
            x = node.inputs[at]
            assert x is not None
            assert softmax.outputs[0].dtype is not None
            scale = scale_of(amax, self._form, softmax.outputs[0].dtype.numpy())
            node.replace_input_with(at, self._input(node, f"{name}.{part}", x, scale))

    def _input(self, node: ir.Node, name: str, x: ir.Value, scale: Floats) -> ir.Value:
        """DQ(Q(x)); layers with the same input and range (q, k and v) share it."""
        key = (str(x.name), float(scale))
        if key not in self._shared:
            held = self._initializer(f"{name}_scale", scale)
            codes = self._node(node, "QuantizeLinear", [x, held, self._zero], x)
            codes.type = self._zero.type
            self._shared[key] = self._node(node, "DequantizeLinear", [codes, held, self._zero], x)
        return self._shared[key]

    def _weight(
        self,
        node: ir.Node,
        name: str,
        weight: ir.Value,
        values: Floats,
        outputs: int,
        dtype: np.dtype,
    ) -> ir.Value:
        """DQ of the codes that are stored instead of `weight`."""
        per_channel = self._form == "int8"
        others = tuple(axis for axis in range(values.ndim) if axis != outputs)
        amax = np.abs(values).max(axis=others if per_channel else None)
        scale = scale_of(amax, self._form, dtype)
        codes = encode(
            values, _along(scale, outputs, values.ndim) if per_channel else scale, self._form
        )
        stored = self._initializer(f"{weight.name}.codes", codes)
        held = self._initializer(f"{name}.weight_scale", scale)
        attributes = {"axis": outputs} if per_channel else {}
        return self._node(node, "DequantizeLinear", [stored, held], weight, attributes)

    def drop_unused_weights(self) -> None:
        """Remove the weights whose codes are stored now."""
        for weight in self._replaced:
            if not weight.uses():
                del self._model.graph.initializers[str(weight.name)]

    def _initializer(self, name: str, array: Codes | Floats) -> ir.Value:
        tensor = ir.tensor(array, name=name)
        value = ir.Value(
            name=name,
            shape=tensor.shape,
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self._model.graph.initializers[name] = value
        return value

    def _node(
        self,
        before: ir.Node,
        op: str,
        inputs: list[ir.Value],
        like: ir.Value,
        attributes: Mapping[str, int] | None = None,
    ) -> ir.Value:
        """A node ahead of `before`, from the same PyTorch module; its output looks like `like`."""
        suffix = {"Mul": "smoothed", "QuantizeLinear": "q", "DequantizeLinear": "dq"}[op]
        node = ir.node(op, inputs, attributes or {}, num_outputs=1)
        node.name = f"{inputs[0].name}.{suffix}.{before.name}"
        node.metadata_props[MODULE_KEY] = before.metadata_props[MODULE_KEY]
        output = node.outputs[0]
        output.name = f"{node.name}.output"
        output.shape, output.type = like.shape, like.type
        self._model.graph.insert_before(before, [node])
        return output


def _axes(node: ir.Node) -> tuple[int, int]:
    """The input-channel and output-channel axes of a layer's weight."""
    transposed = node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1
    return (1, 0) if node.op_type == "Conv" or transposed else (0, 1)


def _along(vector: Floats, axis: int, rank: int) -> Floats:
    shape = [1] * rank
    shape[axis] = -1
    return vector.astype(np.float32).reshape(shape)
