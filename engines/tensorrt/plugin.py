"""The attention kernels as TensorRT plugins whose PTX lies in the engine.

TensorRT's quick plugins come in two kinds. The just-in-time kind calls back into Python for every
layer of every step, so an engine that holds one needs this package, and Python, to run. The
ahead-of-time kind is one kernel launch, without workspace, whose PTX is written into the plan; it
is the kind used here, and a plan that holds it runs anywhere a plan runs.

One launch cannot do it: softmask needs statistics over all branches, heads and positions of a
request before the first output element is known, and a plain grid has no barrier across blocks. So
there are two plugins in a chain, one for each launch of `kernels/decoupled_attention.cu`, and what
would be the workspace is a pair of tensors between them, whose memory TensorRT plans like any
other. TensorRT's parser prefers a model's own function to a plugin of the same name, so the
function `fastface::DecoupledAttention` stays and `with_plugins` gives it a body of the two nodes.

TensorRT-RTX has no plugins, and `Flavour.require` says so. The kernels ran on an H100; the plugins
were not run on a GPU.

Shape legend: B = R·G rows, R requests, G branches, H heads, N positions, T = 4 image tokens,
D head size, P parameter columns.
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, Final

from fastface_trt.engines.contract import FUNCTION_DOMAIN, FUNCTION_NAME, IMAGE_TOKENS
from fastface_trt.engines.kernels.compile import (
    OUTPUT_KERNEL,
    STATISTICS_KERNEL,
    compile_kernels,
)
from fastface_trt.engines.kernels.decoupled_attention import (
    OUTPUT_POSITIONS,
    OUTPUT_THREADS,
    STATISTICS_PER_HEAD,
    STATISTICS_THREADS,
    TOKENS,
)
from fastface_trt.engines.manifest import ModuleSpec
from fastface_trt.engines.tensorrt.flavour import Flavour
from fastface_trt.errors import BackendUnavailable, BuildFailed, ExportIncomplete, InvalidRequest

STATISTICS_PLUGIN: Final = f"{FUNCTION_NAME}Statistics"
"""(q, k, manipulation) → maps [B,H,N,T] and statistics [B,H,3,T], both float32."""

OUTPUT_PLUGIN: Final = f"{FUNCTION_NAME}Output"
"""(q, k, v, manipulation, ip_scale, maps, statistics) → [B,H,N,D] in the dtype of q."""

Ptx = Callable[[int, str], str]
"""From head size and dtype to the kernels' PTX."""


def require_kernel_tokens(module: ModuleSpec) -> None:
    """Raise `BuildFailed` unless the module's image tokens are as many as the kernels are for."""
    for tensor in module.inputs:
        if tensor.name == IMAGE_TOKENS and tensor.shape[1] != TOKENS:
            raise BuildFailed(
                f"The attention kernel is for {TOKENS} image tokens, {module.name} takes "
                f"{tensor.shape[1]}.",
                "Build without the attention kernel: TensorRT compiles the subroutine itself.",
            )


def register_plugins(flavour: Flavour, architecture: str) -> None:
    """Make both plugins known to TensorRT, to be called before a model that uses them is parsed.

    `architecture` (`sm_90`) is what the PTX is compiled for; GPUs from that one on can run it.
    Calling it again changes the architecture of engines built afterwards. The network should be
    created with `NetworkDefinitionCreationFlag.PREFER_AOT_PYTHON_PLUGINS`. Raises `InvalidRequest`
    on a flavour without plugins and `BackendUnavailable` without `tensorrt.plugin`.
    """
    flavour.require("plugins")
    binding = flavour.module()
    try:
        trtp = import_module(f"{flavour.module_name}.plugin")
        # The ahead-of-time kind came later than the module.
        aot_impl, launch_params = trtp.aot_impl, trtp.KernelLaunchParams
    except (ImportError, AttributeError) as error:
        raise BackendUnavailable(
            f"This {flavour.label} cannot put a kernel into an engine: {error}.",
            f"Update {flavour.label}, or build without the attention kernel.",
        ) from None
    # A UNet asks for the same PTX in each of its 70 blocks.
    ptx = cache(lambda size, dtype: compile_kernels(architecture, size, dtype).code.decode())
    known = getattr(trtp.op, FUNCTION_DOMAIN, None)
    describe = (_statistics_outputs(trtp, binding), _output_outputs(trtp))
    implement = (
        _statistics_kernel(trtp, binding, launch_params, ptx),
        _output_kernel(trtp, binding, launch_params, ptx),
    )
    for name, shapes, kernel in zip(
        (STATISTICS_PLUGIN, OUTPUT_PLUGIN), describe, implement, strict=True
    ):
        if getattr(known, name, None) is None:
            trtp.register(f"{FUNCTION_DOMAIN}::{name}")(shapes)
        aot_impl(f"{FUNCTION_DOMAIN}::{name}")(kernel)


