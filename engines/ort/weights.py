"""Weights inside an ONNX Runtime engine: found by content after a build, replaced by a refit.

ONNX Runtime keeps the names of weights that it leaves alone and invents names for copies that it
makes in another layout or type, so a weight is identified by the hash of its bytes. Names serve
only to tell weights of equal content apart (norms that are all ones).

A layout is a word: `same`, `pad`, `permute:1,0` (axes), `blocked:16` or `blocked-out:16`. The last
two are ONNX Runtime's NCHWc layouts of a convolution's weight.

Shape legend: O output channels, I input channels, H × W kernel, b channels per block (o, i inside).
"""

import hashlib
import itertools
import math
import os
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fastface_trt.engines.dtypes import AS_INTEGERS
from fastface_trt.engines.onnx.file import Initializer, OnnxFile
from fastface_trt.engines.weight_map import UNKNOWN, Change, EngineWeight, Weight, is_weight
from fastface_trt.errors import EngineMismatch

Array = NDArray[Any]
Shape = tuple[int, ...]

_BLOCKS: Final = (4, 8, 16, 32)
_CASTS: Final = {("float16", "float32"), ("bfloat16", "float32")}
"""Exact ones only: a rounded copy could not be told from another weight's."""

_BUILD = "Build it instead: fastface-trt build."
_Kind = tuple[str, tuple[int, ...]]
_KEEPS_CONTENT = {"Cast", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}


def find_weights(
    onnx: OnnxFile, weights: Mapping[str, Weight], engine: OnnxFile
) -> list[EngineWeight]:
    """Where the `weights` of a module went in its optimised graph.

    Weights of the graph that no initialiser explains are left out: they were computed from values
    that belong to the topology, or the initialiser is missing from every entry, which
    `WeightMap.uncovered` reports. Time for one pass over all bytes, and one more over those of
    weights that were rearranged.
    """
    targets = [one for one in engine.initializers.values() if is_weight(one)]
    by_content: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, weight in weights.items():
        by_content[weight.dtype, weight.sha256].append(name)
    # Per engine weight and layout, the initialisers that would give its bytes.
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    unexplained: dict[_Kind, dict[str, list[str]]] = {}
    for one in targets:
        sha = _sha(one.data)
        if (one.dtype, sha) in by_content:
            found[one.name]["same"] += by_content[one.dtype, sha]
        else:
            alike = unexplained.setdefault((one.dtype, one.shape), defaultdict(list))
            alike[sha].append(one.name)
    for names in by_content.values():
        # Equal bytes may have several shapes, and each its own layouts.
        shapes = {onnx.initializers[name].shape: name for name in names}
        for shape, first in shapes.items():
            same_shape = [name for name in names if onnx.initializers[name].shape == shape]
            for kind, layout, sha in _variants(onnx.initializers[first], unexplained):
                for name in unexplained[kind].get(sha, ()):
                    if not any(
                        first in others and same_layout(shape, layout, known, kind[1])
                        for known, others in found[name].items()
                    ):
                        found[name][layout] += same_shape
    return _resolve(found, {one.name: one.dtype for one in targets}, _aliases(onnx))


def replace_weights(
    old: Path, new: Path, files: tuple[str, ...], change: Change, onnx: OnnxFile
) -> None:
    """Copy `files`, the graph first, from folder `old` to `new` and put weights of `onnx` in.

    Raises `EngineMismatch` when a weight is not where the map says, `OSError` for a full disk.
    """
    for name in files:
        if (old / name).exists():  # a module whose weights are all small has no data file
            shutil.copyfile(old / name, new / name)
    graph = files[0]
    with OnnxFile(old / graph) as engine:
        for one in change.engine:
            place = engine.initializers.get(one.name)
            if place is None:
                raise EngineMismatch(f"{old / graph} has no weight {one.name}.", _BUILD)
            source = onnx.initializers[one.sources[0]]
            content = _content(source, one.dtype, one.layout, place.shape)
            if len(content) != len(place.data):
                raise EngineMismatch(f"{one.name} in {old / graph} has another size.", _BUILD)
            path, offset = engine.place(place)
            with open(new / path.name, "r+b", buffering=0) as file:
                file.seek(offset)
                _write_all(file.fileno(), content)


def _variants(one: Initializer, wanted: Iterable[_Kind]) -> Iterator[tuple[_Kind, str, str]]:
    """(type and shape, layout, hash) of a weight's possible copies, where a copy is missing."""
    for dtype, shape in wanted:
        if not can_become(one.dtype, dtype):
            continue
        layouts = list(possible_layouts(one.shape, shape))
        if one.dtype != dtype and math.prod(one.shape) == math.prod(shape):
            layouts.append("same")
        for layout in layouts:
            sha = _sha(memoryview(_content(one, dtype, layout, shape)))
            yield (dtype, shape), layout, sha


def _content(one: Initializer, dtype: str, layout: str, shape: tuple[int, ...]) -> bytes:
    array = cast(view(one.data, one.dtype, one.shape), one.dtype, dtype)
    return arrange(array, layout, shape).tobytes()


