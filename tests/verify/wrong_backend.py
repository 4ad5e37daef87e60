"""A backend that is wrong on purpose: ONNX Runtime on a graph that was spoiled before the build."""

from pathlib import Path
from tempfile import TemporaryDirectory

import onnx
from onnx import helper

from fastface_trt.engines.ort.builder import OnnxRuntimeBuilder


class WrongBuilder(OnnxRuntimeBuilder):
    """Applies `spoil` to the ONNX model of every build; `builds` counts them."""

    def __init__(self, spoil):
        super().__init__("cpu", threads=1, optimization="basic")
        self.backend = f"wrong-{id(self)}"
        self.spoil = spoil
        self.builds = 0

    def build(self, module, source, target, progress):
        self.builds += 1
        model = onnx.load(source / module.files[0].path)
        self.spoil(model)
        with TemporaryDirectory() as folder:
            path = Path(folder) / module.files[0].path
            path.parent.mkdir(parents=True)
            onnx.save(model, path)
            return super().build(module, Path(folder), target, progress)


def scaled(tensor, factor=1.05):
    """Multiply tensor `tensor` of the main graph, and with it all that is computed from it."""

    def spoil(model):
        graph = model.graph
        types = {v.name: v.type.tensor_type.elem_type for v in [*graph.value_info, *graph.output]}
        for index, node in enumerate(graph.node):
            if tensor in node.output:
                node.output[list(node.output).index(tensor)] = "true_value"
                factors = helper.make_tensor("factor", types[tensor], [], [factor])
                graph.initializer.append(factors)
                wrong = helper.make_node("Mul", ["true_value", "factor"], [tensor])
                graph.node.insert(index + 1, wrong)
                return
        raise KeyError(tensor)

    return spoil


def replaced(op_type, wrong):
    """Compute every operator of one type as if it were another, inside functions too."""

    def spoil(model):
        for part in (model.graph, *model.functions):
            for node in part.node:
                if node.op_type == op_type:
                    node.op_type = wrong

    return spoil


def vanishing(tensor, count):
    """Spoil the output unless `tensor` is an output, too, as a wrong fusion would do."""

    def spoil(model):
        outputs = [value.name for value in model.graph.output]
        if tensor not in outputs[count:]:
            scaled(outputs[0])(model)

    return spoil
