"""What the tests of TensorRT engines on the simulated GPU share."""

import numpy as np
from onnx import TensorProto, helper, save

from fastface_trt.engines.cache import EngineCache
from fastface_trt.engines.files import describe_file
from fastface_trt.engines.manifest import ModuleSpec, TensorSpec
from fastface_trt.engines.tensorrt.builder import TensorRTBuilder
from fastface_trt.engines.tensorrt.options import TensorRTOptions
from tests.engines.tiny_models import WIDTH, write_module


class Bench:
    """A simulated GPU, a builder of a flavour, and the module y = x · W + 1 for one row of x."""

    def __init__(self, folder, flavour, cuda, trt):
        self.cuda, self.trt, self.folder = cuda, trt, folder
        self.builder = TensorRTBuilder(flavour, TensorRTOptions())
        self.cache = EngineCache(folder / "cache")
        self.module = write_module(folder / "export")

    def open(self, module=None):
        return self.cache.open(module or self.module, self.folder / "export", self.builder)


def rows(count=1, seed=0):
    return np.random.default_rng(seed).standard_normal((count, WIDTH)).astype(np.float32)


def run(engine, x):
    return engine.device.download(engine(x=x)["y"])


def unet_like(folder):
    """x [batch, 16] and a parameter row [requests, 3], so that options give several profiles."""
    nodes = [
        helper.make_node("ReduceSum", ["p"], ["s"], keepdims=0),
        helper.make_node("Mul", ["x", "s"], ["y"]),
    ]

    def value(name, *shape):
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    graph = helper.make_graph(
        nodes,
        "many",
        [value("x", "batch", WIDTH), value("p", "requests", 3)],
        [value("y", "batch", WIDTH)],
    )
    (folder / "many").mkdir(parents=True)
    save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9),
        folder / "many" / "model.onnx",
    )

    def spec(name, *shape):
        return TensorSpec(name=name, dtype="float32", shape=shape)

    return ModuleSpec(
        name="many",
        inputs=(spec("x", "batch", WIDTH), spec("p", "requests", 3)),
        outputs=(spec("y", "batch", WIDTH),),
        files=(describe_file(folder, folder / "many" / "model.onnx"),),
    )
