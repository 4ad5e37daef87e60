"""ONNX files of the face networks, in the shapes InsightFace expects."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn


def export_onnx(
    network: nn.Module,
    example: torch.Tensor,
    path: Path,
    output_names: list[str],
    dynamic_size: bool = False,
) -> None:
    """Write a network with one input as ONNX, weights stored as float16.

    Args:
        network: in eval mode.
        example: input [1, 3, h, w].
        path: file to write.
        output_names: one name per output.
        dynamic_size: whether height and width may change as well as the batch.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    axes = {0: "batch", 2: "height", 3: "width"} if dynamic_size else {0: "batch"}
    if dynamic_size:
        # SCRFD's post-processing takes one picture at a time.
        axes.pop(0)
    torch.onnx.export(
        network,
        (example,),
        str(path),
        input_names=["input.1"],
        output_names=output_names,
        dynamic_axes={"input.1": axes},
        opset_version=17,
        dynamo=False,
    )
    model = onnx.load(path)
    _store_as_half(model)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def _store_as_half(model: onnx.ModelProto) -> None:
    """Keep big weights as float16 with a cast behind each: half the file, same float32 graph."""
    graph = model.graph
    casts = []
    for index, tensor in enumerate(list(graph.initializer)):
        values = numpy_helper.to_array(tensor)
        if tensor.data_type != TensorProto.FLOAT or values.size < 256:
            continue
        half = numpy_helper.from_array(values.astype(np.float16), f"{tensor.name}.half")
        graph.initializer.remove(tensor)
        graph.initializer.append(half)
        casts.append(
            helper.make_node(
                "Cast", [half.name], [tensor.name], name=f"Widen_{index}", to=TensorProto.FLOAT
            )
        )
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
