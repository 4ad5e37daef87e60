"""Files of weights as their headers show them: tensors by name, type and shape, read on demand.

A safetensors file is read by its header, a `.bin`, `.pt`, `.pth` or `.ckpt` by torch's unpickler
restricted to weights, with its data mapped and not read. Nothing here knows what the tensors mean;
`fastface_trt.export.file_kinds` does.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastface_trt.errors import WeightsError

State = dict[str, Tensor]

TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_DOWNLOAD = "It may be truncated or hold something else: download it again."


@dataclass(frozen=True)
class TensorHeader:
    """Type by safetensors' name (F32, F16, BF16, F8_E4M3 …) and shape of one tensor."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class WeightsFile:
    """One file's tensors by name, and the metadata that safetensors keeps as strings."""

    path: Path
    tensors: Mapping[str, TensorHeader]
    metadata: Mapping[str, str] = field(default_factory=dict)
    _loaded: Mapping[str, Tensor] | None = None

    def read(self) -> State:
        """All tensors, in the types of the file."""
        return dict(self.items())

    def items(self, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor one after the other (of `names`, or all), so that a large file needs no
        memory of its size."""
        wanted = self.tensors if names is None else names
        if self._loaded is not None:
            yield from ((name, self._loaded[name]) for name in wanted)
            return
        from safetensors import safe_open

        with safe_open(self.path, framework="pt") as file:
            for name in wanted:
                yield name, file.get_tensor(name)


def open_weights(path: Path) -> WeightsFile:
    """The header of a weights file; raises `WeightsError` for what is none."""
    if not path.is_file():
        raise WeightsError(f"There is no file {path}.", "Check the path, or download it again.")
    try:
        return _open_safetensors(path) if path.suffix == ".safetensors" else _open_torch(path)
    except WeightsError:
        raise
    except Exception as error:
        raise WeightsError(
            f"{path.name} is not a readable weights file ({type(error).__name__}).", _DOWNLOAD
        ) from error


def _open_safetensors(path: Path) -> WeightsFile:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        size = path.stat().st_size
        if length > size - 8:
            raise WeightsError(f"{path.name} is not a complete safetensors file.", _DOWNLOAD)
        header = json.loads(file.read(length))
    metadata = header.pop("__metadata__", {})
    end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if end != size:
        raise WeightsError(f"{path.name} has {size} bytes instead of {end}.", _DOWNLOAD)
    tensors = {
        name: TensorHeader(entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()
    }
    return WeightsFile(path, tensors, metadata)


_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.bool: "BOOL",
}


def _open_torch(path: Path) -> WeightsFile:
    loaded = dict(_flat(torch.load(path, map_location="cpu", weights_only=True, mmap=True)))
    tensors = {
        name: TensorHeader(_NAMES.get(t.dtype, str(t.dtype)), tuple(t.shape))
        for name, t in loaded.items()
    }
    return WeightsFile(path, tensors, {}, loaded)


def _flat(nested: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Tensors of nested dicts under names joined by dots."""
    for name, value in nested.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, Tensor):
            yield f"{prefix}{name}", value
