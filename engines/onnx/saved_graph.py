"""Mends graphs that ONNX Runtime 1.22 to 1.30 saves, and then refuses to load.

With weights in a file of their own, they write every initialiser of an If's branch twice, also
those that they made themselves by folding constants; "initializer name is not unique" is what
loading says. Nothing in the graph that is optimised can prevent it.
"""

import importlib
from pathlib import Path
from typing import Any


def drop_repeated_initializers(path: Path) -> int:
    """Keep the last of several initialisers of one name in each subgraph of the graph at `path`.

    Weights in other files are not read. Returns how many were dropped; with none, the file stays
    as it is.
    """
    onnx: Any = importlib.import_module("onnx")
    model = onnx.load(str(path), load_external_data=False)
    dropped = sum(_drop(node, onnx.AttributeProto.GRAPH) for node in model.graph.node)
    if dropped:
        path.write_bytes(model.SerializeToString())
    return dropped


def _drop(node: Any, graph_type: int) -> int:
    dropped = 0
    for graph in (attribute.g for attribute in node.attribute if attribute.type == graph_type):
        kept = {tensor.name: tensor for tensor in graph.initializer}
        repeated = len(graph.initializer) - len(kept)
        if repeated:
            last = [type(tensor).FromString(tensor.SerializeToString()) for tensor in kept.values()]
            del graph.initializer[:]
            graph.initializer.extend(last)
        dropped += repeated + sum(_drop(inner, graph_type) for inner in graph.node)
    return dropped
