"""Graphs whose branches have initialisers twice, as ONNX Runtime 1.22 to 1.30 save them."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from fastface_trt.engines.onnx.functions import drop_repeated_initializers


def constant(name, value):
    return numpy_helper.from_array(np.array([value], np.float32), name)


def branch(name, initializers, inner=()):
    output = helper.make_tensor_value_info(f"{name}.y", TensorProto.FLOAT, [1])
    add = helper.make_node("Add", ["x", f"{name}.c"], [f"{name}.y"])
    return helper.make_graph([*inner, add], name, [], [output], initializers)


def choice(name, then, other):
    return helper.make_node(
        "If", ["asks"], [f"{name}.out"], name=name, then_branch=then, else_branch=other
    )


def model(repeat):
    """y = x + (2 or 3) by `asks`, with another choice inside the first branch."""
    inner = choice(
        "inner",
        branch("deep", [constant("deep.c", 5)] * repeat),
        branch("deeper", [constant("deeper.c", 6)]),
    )
    then = branch("then", [constant("then.c", 1)] * (repeat - 1) + [constant("then.c", 2)], [inner])
    other = branch("other", [constant("other.c", 3)])
    graph = helper.make_graph(
        [choice("outer", then, other)],
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [1]),
            helper.make_tensor_value_info("asks", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("outer.out", TensorProto.FLOAT, [1])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_repeated_initializers_of_branches_are_dropped(tmp_path):
    path = tmp_path / "engine.onnx"
    onnx.save(model(2), path)
    assert drop_repeated_initializers(path) == 2
    assert onnx.load(path) == model(1)
    onnx.checker.check_model(str(path), full_check=True)


def test_a_graph_without_them_is_left_alone(tmp_path):
    path = tmp_path / "engine.onnx"
    onnx.save(model(1), path)
    path.chmod(0o444)
    before = path.stat().st_mtime_ns, path.read_bytes()
    assert drop_repeated_initializers(path) == 0
    assert (path.stat().st_mtime_ns, path.read_bytes()) == before
