"""The model's function as two plugin nodes, checked with onnx and TensorRT-RTX's parser."""

import onnx
import pytest
from onnx import TensorProto, helper

from fastface_trt.engines.contract import FUNCTION_DOMAIN, FUNCTION_NAME
from fastface_trt.engines.tensorrt.plugin import OUTPUT_PLUGIN, STATISTICS_PLUGIN, with_plugins
from fastface_trt.errors import ExportIncomplete


@pytest.fixture(scope="module")
def model():
    """One call of the exported function on [3,2,64,16], with a layer behind it."""
    from fastface_trt.export.functions import attention_functions

    shapes = {"q": [3, 2, 64, 16], "k": [3, 2, 4, 16], "v": [3, 2, 4, 16], "m": [1, 8], "s": [1]}
    floats = dict.fromkeys(shapes, TensorProto.FLOAT16) | dict.fromkeys("ms", TensorProto.FLOAT)
    inputs = [helper.make_tensor_value_info(n, floats[n], shape) for n, shape in shapes.items()]
    call = helper.make_node(FUNCTION_NAME, [*shapes], ["z"], name="call", domain=FUNCTION_DOMAIN)
    nodes = [call, helper.make_node("Neg", ["z"], ["out"])]
    output = helper.make_tensor_value_info("out", TensorProto.FLOAT16, shapes["q"])
    imports = [helper.make_opsetid("", 20), helper.make_opsetid(FUNCTION_DOMAIN, 1)]
    graph = helper.make_graph(nodes, "g", inputs, [output])
    return helper.make_model(
        graph,
        functions=[one.to_function_proto() for one in attention_functions(4)],
        opset_imports=imports,
        ir_version=10,
    )


def test_only_the_body_of_the_function_changes(model):
    rewritten = onnx.load_from_string(with_plugins(memoryview(model.SerializeToString())))
    assert rewritten.graph == model.graph
    assert len(rewritten.functions) == len(model.functions)
    for before, after in zip(model.functions, rewritten.functions, strict=True):
        if before.name != FUNCTION_NAME:
            assert before == after
            continue
        assert list(after.input) == list(before.input)
        assert list(after.output) == list(before.output)
        assert list(after.opset_import) == list(before.opset_import)
        first, second = after.node
        q, k, v, manipulation, ip_scale = before.input
        assert (first.op_type, second.op_type) == (STATISTICS_PLUGIN, OUTPUT_PLUGIN)
        assert list(first.input) == [q, k, manipulation]
        assert list(second.input) == [q, k, v, manipulation, ip_scale, *first.output]
        assert list(second.output) == list(before.output)
        for node in after.node:
            assert node.domain == FUNCTION_DOMAIN
            attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            assert attributes == {"plugin_namespace": FUNCTION_DOMAIN.encode()}
    onnx.checker.check_model(rewritten)


def test_a_model_without_the_function_keeps_its_bytes(model):
    plain = onnx.ModelProto()
    plain.CopyFrom(model)
    del plain.functions[:]
    data = plain.SerializeToString()
    assert with_plugins(memoryview(data)) == data


@pytest.mark.parametrize("cut", [1, 1000])
def test_a_cut_model_is_refused(model, cut):
    with pytest.raises(ExportIncomplete):
        with_plugins(memoryview(model.SerializeToString()[:-cut]))


def test_another_signature_is_refused(model):
    other = onnx.ModelProto()
    other.CopyFrom(model)
    ours = next(one for one in other.functions if one.name == FUNCTION_NAME)
    ours.input.append("sixth")
    with pytest.raises(ExportIncomplete, match="6 inputs and 1 outputs"):
        with_plugins(memoryview(other.SerializeToString()))


def test_the_parser_follows_the_function_to_the_plugin(model):
    """TensorRT-RTX has no plugins, so its parser must miss exactly the first of ours."""
    trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)

    def parse(data):
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger)
        if parser.parse(data):
            return None
        error = parser.get_error(0)  # lives no longer than its parser
        return error.node_operator(), error.desc(), error.local_function_stack()

    assert parse(model.SerializeToString()) is None
    operator, reason, stack = parse(with_plugins(memoryview(model.SerializeToString())))
    assert operator == STATISTICS_PLUGIN
    assert "lugin" in reason
    assert len(stack) == 1
    assert f"({FUNCTION_NAME})" in stack[0]
