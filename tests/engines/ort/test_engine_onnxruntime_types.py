"""Types that the CPU has few ONNX Runtime kernels for: 8-bit floats run, bfloat16 says why."""

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from fastface_trt.engines.cache import EngineCache
from fastface_trt.engines.files import describe_file
from fastface_trt.engines.manifest import ModuleSpec, TensorSpec
from fastface_trt.engines.ort.builder import OnnxRuntimeBuilder
from fastface_trt.errors import BuildFailed

WIDTH = 64


def write(folder, nodes, initializers, opset=20):
    """A module of x [2,8,64] to y [2,8,64], float32."""
    shape = [2, 8, WIDTH]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    (folder / "m").mkdir(parents=True)
    onnx.save(model, folder / "m" / "model.onnx")
    tensors = [TensorSpec(name=n, dtype="float32", shape=tuple(shape)) for n in "xy"]
    return ModuleSpec(
        name="m",
        inputs=tensors[:1],
        outputs=tensors[1:],
        files=(describe_file(folder, folder / "m" / "model.onnx"),),
    )


def test_fp8_layer_of_three_dimensions_runs(tmp_path):
    """Its optimiser would reshape the 8-bit codes, for which the CPU has no kernel."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 8, WIDTH)).astype(np.float32)
    weight = rng.standard_normal((WIDTH, WIDTH)).astype(ml_dtypes.float8_e4m3fn)
    bias = rng.standard_normal(WIDTH).astype(np.float32)
    scale = np.float32(0.01)
    module = write(
        tmp_path / "export",
        [
            helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"]),
            helper.make_node("DequantizeLinear", ["codes", "scale"], ["w"]),
            helper.make_node("MatMul", ["d", "w"], ["p"]),
            helper.make_node("Add", ["p", "bias"], ["y"]),
        ],
        [
            numpy_helper.from_array(np.asarray(scale), "scale"),
            numpy_helper.from_array(bias, "bias"),
            helper.make_tensor("zero", TensorProto.FLOAT8E4M3FN, [], b"\0", raw=True),
            helper.make_tensor(
                "codes", TensorProto.FLOAT8E4M3FN, weight.shape, weight.tobytes(), raw=True
            ),
        ],
    )
    with EngineCache(tmp_path / "cache").open(
        module, tmp_path / "export", OnnxRuntimeBuilder(threads=1), lambda line: None
    ) as engine:
        ours = engine(x=x)["y"]
    codes = (x / scale).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
    expected = (codes * scale) @ (weight.astype(np.float64) * scale) + bias
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_bfloat16_layer_is_refused_with_a_hint(tmp_path):
    weight = np.ones((WIDTH, WIDTH), dtype=ml_dtypes.bfloat16)
    module = write(
        tmp_path / "export",
        [
            helper.make_node("Cast", ["x"], ["h"], to=TensorProto.BFLOAT16),
            helper.make_node("Gelu", ["h"], ["g"]),
            helper.make_node("MatMul", ["g", "w"], ["p"]),
            helper.make_node("Cast", ["p"], ["y"], to=TensorProto.FLOAT),
        ],
        [helper.make_tensor("w", TensorProto.BFLOAT16, weight.shape, weight.tobytes(), raw=True)],
    )
    with pytest.raises(BuildFailed) as caught:
        EngineCache(tmp_path / "cache").open(
            module, tmp_path / "export", OnnxRuntimeBuilder(threads=1), lambda line: None
        )
    assert "bf16" in caught.value.hint
    assert "--precision fp16" in caught.value.hint
