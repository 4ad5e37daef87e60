"""Opening ONNX Runtime sessions on exactly the provider that was asked for, and its messages."""

import re
from collections.abc import Sequence
from typing import Any, Literal

from fastface_trt.engines.manifest import ModuleSpec
from fastface_trt.engines.onnxruntime_gpu import ProviderOptions
from fastface_trt.errors import BackendUnavailable

Provider = Literal["cpu", "cuda", "tensorrt", "nv-tensorrt-rtx"]

PROVIDERS: dict[Provider, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "nv-tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
}

REINSTALL = (
    "`onnxruntime` and `onnxruntime-gpu` install over each other, and only the last one counts: "
    "pip uninstall -y onnxruntime onnxruntime-gpu && pip install --no-deps onnxruntime-gpu. "
    "It needs an NVIDIA GPU with the CUDA and cuDNN versions that its release notes name."
)

_ANOTHER_BUILD = (
    "It comes with builds of ONNX Runtime for TensorRT-RTX, in place of onnxruntime; the backend "
    "tensorrt-rtx needs none of them."
)


def open_session(
    graph: str | bytes,
    options: Any,
    provider: Provider,
    provider_options: ProviderOptions | None = None,
) -> Any:
    """An ONNX Runtime session that runs on `provider`; `graph` is a path or a serialised model.

    Raises `BackendUnavailable` when ONNX Runtime would quietly use another provider instead;
    ONNX Runtime's own exceptions for a graph that it cannot load.
    """
    ort = load_onnxruntime()
    wanted = PROVIDERS[provider]
    available = ort.get_available_providers()
    if wanted not in available:
        raise lacks_provider(provider, available)
    # Its fallback would retry on the CPU, when opening and again in the middle of a run.
    session = ort.InferenceSession(
        graph, options, providers=[(wanted, provider_options or {})], enable_fallback=0
    )
    actual = session.get_providers()
    if not actual or actual[0] != wanted:
        raise BackendUnavailable(
            f"ONNX Runtime was asked for {wanted} and took {', '.join(actual) or 'nothing'}.",
            REINSTALL,
        )
    return session


def lacks_provider(provider: Provider, available: Sequence[str]) -> BackendUnavailable:
    """The error that says that this ONNX Runtime has no such provider, and the mend."""
    return BackendUnavailable(
        f"ONNX Runtime {load_onnxruntime().__version__} has no {PROVIDERS[provider]} here, only "
        f"{', '.join(available)}.",
        REINSTALL if provider != "nv-tensorrt-rtx" else _ANOTHER_BUILD,
    )


def load_onnxruntime() -> Any:
    """The package `onnxruntime`; raises `BackendUnavailable` when it is not whole."""
    try:
        import onnxruntime

        # A half-removed installation imports as an empty package.
        onnxruntime.InferenceSession  # noqa: B018
    except (ImportError, AttributeError) as error:
        raise BackendUnavailable(
            f"ONNX Runtime cannot be imported: {error}.",
            "pip install --force-reinstall --no-deps onnxruntime (or onnxruntime-gpu, not both).",
        ) from error
    return onnxruntime


_TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(uint8)": "uint8",
}


def interface_problem(session: Any, module: ModuleSpec) -> str | None:
    """What differs between the session's inputs and outputs and the module's, None if nothing."""
    for side, actual, wanted in (
        ("inputs", session.get_inputs(), module.inputs),
        ("outputs", session.get_outputs(), module.outputs),
    ):
        found = {node.name: _TYPES.get(node.type, node.type) for node in actual}
        expected = {tensor.name: tensor.dtype for tensor in wanted}
        if found != expected:
            return f"its {side} are {found}, expected {expected}"
        if "bfloat16" in found.values():
            return f"its {side} hold bfloat16, which this backend cannot pass; use fp16 or fp32"
    return None


def lacks_a_kernel(error: Exception) -> bool:
    """Whether a graph was refused because no kernel of the provider takes one of its types."""
    return "NOT_IMPLEMENTED" in str(error)


def short_message(error: Exception) -> str:
    """The message of an ONNX Runtime exception without its code prefix and C++ signature."""
    text = " ".join(str(error).split())
    return re.sub(r".*\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)[:300]
