"""What a CUDA form leaves alone, and that the rest is still right; where its weights are found."""

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from fastface_trt.engines.contract import FUNCTION_NAME, KERNEL_DOMAIN
from fastface_trt.engines.onnx.file import OnnxFile
from fastface_trt.engines.onnx.forms import cpu_form, cuda_form
from fastface_trt.engines.ort.weights import find_weights
from fastface_trt.engines.weight_map import digest_weights, make_map
from fastface_trt.mini.folders import EXPORT
from tests.engines.onnx.spelled_out import inputs_for, relative_error, session, spelled_out

UNET = EXPORT / "unet" / "model.onnx"
TOKENS = 4
FP32 = 1e-5


def insert(graph, node, index, op_types, inputs=()):
    """Put operators, each of which takes the one before and `inputs`, before an input of `node`."""
    tensor = node.input[index]
    at = list(graph.node).index(node)
    for op_type in op_types:
        made = f"{tensor}.{op_type}.{index}.{node.name}"
        graph.node.insert(at, helper.make_node(op_type, [tensor, *inputs], [made], made))
        at, tensor = at + 1, made
    next(one for one in graph.node if one.output == node.output).input[index] = tensor


def check(path, form, error=FP32, requests=(("scale_power", "softmask"), 2)):
    functions = onnx.load(path, load_external_data=False).functions
    uses_kernels = KERNEL_DOMAIN.encode() in form.model
    exported = session(path.read_bytes())
    rewritten = session(spelled_out(form.model, functions if uses_kernels else ()))
    feed = inputs_for(exported, *requests)
    assert relative_error(rewritten.run(None, feed)[0], exported.run(None, feed)[0]) < error


def test_eight_bit_weights_and_maps(tmp_path):
    """Convolutions of quantised weights, and an attention with quantised maps, stay exported."""
    model = onnx.load(UNET)
    graph = model.graph
    zero = numpy_helper.from_array(np.int8(0), "zero")
    graph.initializer.extend([numpy_helper.from_array(np.float32(2**-7), "step"), zero])
    softmax = next(node for node in graph.node if node.op_type == "Softmax")
    product = next(node for node in graph.node if softmax.output[0] in node.input)
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    casts = {node.output[0] for node in graph.node if node.op_type == "Cast"}
    weights = [n for n in graph.node if n.op_type == "MatMul" and n.input[1] in casts]
    weights += convolutions[1:-1]
    for node in weights:
        insert(graph, node, 1, ["QuantizeLinear", "DequantizeLinear"], ["step", "zero"])
    insert(graph, product, 0, ["QuantizeLinear", "DequantizeLinear"], ["step", "zero"])
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    form = cuda_form(path, TOKENS, "operator")
    assert form.counts["convolution"] == 2  # the first and the last
    assert form.counts["attention"] == 13
    assert form.counts["group_norm"] == 30
    has = Counter(node.op_type for node in onnx.load_from_string(form.model).graph.node)
    assert (has["Conv"], has["Softmax"]) == (34, 1)
    assert has["QuantizeLinear"] == len(weights) + 1
    check(path, form, 2e-3)  # a last bit before the rounding of the maps moves it by a code


@pytest.mark.parametrize("make", [cpu_form, cuda_form])
@pytest.mark.parametrize("manipulation", ["operator", "branches"])
def test_a_result_that_is_more_than_added(tmp_path, make, manipulation):
    """PuLID works on the image branch before it is added: those attentions stay, in any form."""
    model = onnx.load(UNET)
    calls = [node for node in model.graph.node if node.op_type == FUNCTION_NAME]
    for call in calls[:2]:
        total = next(node for node in model.graph.node if call.output[0] in node.input)
        insert(model.graph, total, list(total.input).index(call.output[0]), ["Tanh"])
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    form = make(path, TOKENS, *([manipulation] if make is cuda_form else []))
    after = onnx.load_from_string(form.model)
    assert not after.functions
    has = Counter((node.domain, node.op_type) for node in after.graph.node)
    assert has["com.microsoft", "MultiHeadAttention"] == 12
    by_operator = make is cuda_form and manipulation == "operator"
    assert has["", "If"] == (0 if by_operator else 5)
    assert has[KERNEL_DOMAIN, FUNCTION_NAME] == (7 if by_operator else 0)
    check(path, form)


