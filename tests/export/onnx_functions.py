"""ONNX models around single functions of the fastface domain, for running them by themselves."""

import numpy as np
import onnxruntime
from onnx import TensorProto, helper

from fastface_trt.engines.contract import FUNCTION_DOMAIN
from fastface_trt.export.functions import OPSET, attention_functions


def session(function, inputs, output, dtype=TensorProto.FLOAT, typed=(), tokens=4, masked=False):
    """A session of one call; `inputs` maps names to ranks, `typed` names inputs of `dtype`."""

    def value(name, rank):
        kind = dtype if name in typed else TensorProto.FLOAT
        return helper.make_tensor_value_info(name, kind, [None] * rank)

    node = helper.make_node(function, list(inputs), ["out"], domain=FUNCTION_DOMAIN)
    out = helper.make_tensor_value_info(
        "out", dtype if typed else TensorProto.FLOAT, [None] * output
    )
    graph = helper.make_graph([node], "g", [value(n, r) for n, r in inputs.items()], [out])
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(FUNCTION_DOMAIN, 1)],
        functions=[f.to_function_proto() for f in attention_functions(tokens, masked=masked)],
        ir_version=10,
    )
    return onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )


class DecoupledAttention:
    """The exported function of one block, called with numpy arrays."""

    def __init__(self, dtype=np.float32, tokens=4, masked=False):
        kind = TensorProto.FLOAT16 if dtype == np.float16 else TensorProto.FLOAT
        ranks = {"q": 4, "k": 4, "v": 4, "manipulation": 2, "ip_scale": 1}
        ranks |= {"token_mask": 2} if masked else {}
        typed = ("q", "k", "v")
        self._session = session("DecoupledAttention", ranks, 4, kind, typed, tokens, masked)

    def __call__(self, q, k, v, manipulation, ip_scale, *token_mask):
        feeds = {
            "q": q,
            "k": k,
            "v": v,
            "manipulation": np.float32(manipulation),
            "ip_scale": np.float32(ip_scale),
        } | dict(zip(("token_mask",), token_mask, strict=False))
        return self._session.run(None, feeds)[0]
