"""The decoupled-attention kernels as a custom operator of an ONNX Runtime engine.

The library of the operator lies in the engine's folder, with the code of the kernels, and is
registered with every session that opens the engine: what was built runs wherever it is carried, as
long as the GPU is the same.

Shape legend: B rows, T image tokens, H heads, D head size.
"""

from pathlib import Path
from typing import Any

from fastface_trt.engines.contract import FUNCTION_NAME, IMAGE_TOKENS, KERNEL_DOMAIN
from fastface_trt.engines.kernels import operator_library
from fastface_trt.engines.manifest import ModuleSpec
from fastface_trt.errors import BuildFailed


def image_tokens(module: ModuleSpec) -> int | None:
    """T of a module that takes image tokens, None for every other."""
    counts = [spec.shape[1] for spec in module.inputs if spec.name == IMAGE_TOKENS]
    return int(counts[0]) if counts else None


def operator_identity(*, available: bool | None = None) -> dict[str, str]:
    """How engines that are built here compute the manipulation: part of their identity.

    `available` stands in for whether the operator's library is here or can be made.
    """
    if available is None:
        available = operator_library.library_status().available
    if not available:
        return {"manipulation": "branches"}
    return {"manipulation": "operator", "operator": operator_library.LIBRARY_VERSION}


def operator_problem() -> str:
    """Why the operator's library cannot be had here, and the hint; empty where it can."""
    status = operator_library.library_status()
    return "" if status.available else f"{status.detail} {status.hint}".strip()


def place_operator(model: bytes, tokens: int, folder: Path) -> None:
    """Put into `folder` the library for the operators of a serialised model.

    Raises `BuildFailed` for attentions that the kernels are not made for, and what
    `place_library` raises.
    """
    heads = _heads(model)
    for size, dtype in sorted(heads):
        if not operator_library.supports(tokens, size, dtype):
            raise BuildFailed(
                f"The attention kernels take no heads of {size} in {dtype} with {tokens} image "
                "tokens.",
                "The graph's own operators compute them.",
            )
    operator_library.place_library(
        folder,
        sorted({size for size, _ in heads}),
        sorted({dtype for _, dtype in heads}),
        tokens=tokens,
    )


def has_operator(folder: Path) -> bool:
    """Whether an engine's folder holds the library."""
    return operator_library.library_in(folder) is not None


def register_operator(options: Any, folder: Path) -> None:
    """Register the library in an engine's folder, if any, with session options."""
    library = operator_library.library_in(folder)
    if library is not None:
        options.register_custom_ops_library(str(library))


def _heads(model: bytes) -> set[tuple[int, str]]:
    """(D, element type) of every operator node, from the inferred shape of its keys [B,T,H·D]."""
    import onnx

    graph = onnx.shape_inference.infer_shapes(onnx.load_model_from_string(model)).graph
    nodes = [
        one for one in graph.node if (one.domain, one.op_type) == (KERNEL_DOMAIN, FUNCTION_NAME)
    ]
    types = {value.name: value.type.tensor_type for value in (*graph.value_info, *graph.input)}
    found = set()
    for node in nodes:
        heads = next(one.i for one in node.attribute if one.name == "num_heads")
        keys = types.get(node.input[1])
        width = keys.shape.dim[-1].dim_value if keys and keys.shape.dim else 0
        if keys is None or not width:
            raise BuildFailed(
                f"The width of {node.input[1]} is not known before a run.",
                "The graph's own operators compute it.",
            )
        dtype = onnx.helper.tensor_dtype_to_np_dtype(keys.elem_type)
        found.add((width // heads, dtype.name))
    return found