def _statistics_outputs(trtp: Any, binding: Any) -> Any:
    def outputs(q: Any, k: Any, manipulation: Any) -> Any:
        rows, heads, positions, _ = q.shape_expr
        return (
            trtp.from_shape_expr((rows, heads, positions, TOKENS), binding.DataType.FLOAT),
            trtp.from_shape_expr(
                (rows, heads, STATISTICS_PER_HEAD, TOKENS), binding.DataType.FLOAT
            ),
        )

    return _annotated(outputs, trtp, tuple[trtp.TensorDesc, trtp.TensorDesc])


def _output_outputs(trtp: Any) -> Any:
    def outputs(
        q: Any, k: Any, v: Any, manipulation: Any, ip_scale: Any, maps: Any, statistics: Any
    ) -> Any:
        return q.like()

    return _annotated(outputs, trtp, trtp.TensorDesc)


def _statistics_kernel(trtp: Any, binding: Any, launch_params: Any, ptx: Ptx) -> Any:
    def kernel(q: Any, k: Any, manipulation: Any, outputs: Any, tactic: Any) -> Any:
        launch = launch_params()
        launch.grid_x = q.shape_expr[0] * q.shape_expr[1]
        launch.block_x = STATISTICS_THREADS
        code = ptx(*_variant(binding, q))
        return STATISTICS_KERNEL, code, launch, _counts(trtp, q, manipulation)

    return _annotated(kernel, trtp, _kernel_type(trtp))


def _output_kernel(trtp: Any, binding: Any, launch_params: Any, ptx: Ptx) -> Any:
    def kernel(
        q: Any,
        k: Any,
        v: Any,
        manipulation: Any,
        ip_scale: Any,
        maps: Any,
        statistics: Any,
        outputs: Any,
        tactic: Any,
    ) -> Any:
        launch = launch_params()
        launch.grid_x = trtp.cdiv(q.shape_expr[2], OUTPUT_POSITIONS)
        launch.grid_y = q.shape_expr[0] * q.shape_expr[1]
        launch.block_x = OUTPUT_THREADS
        code = ptx(*_variant(binding, q))
        return OUTPUT_KERNEL, code, launch, _counts(trtp, q, manipulation)

    return _annotated(kernel, trtp, _kernel_type(trtp))


def _kernel_type(trtp: Any) -> Any:
    return tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]


def _annotated(function: Any, trtp: Any, returns: Any) -> Any:
    """TensorRT reads a plugin's tensors and results from annotations, which exist only with it."""
    code = function.__code__
    tensors = [name for name in code.co_varnames[: code.co_argcount] if name not in _NO_TENSORS]
    function.__annotations__ = {**dict.fromkeys(tensors, trtp.TensorDesc), "return": returns}
    return function


_NO_TENSORS = ("outputs", "tactic")


def _counts(trtp: Any, q: Any, manipulation: Any) -> Any:
    """R, B, H and N, which the kernels take between their inputs and their outputs."""
    counts = trtp.SymIntExprs(4)
    for index, size in enumerate((manipulation.shape_expr[0], *list(q.shape_expr)[:3])):
        counts[index] = trtp.SymInt32(size)
    return counts


def _variant(binding: Any, q: Any) -> tuple[int, str]:
    """Head size and dtype of the kernels for this q."""
    dtypes = {binding.DataType.HALF: "float16", binding.DataType.FLOAT: "float32"}
    if q.dtype not in dtypes:
        raise InvalidRequest(
            f"The attention kernel has no variant for {q.dtype}.",
            "Build in fp16 or fp32, or without the attention kernel.",
        )
    size = q.shape_expr[3]
    if not size.is_constant:
        raise InvalidRequest(
            "The head size of a decoupled attention is not known at build time.",
            "Export the UNet with constant channels, or build without the attention kernel.",
        )
    return size.constant_value(), dtypes[q.dtype]


def with_plugins(model: memoryview) -> bytes:
    """An ONNX model whose decoupled attentions are the two plugins.

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
