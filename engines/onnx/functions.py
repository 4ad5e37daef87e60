"""Functions and subgraphs as ONNX Runtime 1.22 to 1.30 can take them.

They refuse an If around a call of a model-local function: they inline it into both branches under
the same names. So a form holds no call; every one is written out under names of its own.

And they refuse what they save themselves: with weights in a file of their own, they write every
initialiser of an If's branch twice, also those that they made by folding constants; "initializer
name is not unique" is what loading says. Nothing in the graph that is optimised can prevent it, so
the saved one is corrected.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
from onnx import helper

from fastface_trt.engines.onnx.graph import Graph, Node, subgraphs


def inline(graph: Graph, call: Node, prefix: str) -> list[Node]:
    """The nodes that compute what `call` does; names inside of it begin with `prefix`.

    Calls inside of the function are written out, too. Constants become initialisers that all calls
    share. A call of what is no function of the model comes back as it is.
    """
    functions = {(one.domain, one.name): one for one in graph.model.functions}
    function = functions.get((call.domain, call.op_type))
    if function is None:
        return [call]
    given = dict(zip(function.input, call.input, strict=False))
    given |= {name: "" for name in function.input if name not in given}
    made = dict(zip(function.output, call.output, strict=False))
    attributes = {one.name: one for one in (*function.attribute_proto, *call.attribute)}
    constants: dict[str, str] = {}

    def renamed(name: str) -> str:
        if not name:
            return name
        for known in (given, made, constants):
            if name in known:
                return known[name]
        return prefix + name

    nodes = []
    for index, inner in enumerate(function.node):
        tensor = _constant(inner)
        if tensor is not None and inner.output[0] not in made:
            copy = onnx.TensorProto.FromString(tensor.SerializeToString())
            copy.name = f"{function.domain}.{function.name}.{inner.output[0]}"
            constants[inner.output[0]] = graph.initializer(copy)
            continue
        body = onnx.NodeProto.FromString(inner.SerializeToString())
        _rename(body, renamed, f"{prefix}{index}.")
        del body.attribute[:]
        for one in inner.attribute:
            if not one.ref_attr_name:
                body.attribute.append(one)
            elif one.ref_attr_name in attributes:
                body.attribute.append(attributes[one.ref_attr_name])
                body.attribute[-1].name = one.name
        for branch in subgraphs(body):
            _rename_graph(branch, renamed)
        nodes += inline(graph, body, f"{prefix}{inner.op_type}.{index}.")
    passed = [(one, made[one]) for one in function.output if one in given and one in made]
    return nodes + [helper.make_node("Identity", [given[one]], [name]) for one, name in passed]


def inline_all(graph: Graph) -> int:
    """Write out every call of a model-local function in the main graph; returns their number."""
    names = {(one.domain, one.name) for one in graph.model.functions}
    calls = [node for node in graph.nodes if (node.domain, node.op_type) in names]
    for call in calls:
        graph.remove(call)
        for node in inline(graph, call, f"{call.output[0]}.inlined."):
            graph.append(node)
    return len(calls)


def _constant(node: Node) -> Any:
    if node.op_type != "Constant" or node.domain or node.attribute[0].name != "value":
        return None
    return None if node.attribute[0].ref_attr_name else node.attribute[0].t


def _rename(node: Node, renamed: Callable[[str], str], prefix: str = "") -> None:
    node.input[:] = [renamed(name) for name in node.input]
    node.output[:] = [renamed(name) for name in node.output]
    node.name = prefix + node.name


def _rename_graph(graph: Any, renamed: Callable[[str], str]) -> None:
    for node in graph.node:
        _rename(node, renamed)
        for inner in subgraphs(node):
            _rename_graph(inner, renamed)
    for one in (*graph.initializer, *graph.input, *graph.output):
        one.name = renamed(one.name)


def drop_repeated_initializers(path: Path) -> int:
    """Keep the last of several initialisers of one name in each subgraph of the graph at `path`.

    Weights in other files are not read. Returns how many were dropped; with none, the file stays
    as it is.
    """
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
