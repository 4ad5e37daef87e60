"""The PyTorch module that an exported node came from, which the exporter notes in its metadata."""

import ast

import onnx_ir as ir

SCOPE_KEY = "pkg.torch.onnx.name_scopes"
"""Node metadata that names the PyTorch module a node came from; builders quote it in errors."""


def module_of(node: ir.Node) -> str | None:
    """The name of the innermost PyTorch module around `node`, None where the exporter gave none."""
    scopes = node.metadata_props.get(SCOPE_KEY)
    # From the whole model ("") inwards; the last entry is the node itself.
    return str(ast.literal_eval(scopes)[-2]) if scopes else None
