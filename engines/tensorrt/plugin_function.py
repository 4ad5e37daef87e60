"""Giving `fastface::DecoupledAttention` a body of two plugin nodes.

TensorRT's parser prefers a model's own function to a plugin of the same name, and a plugin here is
one kernel launch while the function needs two. So the function stays and its body is replaced.
"""

from fastface_trt.engines.contract import FUNCTION_DOMAIN, FUNCTION_NAME
from fastface_trt.engines.tensorrt.plugin import OUTPUT_PLUGIN, STATISTICS_PLUGIN
from fastface_trt.errors import ExportIncomplete


def with_plugins(model: memoryview) -> bytes:
    """An ONNX model whose decoupled attentions are the two plugins of `plugin`.

    `model` is the serialised ModelProto; external data stays where it lies. A model without the
    function comes back unchanged. Raises `ExportIncomplete` for bytes that are no ONNX model.
    """
    import onnx
    from onnx import helper

    try:
        parsed = onnx.ModelProto.FromString(bytes(model))
    except Exception as error:  # protobuf's own class, which has moved between its versions
        raise ExportIncomplete(
            f"The model file is no complete ONNX model: {error}.", "Export it again."
        ) from None
    ours = [
        one
        for one in parsed.functions
        if (one.domain, one.name) == (FUNCTION_DOMAIN, FUNCTION_NAME)
    ]
    if not ours:
        return bytes(model)
    for function in ours:
        if (len(function.input), len(function.output)) != (5, 1):
            raise ExportIncomplete(
                f"The function {FUNCTION_NAME} of this model has {len(function.input)} inputs and "
                f"{len(function.output)} outputs, not 5 and 1.",
                "Export it again with this version.",
            )
        q, k, _, manipulation, _ = function.input
        scratch = ["attention_maps", "row_statistics"]
        domain = FUNCTION_DOMAIN
        body = [
            helper.make_node(name, inputs, outputs, name, domain=domain, plugin_namespace=domain)
            for name, inputs, outputs in (
                (STATISTICS_PLUGIN, [q, k, manipulation], scratch),
                (OUTPUT_PLUGIN, [*function.input, *scratch], function.output),
            )
        ]
        del function.node[:]
        del function.value_info[:]
        function.node.extend(body)
    return bytes(parsed.SerializeToString())
