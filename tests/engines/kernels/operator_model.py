"""Sessions of one node `fastface.kernels::DecoupledAttention` on ONNX Runtime's CPU provider."""

import numpy as np
import onnxruntime
from onnx import TensorProto, helper

from fastface_trt.engines.contract import FUNCTION_NAME, KERNEL_DOMAIN
from tests.engines.kernels.emulated import heads_inside
from tests.export.reference import decoupled_attention as reference

TYPES = {"float16": TensorProto.FLOAT16, "float32": TensorProto.FLOAT}


def model(dtype="float16", base=False, heads=2, width=None, mask=False, **attributes):
    """Sizes have names, so that shape inference has something to carry on; `width` is H·D."""
    half, single = TYPES[np.dtype(dtype).name], TensorProto.FLOAT
    inputs = {
        "q": (half, ["rows", "positions", width or "width"]),
        "k": (half, ["rows", None, width or "width"]),
        "v": (half, ["rows", None, width or "width"]),
        "manipulation": (single, ["requests", None]),
        "ip_scale": (single, ["requests"]),
    }
    if base:
        inputs["base"] = (half, ["rows", None, None])
    if mask:
        inputs["token_mask"] = (single, ["rows", None])
    values = [helper.make_tensor_value_info(name, *one) for name, one in inputs.items()]
    attributes = attributes or {"num_heads": heads}
    names = [*inputs]
    if mask and not base:
        names.insert(5, "")
    node = helper.make_node(FUNCTION_NAME, names, ["made"], domain=KERNEL_DOMAIN, **attributes)
    last = helper.make_node("Identity", ["made"], ["out"])
    output = helper.make_tensor_value_info("out", half, None)
    graph = helper.make_graph([node, last], "g", values, [output])
    imports = [helper.make_opsetid("", 17), helper.make_opsetid(KERNEL_DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=9)


def session(library, *arguments, **keywords):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library))
    made = model(*arguments, **keywords).SerializeToString()
    return onnxruntime.InferenceSession(made, options, providers=["CPUExecutionProvider"])


def feeds(q, k, v, manipulation, ip_scale, base=None, mask=None):
    """Inputs of a session from [B,H,N,D] tensors."""
    given = {name: heads_inside(x) for name, x in (("q", q), ("k", k), ("v", v))}
    given["manipulation"] = np.asarray(manipulation, np.float32)
    given["ip_scale"] = np.asarray(ip_scale, np.float32)
    given |= {} if base is None else {"base": heads_inside(base)}
    return given if mask is None else {**given, "token_mask": mask}


def expected(q, k, v, settings, ip_scale, base=None):
    """[B,N,H·D] in float64; a tuple of settings has one for every request."""
    each = len(q) // len(settings)
    parts = [slice(each * i, each * (i + 1)) for i in range(len(settings))]
    made = [
        reference(q[at], k[at], v[at], ip_scale=np.float32(scale), **one)
        for at, one, scale in zip(parts, settings, ip_scale, strict=True)
    ]
    whole = np.concatenate(made) + (0 if base is None else base.astype(np.float64))
    return heads_inside(whole)
