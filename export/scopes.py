"""The PyTorch module that an exported node came from, kept as one short note per node."""

import ast

import onnx_ir as ir

from fastface_trt.engines.onnx_file import MODULE_KEY

_TORCH_SCOPES = "pkg.torch.onnx.name_scopes"
"""Where PyTorch's exporter lists the names of the modules around a node, outermost first."""


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
