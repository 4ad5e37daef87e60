"""A tensor of an ONNX module in float64: the judge when two backends disagree.

ONNX Runtime has no float64 kernels for convolution and instance normalisation, so the nodes run in
onnx's own reference implementation (numpy), convolutions in PyTorch. One node at a time: a weight
is converted when its node runs and dropped afterwards, an intermediate tensor after its last use.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import onnx
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from fastface_trt.export.marked_outputs import MarkableModule

Array = NDArray[Any]

_FLOATS: Final = (
    ir.DataType.FLOAT,
    ir.DataType.FLOAT16,
    ir.DataType.BFLOAT16,
)
_FLOAT32_INPUTS: Final = {"Resize": (1, 2), "QuantizeLinear": (0, 1), "DequantizeLinear": (1,)}
"""Inputs that ONNX does not define for float64: sizes of Resize, and what 8 bits mean."""


class Conv(OpRun):  # type: ignore[misc]
    """ONNX Conv in float64 by PyTorch; the reference implementation's needs minutes and gigabytes.

    Explicit pads only, equal at both ends of an axis, which is what the exporter writes.
    """

    op_domain = ""

    def _run(
        self,
        x: Array,
        weight: Array,
        bias: Array | None = None,
        auto_pad: Any = None,
        dilations: Any = None,
        group: int | None = None,
        kernel_shape: Any = None,
        pads: Any = None,
        strides: Any = None,
    ) -> tuple[Array]:
        axes = x.ndim - 2
        begin, end = (list(pads or [0] * (2 * axes))[at : at + axes] for at in (0, axes))
        if begin != end or (auto_pad or "NOTSET") not in ("NOTSET", "VALID"):
            raise ValueError(f"Conv with pads {pads} and auto_pad {auto_pad}")
        result = torch.convolution(
            torch.from_numpy(np.ascontiguousarray(x)),
            torch.from_numpy(np.ascontiguousarray(weight)),
            None if bias is None else torch.from_numpy(np.ascontiguousarray(bias)),
            strides or [1] * axes,
            begin,
            dilations or [1] * axes,
            False,
            [0] * axes,
            group or 1,
        )
        return (result.numpy(),)


def evaluate_float64(marked: MarkableModule, name: str, inputs: Mapping[str, Array]) -> Array:
    """Tensor `name` of a module that was read with `inline=True`, computed in float64.

    `inputs` are the module's by name, in its own types; floating-point ones are widened. Raises
    `ValueError` for a module whose calls were not opened.
    """
    if marked.model.functions:
        raise ValueError("read the module with inline=True")
    nodes = list(marked.nodes_above(name))
    uses = Counter(v.name for node in nodes for v in node.inputs if v is not None)
    uses[name] += 1
    opsets = [helper.make_opsetid(d, v) for d, v in marked.model.opset_imports.items()]
    known: dict[str, Array] = {key: _wide(np.asarray(array)) for key, array in inputs.items()}
    with torch.inference_mode():
        for node in nodes:
            feeds = [_feed(value, known) for value in node.inputs]
            results = _run(node, feeds, opsets)
            for value, result in zip(node.outputs, results, strict=True):
                if uses[value.name]:
                    known[value.name or ""] = result
            for value in node.inputs:
                if value is None:
                    continue
                uses[value.name] -= 1
                if not uses[value.name]:
                    known.pop(value.name or "", None)
    return known[name]


def _feed(value: ir.Value | None, known: Mapping[str, Array]) -> Array | None:
    if value is None:
        return None
    if value.name in known:
        return known[value.name]
    assert value.const_value is not None  # an input, a weight, or the result of an earlier node
    return _wide(value.const_value.numpy())


def _run(node: ir.Node, feeds: list[Array | None], opsets: list[Any]) -> list[Array]:
    """One node on arrays, float64 in and out."""
    narrow = _FLOAT32_INPUTS.get(node.op_type, ())
    ready = {
        f"x{at}": array.astype(np.float32) if at in narrow and array.dtype.kind == "f" else array
        for at, array in enumerate(feeds)
        if array is not None
    }
    proto = helper.make_node(
        node.op_type,
        ["" if array is None else f"x{at}" for at, array in enumerate(feeds)],
        [f"y{at}" for at in range(len(node.outputs))],
        domain=node.domain,
    )
    proto.attribute.extend(_wide_attribute(ir.to_proto(a)) for a in node.attributes.values())
    graph = helper.make_graph(
        [proto],
        "node",
        [
            helper.make_tensor_value_info(key, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
            for key, a in ready.items()
        ],
        [helper.make_empty_tensor_value_info(output) for output in proto.output],
    )
    model = helper.make_model(graph, opset_imports=opsets)
    results = ReferenceEvaluator(model, new_ops=[Conv]).run(None, ready)
    return [_wide(np.asarray(result)) for result in results]


def _wide_attribute(attribute: Any) -> Any:
    """The attribute with every float type and float tensor turned into float64."""
    if attribute.name in ("to", "dtype", "output_dtype"):
        if attribute.i in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16):
            attribute.i = TensorProto.DOUBLE
    elif attribute.name in ("value_float", "value_floats"):
        values = np.float64(attribute.f if attribute.name == "value_float" else attribute.floats)
        return helper.make_attribute("value", numpy_helper.from_array(np.asarray(values)))
    elif attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type in _FLOATS:
        wide = numpy_helper.to_array(attribute.t).astype(np.float64)
        attribute.t.CopyFrom(numpy_helper.from_array(wide, attribute.t.name))
    return attribute


def _wide(array: Array) -> Array:
    is_float = array.dtype.kind == "f" or array.dtype.name == "bfloat16"
    return array.astype(np.float64) if is_float else array
