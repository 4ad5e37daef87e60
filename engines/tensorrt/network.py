"""From an ONNX module to a TensorRT network, without a second copy of its weights."""

import re
import weakref
from math import prod
from typing import Any

from fastface_trt.engines.dtypes import TENSORRT, WEIGHTS
from fastface_trt.engines.hardware import cuda_hardware
from fastface_trt.engines.manifest import ModuleSpec
from fastface_trt.engines.onnx.file import OnnxFile
from fastface_trt.engines.tensorrt.flavour import Flavour
from fastface_trt.engines.tensorrt.plugin import (
    register_plugins,
    require_kernel_tokens,
    with_plugins,
)
from fastface_trt.engines.weight_map import EngineWeight, is_weight
from fastface_trt.errors import BuildFailed

_DUPLICATE_NAME = re.compile(r"A node named \S+ already exists")
"""Every call of a function repeats the names of its body's nodes; TensorRT renames them."""

_MOST_RECORDED = 64

_RECORDERS: list[Any] = []
"""Every recorder that was given away, for good: what its object made uses it to the end, and the
binding keeps it alive for that object alone."""


class MessageLog:
    """TensorRT's warnings and errors of one build or engine, in order.

    TensorRT takes `logger` for everything and, by `attach`, `recorder` for the errors of an object
    and of all that it makes, which then reach no log.
    """

    def __init__(self, binding: Any) -> None:
        self.warnings: list[str] = []
        self.errors: list[str] = []
        log = self
        living = weakref.ref(self)
        recorded: list[tuple[Any, str]] = []

        class Recorder(binding.IErrorRecorder):  # type: ignore[misc]
            def __init__(self) -> None:
                binding.IErrorRecorder.__init__(self)

            def report_error(self, code: Any, description: str) -> bool:
                if len(recorded) < _MOST_RECORDED:
                    recorded.append((code, description))
                if (heard := living()) is not None:
                    heard.note(True, binding.ILogger.ERROR, description)
                return True

            def num_errors(self) -> int:
                return len(recorded)

            def get_error_code(self, index: int) -> Any:
                return recorded[index][0]

            def get_error_desc(self, index: int) -> str:
                return recorded[index][1]

            def has_overflowed(self) -> bool:
                return len(recorded) == _MOST_RECORDED

            def clear(self) -> None:
                recorded.clear()

        class Logger(binding.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                binding.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                log.note(severity <= binding.ILogger.ERROR, severity, message)

        self._warning = binding.ILogger.WARNING
        self.logger = Logger()
        self.recorder = Recorder()

    def attach(self, maker: Any) -> Any:
        """Record the errors of a builder, runtime or refitter, and of what it makes; returns it."""
        _RECORDERS.append(self.recorder)
        maker.error_recorder = self.recorder
        return maker

    def note(self, is_error: bool, severity: Any, message: str) -> None:
        """Keep a message that says something; called by TensorRT, from any of its threads."""
        if severity > self._warning or _DUPLICATE_NAME.search(message):
            return
        kept = self.errors if is_error else self.warnings
        text = " ".join(message.split())
        if text not in kept:
            kept.append(text)

    def reason(self) -> str:
        """The first error, which the others follow from."""
        return self.errors[0][:400] if self.errors else "no reason given"


def parse(
    flavour: Flavour,
    binding: Any,
    builder: Any,
    log: MessageLog,
    module: ModuleSpec,
    onnx: OnnxFile,
    *,
    attention_plugin: bool = False,
) -> tuple[Any, Any]:
    """A strongly typed network of `module`, and the parser, which must outlive it.

    Weights are handed over by address, so the file's mapping is the only copy, and the address says
    which initialiser a weight of the network is; `onnx` must stay open until the engine is built.
    `attention_plugin` puts the CUDA kernels where decoupled attention's subroutine was.
    Raises `BuildFailed` with the node and the PyTorch module that the parser refused, or when the
    kernels do not fit the module's image tokens.
    """
    creation = binding.NetworkDefinitionCreationFlag
    flags = 1 << int(creation.STRONGLY_TYPED)
    model = bytes(onnx.model)
    if attention_plugin:
        require_kernel_tokens(module)
        register_plugins(flavour, f"sm_{cuda_hardware()['compute_capability'].replace('.', '')}")
        flags |= 1 << int(creation.PREFER_AOT_PYTHON_PLUGINS)
        model = with_plugins(onnx.model)
    network = builder.create_network(flags)
    parser = binding.OnnxParser(network, log.logger)
    accepted = parser.load_model_proto(model, str(onnx.path))
    accepted = accepted and all(
        parser.load_initializer(one.name, one.address, len(one.data))
        for one in onnx.initializers.values()
        if len(one.data)
    )
    if not (accepted and parser.parse_model_proto()):
        reason = _first_error(parser, onnx) or log.reason()
        raise BuildFailed(
            f"{flavour.label} cannot parse {module.name}: {reason}",
            "Export the module again; if that does not help, report the message.",
        )
    if any(node.op_type == "Attention" for node in onnx.nodes):
        _let_attention_decompose(binding, network)
    for side, count, get, wanted in (
        ("inputs", network.num_inputs, network.get_input, module.inputs),
        ("outputs", network.num_outputs, network.get_output, module.outputs),
    ):
        found = {get(index).name for index in range(count)}
        if found != {tensor.name for tensor in wanted}:
            raise BuildFailed(
                f"The graph of {module.name} does not fit its manifest: its {side} are "
                f"{', '.join(sorted(found))}.",
                "Export the module again.",
            )
    return network, parser


def _let_attention_decompose(binding: Any, network: Any) -> None:
    """Allow several kernels for an `Attention` node where no fused one exists.

    TensorRT otherwise refuses the whole network: fused kernels want half precision and head sizes
    that are multiples of 16.
    """
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == binding.LayerType.ATTENTION_INPUT:
            layer.__class__ = binding.IAttentionInputLayer  # how the binding casts a layer
            layer.attention.decomposable = True


def name_weights(binding: Any, network: Any, log: MessageLog, onnx: OnnxFile) -> list[EngineWeight]:
    """Name the network's weights after their initialisers, for a refit; returns those it uses.

    TensorRT knows a weight by type, address and count. What the parser copied or computed has
    another address and is refused, so nothing is named that a refit would not replace.
    """
    types = weight_types(binding)
    named = []
    heard = len(log.errors)
    for one in onnx.initializers.values():
        if not is_weight(one) or one.dtype not in types:
            continue
        weights = binding.Weights(types[one.dtype], one.address, prod(one.shape))
        if network.set_weights_name(weights, one.name):
            named.append(EngineWeight(name=one.name, sources=(one.name,), dtype=one.dtype))
    del log.errors[heard:]  # each refusal is one, and none of them fails a build
    return named


def weight_types(binding: Any) -> dict[str, Any]:
    """TensorRT's types of weights by the names used here."""
    return {name: getattr(binding.DataType, TENSORRT[name]) for name in WEIGHTS & TENSORRT.keys()}


def _first_error(parser: Any, onnx: OnnxFile) -> str:
    """The parser's first error as a sentence part: what, at which node, of which module."""
    if parser.num_errors == 0:
        return ""
    error = parser.get_error(0)
    what = " ".join(error.desc().split()).rstrip(".")
    name, operator = error.node_name(), error.node_operator()
    # Inside a function the outermost call is the node that the graph knows.
    stack = error.local_function_stack()
    scope = _scope_of(onnx, [name, *stack], error.node())
    where = f" at node {name or error.node()}" + (f" ({operator})" if operator else "")
    return f"{what},{where}" + (f" of module {scope}." if scope else ".")


def _scope_of(onnx: OnnxFile, names: list[str], index: int) -> str:
    by_name = {node.name: node.scope for node in onnx.nodes}
    for name in names:
        for part in re.split(r"\s+|#\d+$", name):
            if part in by_name:
                return by_name[part]
    return onnx.nodes[index].scope if 0 <= index < len(onnx.nodes) and not names[1:] else ""