def feed_forward(width, bias, approximate="none", residual=(2, 3)):
    """x [2,3,8] to split(x W + b), x · gelu(y), and a residual added to x V + c, by a norm."""
    rng = np.random.default_rng(0)
    constants = {
        "w": rng.standard_normal((8, width)),
        "b": rng.standard_normal(width),
        "v": rng.standard_normal((8, 320)),
        "c": rng.standard_normal(320),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["xw"]),
        *([helper.make_node("Add", ["b", "xw"], ["z"])] if bias else []),
        helper.make_node("Split", ["z" if bias else "xw"], ["l", "r"], axis=-1, num_outputs=2),
        helper.make_node("Gelu", ["r"], ["g"], approximate=approximate),
        helper.make_node("Mul", ["g", "l"], ["gated"]),
        helper.make_node("MatMul", ["x", "v"], ["xv"]),
        *([helper.make_node("Add", ["c", "xv"], ["y"])] if bias else []),
        helper.make_node("Add", ["residual", "y" if bias else "xv"], ["sum"]),
    ]
    float32 = TensorProto.FLOAT
    inputs = {"x": (2, 3, 8), "residual": (*residual, 320)}
    outputs = {"gated": (2, 3, width // 2), "sum": (2, 3, 320)}
    infos = [
        [helper.make_tensor_value_info(n, float32, s) for n, s in one.items()]
        for one in (inputs, outputs)
    ]
    tensors = [numpy_helper.from_array(v.astype(np.float32), k) for k, v in constants.items()]
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(nodes, "g", *infos, [one for one in tensors if one.name in used])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize(
    ("options", "split_gelu", "bias_add"),
    [
        ({"width": 2560, "bias": True}, 1, 1),
        ({"width": 2560, "bias": False}, 0, 0),
        ({"width": 64, "bias": True}, 0, 1),
        ({"width": 2560, "bias": True, "approximate": "tanh"}, 0, 1),
        ({"width": 5120, "bias": True, "residual": (1, 3)}, 1, 0),
    ],
)
def test_what_the_kernels_of_biases_do_not_take(tmp_path, options, split_gelu, bias_add):
    model = feed_forward(**options)
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    form = cuda_form(path, None, "operator")
    if form is None:
        assert (split_gelu, bias_add) == (0, 0)
        return
    assert (form.counts["split_gelu"], form.counts["bias_add"]) == (split_gelu, bias_add)
    rng = np.random.default_rng(1)
    exported, rewritten = session(model.SerializeToString()), session(spelled_out(form.model))
    feed = {i.name: rng.standard_normal(i.shape).astype(np.float32) for i in exported.get_inputs()}
    for one, other in zip(rewritten.run(None, feed), exported.run(None, feed), strict=True):
        assert relative_error(one, other) < FP32


def test_a_refit_finds_the_weights_in_their_new_layout(tmp_path):
    """Transposed by ONNX Runtime when it folds constants, and known by content and name."""
    model = onnx.load_from_string(cuda_form(UNET, TOKENS, "operator").model)
    graph = model.graph
    made = {name: node for node in graph.node for name in node.output}
    prepared = {
        name
        for node in graph.node
        if node.op_type in ("NhwcConv", "GroupNorm")
        for name in node.input[1:3]
    } & set(made)
    wanted, names = [], list(prepared)
    while names:  # what comes before them: transposes, reshapes, casts from float16
        node = made.get(names.pop())
        if node is not None and node not in wanted:
            wanted.append(node)
            names += node.input
    uses = [helper.make_node("Mul", [name, "x"], [f"{name}.out"]) for name in sorted(prepared)]
    del graph.node[:], graph.input[:], graph.output[:], graph.value_info[:]
    graph.node.extend([*wanted[::-1], *uses])
    graph.input.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, []))
    graph.output.extend(
        helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, None) for node in uses
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(tmp_path / "engine.onnx")
    onnxruntime.InferenceSession(model.SerializeToString(), options)
    with OnnxFile(UNET) as export, OnnxFile(tmp_path / "engine.onnx") as engine:
        weights = digest_weights(export)
        found = {one.name: one for one in find_weights(export, weights, engine)}
        lost = set(make_map(export, weights, found.values()).uncovered())
    assert len(prepared) == 36 + 60
    for name in prepared:
        one = found[name]
        source = name.removeprefix("nhwc_").removeprefix("channels_")
        # Norms that are all ones cannot be told apart by content; their names say which is which.
        assert one.sources in ((source,), (f"{source}.fp16",)), one
        kernel = name.startswith("nhwc_") and export_shape(source)[2:] != (1, 1)
        assert one.layout == ("permute:0,2,3,1" if kernel else "same"), one
        assert not lost & set(one.sources)


def export_shape(name):
    sizes = {one.name: tuple(one.dims) for one in onnx.load(UNET).graph.initializer}
    return sizes.get(name) or sizes[f"{name}.fp16"]
