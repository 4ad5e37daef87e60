"""ONNX Runtime's CUDA-only operators in plain ONNX, after its documentation of them.

So a CUDA form runs on a CPU: ContribOperators.md says what each operator computes. The operator of
the project's own kernels becomes a call of the exported function, which has tests of its own.
"""

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper

from fastface_trt.engines.contract import (
    FUNCTION_DOMAIN,
    FUNCTION_NAME,
    KERNEL_DOMAIN,
    KINDS,
    MANIPULATION_COLUMNS,
)

FIRST, LAST = (0, 3, 1, 2), (0, 2, 3, 1)


class _Plain:
    def __init__(self, model):
        self.model = model
        self.nodes = []

    def add(self, op, inputs, output, domain="", **attributes):
        self.nodes.append(helper.make_node(op, inputs, [output], domain=domain, **attributes))
        return output

    def constant(self, name, values, dtype):
        self.model.graph.initializer.append(
            numpy_helper.from_array(np.asarray(values, dtype), name)
        )
        return name

    def nhwc_conv(self, node, attributes):
        x, weight, *bias = node.input
        out = node.output[0]
        x = self.add("Transpose", [x], f"{out}_x", perm=FIRST)
        weight = self.add("Transpose", [weight], f"{out}_w", perm=FIRST)
        y = self.add("Conv", [x, weight, *bias], f"{out}_y", **attributes)
        self.add("Transpose", [y], out, perm=LAST)

    def group_norm(self, node, attributes):
        """Statistics in float32 over positions and the channels of a group; then SiLU."""
        assert attributes["channels_last"] == 1
        x, gamma, beta = node.input
        out = node.output[0]
        wide = self.add("Cast", [x], f"{out}_wide", to=onnx.TensorProto.FLOAT)
        first = self.add("Transpose", [wide], f"{out}_first", perm=FIRST)
        sizes = self.constant(f"{out}_sizes", [0, attributes["groups"], -1], np.int64)
        grouped = self.add("Reshape", [first, sizes], f"{out}_grouped")
        axis = self.constant(f"{out}_axis", [2], np.int64)
        mean = self.add("ReduceMean", [grouped, axis], f"{out}_mean")
        centred = self.add("Sub", [grouped, mean], f"{out}_centred")
        square = self.add("Mul", [centred, centred], f"{out}_square")
        variance = self.add("ReduceMean", [square, axis], f"{out}_variance")
        epsilon = self.constant(f"{out}_epsilon", attributes["epsilon"], np.float32)
        deviation = self.add(
            "Sqrt", [self.add("Add", [variance, epsilon], f"{out}_sum")], f"{out}_deviation"
        )
        normed = self.add("Div", [centred, deviation], f"{out}_normed")
        shape = self.add("Shape", [first], f"{out}_shape")
        y = self.add("Reshape", [normed, shape], f"{out}_restored")
        y = self.add("Transpose", [y], f"{out}_last", perm=LAST)
        y = self.add("Add", [self.add("Mul", [y, gamma], f"{out}_scaled"), beta], f"{out}_affine")
        if attributes["activation"] == 1:
            y = self.add("Mul", [y, self.add("Sigmoid", [y], f"{out}_gate")], f"{out}_silu")
        self.add("CastLike", [y, x], out)

    def bias_split_gelu(self, node, attributes):
        x, bias = node.input
        out = node.output[0]
        y = self.add("Add", [x, bias], f"{out}_biased")
        halves = [f"{out}_left", f"{out}_right"]
        self.nodes.append(helper.make_node("Split", [y], halves, axis=2, num_outputs=2))
        self.add("Mul", [halves[0], self.add("Gelu", [halves[1]], f"{out}_gelu")], out)

    def bias_add(self, node, attributes):
        x, bias, residual = node.input
        out = node.output[0]
        self.add("Add", [self.add("Add", [x, bias], f"{out}_biased"), residual], out)

    def decoupled_attention(self, node, attributes):
        out, tensors = node.output[0], []
        sizes = self.constant(f"{out}_heads", [0, 0, attributes["num_heads"], -1], np.int64)
        for name, tensor in zip("qkv", node.input[:3], strict=True):
            apart = self.add("Reshape", [tensor, sizes], f"{out}_{name}_apart")
            tensors.append(self.add("Transpose", [apart], f"{out}_{name}", perm=(0, 2, 1, 3)))
        y = self.add(FUNCTION_NAME, [*tensors, *node.input[3:5]], f"{out}_by_head", FUNCTION_DOMAIN)
        y = self.add("Transpose", [y], f"{out}_back", perm=(0, 2, 1, 3))
        merged = self.constant(f"{out}_sizes", [0, 0, -1], np.int64)
        if len(node.input) == 5:
            self.add("Reshape", [y, merged], out)
        else:
            y = self.add("Reshape", [y, merged], f"{out}_merged")
            self.add("Add", [node.input[5], y], out)


OPERATORS = {
    "NhwcConv": _Plain.nhwc_conv,
    "GroupNorm": _Plain.group_norm,
    "BiasSplitGelu": _Plain.bias_split_gelu,
    "BiasAdd": _Plain.bias_add,
}


def spelled_out(form, functions=()):
    """The bytes of a form without operators that a CPU lacks.

    `functions` are the export's; without them the custom operator stays, whose library is needed.
    """
    model = onnx.load_from_string(form)
    plain = _Plain(model)
    for node in model.graph.node:
        attributes = {one.name: helper.get_attribute_value(one) for one in node.attribute}
        if node.domain == "com.microsoft" and node.op_type in OPERATORS:
            OPERATORS[node.op_type](plain, node, attributes)
        elif node.domain == KERNEL_DOMAIN and functions:
            plain.decoupled_attention(node, attributes)
        else:
            plain.nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(plain.nodes)
    if functions:
        model.functions.extend(functions)
        model.opset_import.append(helper.make_opsetid(FUNCTION_DOMAIN, 1))
    return model.SerializeToString()


def session(model, folder=None):
    """A CPU session on a model's bytes, as it is: nothing is optimised."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if folder is not None:
        key = "session.model_external_initializers_file_folder_path"
        options.add_session_config_entry(key, str(folder))
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def inputs_for(running, kinds, branches, size=(24, 32)):
    """Random inputs of a UNet's session; `kinds` has one kind of manipulation per request."""
    rng = np.random.default_rng(7)
    sizes = {"requests": len(kinds), "batch": len(kinds) * branches}
    sizes |= {"height": size[0], "width": size[1], "text": 154}
    feed = {}
    for one in running.get_inputs():
        shape = [sizes.get(dim, dim) for dim in one.shape]
        dtype = np.float16 if "16" in one.type else np.float32
        feed[one.name] = rng.standard_normal(shape).astype(dtype)
    feed["timestep"][:] = 501
    rows = feed["attention_manipulation"]
    for index, kind in enumerate(kinds):
        for part in range(rows.shape[1]):
            values = {
                "kind": KINDS.index(kind),
                "scale": 1.2 + 0.3 * index,
                "power": 1.3,
                "quantile": 0.65,
                "sharpness": 5,
                "adain_weight": 0.7,
                "invert_first_token": 1,
                "upper_bound": 0.4 if part else 10,
            }
            rows[index, part] = [values[column] for column in MANIPULATION_COLUMNS]
    feed["ip_adapter_scale"] = np.abs(feed["ip_adapter_scale"])
    return feed


def relative_error(actual, expected):
    """Relative L2 distance, in float64."""
    actual, expected = (np.asarray(one, np.float64) for one in (actual, expected))
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))
