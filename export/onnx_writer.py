"""Write one module as ONNX: trace it, attach the function bodies, choose how weights are stored.

Every node keeps the name of the PyTorch module that it came from, and no more of what the exporter
noted.
"""

from __future__ import annotations

import ast
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from fastface_trt.engines.contract import FUNCTION_DOMAIN, FUNCTION_NAME, IMAGE_TOKENS, TOKEN_MASK
from fastface_trt.engines.files import describe_file
from fastface_trt.engines.manifest import DType, ModuleSpec, TensorSpec
from fastface_trt.engines.onnx.file import MODULE_KEY
from fastface_trt.export.functions import OPSET, attention_functions
from fastface_trt.export.modules import ModuleExport
from fastface_trt.export.operators import use_onnx_operators
from fastface_trt.export.quantization.graph import quantize_graph

_TORCH_SCOPES = "pkg.torch.onnx.name_scopes"
"""Where PyTorch's exporter lists the names of the modules around a node, outermost first."""

MODEL_FILE = "model.onnx"
EXTERNAL_DATA_BYTES = 512 * 2**20
"""Weights beyond this go into a file beside the graph; protobuf itself ends at 2 GiB."""

BFLOAT16_OPSET = 22
"""The first opset whose convolution takes bfloat16."""

FP16_STORAGE_ELEMENTS = 256
"""Smaller float32 tensors (biases, norms, constants) stay as they are under fp16 storage."""

_DTYPES: dict[ir.DataType, DType] = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
    ir.DataType.INT64: "int64",
    ir.DataType.UINT8: "uint8",
}


def write_module(export: ModuleExport, folder: Path, *, fp16_storage: bool = False) -> ModuleSpec:
    """Export one module into `folder`/NAME/model.onnx and return its entry for the manifest.

    Peak memory is the module's weights plus about one copy while they are written.
    """
    target = folder / export.name
    target.mkdir(parents=True)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        previous = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            program = torch.onnx.export(
                export.module.eval(),
                kwargs=dict(export.inputs),
                dynamo=True,
                opset_version=_opset(export.module),
                dynamic_shapes=_dynamic_shapes(export),
                input_names=list(export.inputs),
                output_names=list(export.outputs),
                verbose=False,
            )
        finally:
            logging.disable(previous)
    assert program is not None  # torch returns one whenever dynamo=True
    model = program.model
    keep_only_modules(model)
    use_onnx_operators(model)
    _attach_functions(model)
    if export.quantization is not None:
        quantize_graph(model, export.quantization)
    if fp16_storage:
        _store_as_fp16(model)
    _name_dimensions(model, export)
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value)
    program.save(target / MODEL_FILE, external_data=size > EXTERNAL_DATA_BYTES)

    def spec(value: ir.Value) -> TensorSpec:
        return TensorSpec(
            name=value.name, dtype=_DTYPES[value.dtype], shape=export.shapes[value.name]
        )

    paths = sorted(target.iterdir(), key=lambda p: (p.name != MODEL_FILE, p.name))
    return ModuleSpec(
        name=export.name,
        inputs=tuple(spec(v) for v in model.graph.inputs),
        outputs=tuple(spec(v) for v in model.graph.outputs),
        files=tuple(describe_file(folder, path) for path in paths),
    )


def _dynamic_shapes(export: ModuleExport) -> dict[str, dict[int, Any]]:
    """Torch's description of the dynamic sizes of every input, one Dim object per name."""
    dims: dict[str, Any] = {}

    def dim(name: str) -> Any:
        multiple = export.multiples.get(name, 1)
        if multiple == 1:
            return dims.setdefault(name, torch.export.Dim(name, min=1))
        return multiple * dims.setdefault(name, torch.export.Dim(f"{name}_units", min=2))

    return {
        name: {
            axis: dim(size)
            for axis, size in enumerate(export.shapes[name])
            if isinstance(size, str)
        }
        for name in export.inputs
    }


def _attach_functions(model: ir.Model) -> None:
    """Put the function bodies into a model that holds `DecoupledAttention` nodes."""
    if not any(n.op_type == FUNCTION_NAME for n in model.graph.all_nodes()):
        return
    inputs = {value.name: value for value in model.graph.inputs}
    tokens = inputs[IMAGE_TOKENS].shape[1]
    for script in attention_functions(tokens, masked=TOKEN_MASK in inputs):
        function = ir.from_proto(script.to_function_proto())
        # What the bodies use means the same in every opset from theirs to the model's.
        function.opset_imports[""] = model.opset_imports[""]
        model.functions[function.identifier()] = function
    model.opset_imports[FUNCTION_DOMAIN] = 1


def keep_only_modules(model: ir.Model) -> None:
    """Replace the exporter's metadata by the name of the innermost PyTorch module of each node.

    Its stack traces hold paths of the machine that exported, and its lists of scopes are a fortieth
    of a small model. Builders quote the name in errors; quantisation finds layers by it.
    """
    for node in model.graph.all_nodes():
        scopes = node.metadata_props.get(_TORCH_SCOPES)
        node.metadata_props.clear()
        # From the whole model ("") inwards; the last entry is the node itself.
        module = str(ast.literal_eval(scopes)[-2]) if scopes else ""
        if module and not module.startswith("_"):  # the exporter's own word for "no module"
            node.metadata_props[MODULE_KEY] = module
    for value in model.graph.initializers.values():
        value.metadata_props.clear()


def _store_as_fp16(model: ir.Model) -> None:
    """Replace large float32 weights by float16 ones behind a Cast.

    Halves the files; a builder folds the casts away, so engines compute in float32 as before.
    """
    nodes = []
    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT:
            continue
        if tensor.size < FP16_STORAGE_ELEMENTS:
            continue
        stored = ir.Value(
            name=f"{name}.fp16",
            shape=tensor.shape,
            type=ir.TensorType(ir.DataType.FLOAT16),
            const_value=ir.Tensor(tensor.numpy().astype(np.float16), name=f"{name}.fp16"),
        )
        cast = ir.node("Cast", [stored], {"to": ir.DataType.FLOAT}, num_outputs=1)
        cast.outputs[0].shape, cast.outputs[0].type = tensor.shape, value.type
        value.replace_all_uses_with(cast.outputs[0])
        del model.graph.initializers[name]
        cast.outputs[0].name = name
        model.graph.initializers[stored.name] = stored
        nodes.append(cast)
    if nodes:
        model.graph.insert_before(model.graph[0], nodes)


def _name_dimensions(model: ir.Model, export: ModuleExport) -> None:
    """Give the graph's inputs and outputs the shapes of the manifest, names included."""
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.shape = ir.Shape(export.shapes[value.name])


def _opset(module: nn.Module) -> int:
    """The opset of the functions, or a later one that a bfloat16 module needs."""
    is_bfloat16 = any(p.dtype == torch.bfloat16 for p in module.parameters())
    return max(OPSET, BFLOAT16_OPSET) if is_bfloat16 else OPSET
