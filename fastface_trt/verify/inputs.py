"""Inputs to compare backends with: seeded, of the sizes of one picture, and of a likely range."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastface_trt.engines import contract
from fastface_trt.engines.manifest import ExportManifest, ModuleSpec, TensorSpec
from fastface_trt.errors import InvalidRequest
from fastface_trt.runtime.tokenizer import ClipTokenizer

Array = NDArray[Any]

INPUT_IDS = "input_ids"
_PROMPT = "photo; person in a garden, smiling, soft light"
_TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
_MANIPULATION = {
    "scale": 1.5,
    "power": 1.3,
    "quantile": 0.65,
    "sharpness": 5.0,
    "adain_weight": 0.7,
    "invert_first_token": 1.0,
    "upper_bound": 10.0,
}


def picture_sizes(
    module: ModuleSpec, manifest: ExportManifest, branches: int = 3
) -> dict[str, int]:
    """Sizes by name for one request of the export's own picture size, with so many branches.

    They are among those that engines are built for; modules without branches get one row.
    """
    names = {size for tensor in module.inputs for size in tensor.shape}
    branches = branches if "requests" in names or "branches" in names else 1
    _, height, width = manifest.latent_shape()
    return {
        "requests": 1,
        "branches": branches,
        "batch": branches,
        "height": height,
        "width": width,
        "text": contract.TEXT_POSITIONS,
    }


def module_inputs(
    module: ModuleSpec,
    manifest: ExportManifest,
    folder: Path,
    *,
    seed: int = 0,
    branches: int = 3,
) -> dict[str, Array]:
    """Inputs of `module` by name, in the shapes and types of its manifest entry.

    Text is a prompt in the tokens of the export in `folder`; the three parts of the UNet get one
    kind of attention manipulation each; half of the tokens are there where a mask says so;
    everything else is standard normal, which is what latents
    and hidden states nearly are. Raises `InvalidRequest` for an input that it knows no sizes or
    values for.
    """
    rng = np.random.default_rng(seed)
    sizes = picture_sizes(module, manifest, branches)
    return {
        tensor.name: _values(tensor, module, manifest, folder, sizes, rng)
        for tensor in module.inputs
    }


def _values(
    tensor: TensorSpec,
    module: ModuleSpec,
    manifest: ExportManifest,
    folder: Path,
    sizes: dict[str, int],
    rng: np.random.Generator,
) -> Array:
    unknown = [size for size in tensor.shape if isinstance(size, str) and size not in sizes]
    if unknown:
        raise InvalidRequest(
            f"Input {tensor.name} of module {module.name} has a size called {unknown[0]}, "
            "which verify has no value for.",
            "Export it again with this version.",
        )
    shape = tuple(sizes[size] if isinstance(size, str) else size for size in tensor.shape)
    dtype = np.dtype(tensor.dtype)
    if tensor.name == INPUT_IDS:
        tokenizer = ClipTokenizer.from_folder(folder / _TOKENIZERS[module.name])
        return tokenizer.encode([_PROMPT] * shape[0]).input_ids.astype(dtype)
    if tensor.name == contract.TIMESTEP:
        return np.broadcast_to(rng.integers(1, 1000), shape).astype(dtype)
    if tensor.name == contract.TIME_IDS:
        row = [manifest.height, manifest.width, 0, 0, manifest.height, manifest.width]
        return np.broadcast_to(row, shape).astype(dtype)
    if tensor.name == contract.IP_ADAPTER_SCALE:
        return rng.uniform(0.5, 1.0, shape).astype(dtype)
    if tensor.name == contract.MANIPULATION:
        return _manipulation(shape).astype(dtype)
    if tensor.name == contract.TOKEN_MASK:
        mask = np.zeros(shape, dtype)
        mask[:, shape[1] // 2 :] = contract.MASKED
        return mask
    if dtype.kind != "f":
        raise InvalidRequest(
            f"Input {tensor.name} of module {module.name} is {tensor.dtype}, "
            "which verify has no values for.",
            "Export it again with this version.",
        )
    return rng.standard_normal(shape).astype(dtype)


def _manipulation(shape: tuple[int, ...]) -> Array:
    """Softmask on the way down, where most of the UNet comes after it, scale_power on the way up.

    Further requests rotate the kinds.
    """
    kinds = ("softmask", "off", "scale_power")
    rows = np.zeros(shape)
    for request, part in np.ndindex(shape[:2]):
        kind = contract.KINDS.index(kinds[(request + part) % len(kinds)])
        values = {"kind": float(kind), **_MANIPULATION}
        rows[request, part] = [values[column] for column in contract.MANIPULATION_COLUMNS]
    return rows
