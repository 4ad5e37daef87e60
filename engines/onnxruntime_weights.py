"""Weights inside an ONNX Runtime engine: found by content after a build, replaced by a refit.

ONNX Runtime keeps the names of weights that it leaves alone and invents names for copies that it
makes in another layout or type, so a weight is identified by the hash of its bytes. Names serve
only to tell weights of equal content apart (norms that are all ones).
"""

import hashlib
import os
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path

from fastface_trt.engines.onnx_file import Initializer, OnnxFile
from fastface_trt.engines.topology import is_weight
from fastface_trt.engines.weight_layout import (
    arrange,
    can_become,
    cast,
    possible_layouts,
    same_layout,
    view,
)
from fastface_trt.engines.weight_map import UNKNOWN, Change, EngineWeight, Weight
from fastface_trt.errors import EngineMismatch

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


def replace_weights(old: Path, new: Path, graph: str, change: Change, onnx: OnnxFile) -> None:
    """Copy the engine's files from folder `old` to `new` and put the weights of `onnx` into them.

    Raises `EngineMismatch` when a weight is not where the map says,
    `OSError` for a full disk.
    """
    for path in sorted(old.iterdir()):
        if path.name.startswith(Path(graph).stem):
            shutil.copyfile(path, new / path.name)
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
        if one.dtype != dtype and _count(one.shape) == _count(shape):
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


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _sha(data: memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def _write_all(file: int, content: bytes) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(file, rest) :]
