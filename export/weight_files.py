"""Files of weights as their headers show them: tensors by name, type and shape, read on demand.

A safetensors file is read by its header, a `.bin`, `.pt`, `.pth` or `.ckpt` by torch's unpickler
restricted to weights, with its data mapped and not read. What a file is, its first bytes say, not
its name's ending. Weights of scaled fp8 are given by their values; what wraps a training
checkpoint (`state_dict`, `module.`) is taken off. Nothing here knows what the tensors mean;
`fastface_trt.export.file_kinds` does.
"""

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fastface_trt.errors import WeightsError
from fastface_trt.export.number_formats import (
    PLAIN,
    TensorHeader,
    dequantised,
    plain_tensors,
)

State = dict[str, Tensor]

TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_LONGEST_HEADER = 100_000_000
"""Bytes; the library that wrote the file reads no longer ones."""
_DOWNLOAD = "It may be truncated or hold something else: download it again."


@dataclass(frozen=True)
class WeightsFile:
    """One file's tensors by name, and the metadata that safetensors keeps as strings."""

    path: Path
    tensors: Mapping[str, TensorHeader]
    metadata: Mapping[str, str] = field(default_factory=dict)
    _loaded: Mapping[str, Tensor] | None = None
    _wrapping: str = ""
    """What stands before every name in the file."""
    _scales: Mapping[str, str] = field(default_factory=dict)

    def read(self) -> State:
        """All tensors, in the types of the file, those of scaled fp8 in float32."""
        return dict(self.items())

    def on_meta(self) -> State:
        """All tensors by their shapes alone, on torch's meta device."""
        return {name: torch.empty(h.shape, device="meta") for name, h in self.tensors.items()}

    def items(self, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Name and tensor one after the other (of `names`, or all), so that a large file needs no
        memory of its size."""
        wanted = self.tensors if names is None else names
        if self._loaded is not None:
            for name in wanted:
                yield name, self._value(name, self._loaded.__getitem__)
            return
        with safe_open(self.path, framework="pt") as file:
            for name in wanted:
                yield name, self._value(name, file.get_tensor)

    def _value(self, name: str, get: Callable[[str], Tensor]) -> Tensor:
        weight = get(self._wrapping + name)
        if name not in self._scales:
            return weight
        return dequantised(weight, get(self._wrapping + self._scales[name]))


def open_weights(path: Path) -> WeightsFile:
    """The header of a weights file; raises `WeightsError` for what is none, or cannot be read."""
    if not path.is_file():
        raise WeightsError(f"There is no file {path}.", "Check the path, or download it again.")
    with path.open("rb") as opened:
        start = opened.read(64)
    _check_start(path.name, start)
    try:
        is_torch = start.startswith((b"PK", b"\x80"))
        file = _open_torch(path) if is_torch else _open_safetensors(path)
    except WeightsError:
        raise
    except Exception as error:
        raise WeightsError(
            f"{path.name} is not a readable weights file ({type(error).__name__}).", _DOWNLOAD
        ) from error
    if not file.tensors:
        raise WeightsError(f"{path.name} holds no tensors.", _DOWNLOAD)
    return _plain(_unwrapped(file))


def _check_start(name: str, start: bytes) -> None:
    """What is often saved under the name of a weights file, said by name."""
    text = start.lstrip().lower()
    if start.startswith(b"GGUF"):
        raise WeightsError(f"{name} is a GGUF file, whose weights cannot be read here.", PLAIN)
    if text.startswith((b"<!doctype", b"<html")):
        raise WeightsError(f"{name} is a web page, not weights.", "Download the file itself.")
    if text.startswith(b"version https://git-lfs"):
        raise WeightsError(f"{name} is a pointer of git-lfs, not weights.", "Run `git lfs pull`.")


_TRAINING = re.compile(
    r"(optimizers?|optimizer_states|lr_schedulers?|scheduler|callbacks|loops|grad_scaler|scaler|rng\w*"
    r"|random_states)\."
)


def _unwrapped(file: WeightsFile) -> WeightsFile:
    """A training checkpoint without what is wrapped around its weights, and without its training
    state; other files as they are."""
    names, wrapping = list(file.tensors), ""
    for outer in ("state_dict.", "model_state_dict.", "module.", "_orig_mod.", "module."):
        weights = [name for name in names if not _TRAINING.match(name)]
        if weights and all(name.startswith(outer) for name in weights):
            names = [name.removeprefix(outer) for name in weights]
            wrapping += outer
    if not wrapping:
        return file
    tensors = {name: file.tensors[wrapping + name] for name in names}
    return replace(file, tensors=tensors, _wrapping=wrapping)


def _plain(file: WeightsFile) -> WeightsFile:
    weights, scales = plain_tensors(file.path.name, file.tensors)
    return replace(file, tensors=weights, _scales=scales)


def _open_safetensors(path: Path) -> WeightsFile:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        size = path.stat().st_size
        if length > size - 8:
            raise WeightsError(f"{path.name} is not a complete safetensors file.", _DOWNLOAD)
        if length > _LONGEST_HEADER:
            raise WeightsError(f"{path.name} has a header of {length} bytes.", _DOWNLOAD)
        header = json.loads(file.read(length))
    metadata = header.pop("__metadata__", None) or {}
    end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if end != size:
        raise WeightsError(f"{path.name} has {size} bytes instead of {end}.", _DOWNLOAD)
    with safe_open(path, "pt"):
        pass  # it compares all shapes, types and places with each other
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
    torch.int16: "I16",
    torch.bool: "BOOL",
}


def _open_torch(path: Path) -> WeightsFile:
    zipped = path.open("rb").read(2) == b"PK"  # older files are one pickle, which cannot be mapped
    try:
        unpickled = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        wants = found[1] if found else "code of its own"
        if "torchao" in wants or "quanto" in wants:
            raise WeightsError(
                f"{path.name} holds weights in a format of {wants.split('.')[0]}, which cannot be "
                "read here.",
                PLAIN,
            ) from error
        if found or "weights_only" in str(error):
            raise WeightsError(
                f"{path.name} is an unsafe pickle: opening it would run {wants}, which is refused.",
                "Use the model as .safetensors, or as a file that holds tensors alone.",
            ) from error
        raise
    loaded = dict(_flat(unpickled)) if isinstance(unpickled, Mapping) else {}
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