def _aliases(onnx: OnnxFile) -> dict[str, list[str]]:
    """Names that folding gives to a weight: the outputs of what is done to it first."""
    alias: dict[str, list[str]] = defaultdict(list)
    for node in onnx.nodes:
        if node.op_type in _KEEPS_CONTENT and node.inputs and node.inputs[0] in onnx.initializers:
            alias[node.inputs[0]].append(node.outputs[0])
    return alias


def _resolve(
    found: Mapping[str, Mapping[str, list[str]]],
    dtypes: Mapping[str, str],
    alias: Mapping[str, list[str]],
) -> list[EngineWeight]:
    """One entry per engine weight, told apart by name where contents are equal.

    A name counts only when every initialiser of that content is still there by name: where one is
    not, the optimiser may have merged it with another, and the engine weight stands for both.
    """
    contents = {name: frozenset(chain(*layouts.values())) for name, layouts in found.items()}
    present: dict[frozenset[str], set[str]] = defaultdict(set)
    for name, sources in contents.items():
        present[sources] |= {one for one in sources if _is_named(name, one, alias)}
    entries = []
    for name, layouts in found.items():
        sources = contents[name]
        own = [one for one in sources if _is_named(name, one, alias)]
        if own and present[sources] == sources:
            layout = next(kind for kind, names in layouts.items() if own[0] in names)
            sources = frozenset(own[:1])
        else:
            layout = next(iter(layouts)) if len(layouts) == 1 else UNKNOWN
        entries.append(
            EngineWeight(
                name=name, sources=tuple(sorted(sources)), dtype=dtypes[name], layout=layout
            )
        )
    return entries


def _is_named(name: str, source: str, alias: Mapping[str, list[str]]) -> bool:
    """Whether an engine weight's name says its source; copies get a prefix before it."""
    return any(
        name == known or name.endswith(f"_{known}") for known in (source, *alias.get(source, ()))
    )


def _sha(data: memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def _write_all(file: int, content: bytes) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(file, rest) :]


def view(data: memoryview, dtype: str, shape: Shape) -> Array:
    """The bytes of a weight as an array; types that numpy lacks as integers of their size."""
    return np.frombuffer(data, AS_INTEGERS.get(dtype, dtype)).reshape(shape)


def can_become(dtype: str, other: str) -> bool:
    """Whether a weight of type `dtype` may stand in an engine as type `other`."""
    return dtype == other or (dtype, other) in _CASTS


def cast(array: Array, dtype: str, other: str) -> Array:
    """`array` of type `dtype` as type `other`, exactly."""
    if dtype == other:
        return array
    if dtype == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(other)


def possible_layouts(shape: Shape, target: Shape) -> Iterator[str]:
    """The layouts other than `same` by which a weight of `shape` may have become `target`."""
    if shape == (1,) * len(shape):
        return
    if 2 <= len(shape) <= 4 and sorted(shape) == sorted(target):
        for axes in itertools.permutations(range(len(shape))):
            # A permutation that moves only axes of size 1 leaves the bytes as they are.
            moved = [axis for axis in axes if shape[axis] > 1]
            if moved != sorted(moved) and tuple(shape[axis] for axis in axes) == target:
                yield "permute:" + ",".join(map(str, axes))
    if len(shape) == len(target) == 1 and shape[0] < target[0]:
        yield "pad"
    if len(shape) == len(target) == 4:
        for block in _BLOCKS:
            rows = _up(shape[0], block)
            if target == (rows, _up(shape[1], block), *shape[2:]):
                yield f"blocked:{block}"
            if target == (rows, *shape[1:]):
                yield f"blocked-out:{block}"


def arrange(array: Array, layout: str, shape: Shape) -> Array:
    """`array` in `layout`, filled with zeros up to `shape`; contiguous."""
    kind, _, detail = layout.partition(":")
    if kind == "permute":
        return np.ascontiguousarray(array.transpose([int(axis) for axis in detail.split(",")]))
    if kind == "same":
        return np.ascontiguousarray(array)
    padded = np.zeros(shape, array.dtype)
    padded[tuple(slice(0, size) for size in array.shape)] = array
    if kind == "pad":
        return padded
    block = int(detail)
    o, i, h, w = shape
    if kind == "blocked-out":
        blocks_OoIHW = padded.reshape(o // block, block, i, h, w)
        return np.ascontiguousarray(blocks_OoIHW.transpose(0, 2, 3, 4, 1))
    blocks_OoIiHW = padded.reshape(o // block, block, i // block, block, h, w)
    return np.ascontiguousarray(blocks_OoIiHW.transpose(0, 2, 4, 5, 3, 1))


def same_layout(shape: Shape, one: str, other: str, target: Shape) -> bool:
    """Whether two layouts put every element of a weight of `shape` at the same place."""
    index = np.arange(1, 1 + math.prod(shape)).reshape(shape)
    return np.array_equal(
        arrange(index, one, target).ravel(), arrange(index, other, target).ravel()
    )


def _up(size: int, block: int) -> int:
    return -(-size // block) * block
