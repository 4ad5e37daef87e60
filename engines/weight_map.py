"""Which weight of a module lies where in its engine: written at build time, read by a refit.

A built engine can take the weights of another module exactly when everything else agrees: nodes,
how they are wired, attributes, functions, shapes, and every constant that is no weight. That is the
topology of an ONNX file: a list of parts, each with a label that a person understands and a digest,
so that two are compared part by part and the first difference has a name.

`weights.json` is a file of the engine like any other, so the cache verifies it by hash. It holds
the topology of the ONNX file, the hash of every weight in it, and for every weight of the engine
the initialiser that it came from and the layout that it has. A weight is found in the engine by
its content, not by what a tool is believed to have done with it.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Final, Literal

from pydantic import ValidationError

from fastface_trt.engines.dtypes import WEIGHTS
from fastface_trt.engines.manifest import EngineManifest, ModuleSpec, Strict
from fastface_trt.engines.onnx.file import (
    FUNCTION_NAME,
    GRAPH_INITIALIZER,
    GRAPH_INPUT,
    GRAPH_NODE,
    GRAPH_OUTPUT,
    GRAPH_SPARSE,
    MODEL_FUNCTION,
    MODEL_OPSET,
    NODE_DOC,
    NODE_METADATA,
    NODE_NAME,
    Initializer,
    OnnxFile,
)
from fastface_trt.errors import EngineMismatch

WEIGHT_MAP: Final = "weights.json"
UNKNOWN: Final = "unknown"
"""Layout of an engine weight whose bytes several layouts explain (all zeros): it cannot change."""

_BUILD: Final = "Build it instead: fastface-trt build."

Topology = tuple[str, ...]
"""`LABEL DIGEST` of every part: opsets and functions, inputs and outputs, constants, nodes."""

_NODE_WORDS = frozenset((NODE_NAME, NODE_DOC, NODE_METADATA))
"""Fields of a node that say nothing about what it computes: name, documentation, metadata."""


def is_weight(one: Initializer) -> bool:
    """Whether an initialiser may differ between two modules of one topology.

    Everything with more than one element that training or a LoRA changes; single numbers and
    integers (axes, shapes, bounds) are part of the graph, and builders fold them by value.
    """
    return one.dtype in WEIGHTS and prod(one.shape) > 1


def topology(onnx: OnnxFile) -> Topology:
    """The topology of a model file; raises `ExportIncomplete` for a file that is cut."""
    return tuple(f"{label} {digest}" for label, digest in _parts(onnx))


def first_difference(ours: Sequence[str], theirs: Sequence[str]) -> str | None:
    """The label that the first differing part has in `ours`, None when they are equal."""
    for mine, other in zip(ours, theirs, strict=False):
        if mine != other:
            return mine.rpartition(" ")[0]
    if len(ours) != len(theirs):
        longer = max(ours, theirs, key=len)
        return longer[min(len(ours), len(theirs))].rpartition(" ")[0]
    return None


def _parts(onnx: OnnxFile) -> Iterator[tuple[str, str]]:
    for field, value in onnx.fields(onnx.model):
        if not isinstance(value, memoryview):
            continue
        if field == MODEL_OPSET:
            yield "the operator sets", _digest(value)
        elif field == MODEL_FUNCTION:
            fields = (v for f, v in onnx.fields(value) if f == FUNCTION_NAME)
            name = bytes(next(fields, b"")).decode(errors="replace")
            yield f"function {name}", _digest(value)
    for field, value in onnx.fields(onnx.graph):
        if not isinstance(value, memoryview):
            continue
        if field in (GRAPH_INPUT, GRAPH_OUTPUT):
            yield "the inputs" if field == GRAPH_INPUT else "the outputs", _digest(value)
        elif field == GRAPH_SPARSE:
            yield "a sparse weight", _digest(value)
        elif field == GRAPH_INITIALIZER:
            yield _initializer(onnx, value)
        elif field == GRAPH_NODE:
            yield _node(onnx, value)


def _initializer(onnx: OnnxFile, message: memoryview) -> tuple[str, str]:
    one = onnx.read_initializer(message)
    if one is None:  # its elements are stored one by one, which no large weight is
        return "a constant", _digest(message)
    shape = f"{one.dtype} {one.shape}".encode()
    return f"initialiser {one.name}", _digest(shape if is_weight(one) else shape + bytes(one.data))


def _node(onnx: OnnxFile, message: memoryview) -> tuple[str, str]:
    node = onnx.read_node(message)
    digest = hashlib.sha256()
    for field, value in onnx.fields(message):
        if field not in _NODE_WORDS:
            content = bytes(value) if isinstance(value, memoryview) else str(value).encode()
            digest.update(f"{field} {len(content)} ".encode() + content)
    where = f" of {node.scope}" if node.scope else ""
    return f"node {node.op_type}{where}", digest.hexdigest()[:16]


def _digest(content: memoryview | bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


class Weight(Strict):
    """An initialiser of the ONNX file: element type, shape, SHA-256 of its bytes."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str


class EngineWeight(Strict):
    """A weight inside an engine, `dtype` and `layout` as `ort.weights.arrange` takes them.

    `sources` are the initialisers that it may have come from: one, or several of equal content that
    cannot be told apart in the engine.
    """

    name: str
    sources: tuple[str, ...]
    dtype: str
    layout: str = "same"


class WeightMap(Strict):
    """The contents of `weights.json`."""

    version: Literal[1] = 1
    topology: Topology
    weights: dict[str, Weight]
    engine: tuple[EngineWeight, ...]

    def uncovered(self) -> list[str]:
        """Weights of the module that were not found in the engine."""
        found = {source for one in self.engine for source in one.sources}
        return [name for name in self.weights if name not in found]

    def write(self, folder: Path) -> None:
        """Write `weights.json` into an engine's folder."""
        (folder / WEIGHT_MAP).write_text(self.model_dump_json() + "\n", encoding="utf-8")

    def with_weights(self, weights: Mapping[str, Weight]) -> "WeightMap":
        """The map of an engine that was refitted to `weights`."""
        return self.model_copy(update={"weights": dict(weights)})


class Change(Strict):
    """What a refit has to do: `changed` initialisers, and the `engine` weights made from them.

    `weights` are all of the module's, as they are afterwards; `bytes` those of the changed ones.
    """

    changed: tuple[str, ...]
    engine: tuple[EngineWeight, ...]
    weights: dict[str, Weight]
    bytes: int


def digest_weights(onnx: OnnxFile) -> dict[str, Weight]:
    """Type, shape and hash of every weight of the file; reads all of it once."""
    return {name: describe(one) for name, one in onnx.initializers.items() if is_weight(one)}


def describe(one: Initializer) -> Weight:
    """Type, shape and hash of one initialiser."""
    return Weight(dtype=one.dtype, shape=one.shape, sha256=hashlib.sha256(one.data).hexdigest())


def make_map(
    onnx: OnnxFile, weights: Mapping[str, Weight], engine: Iterable[EngineWeight]
) -> WeightMap:
    """The map of an engine that was built from `onnx`, whose `weights` were digested before."""
    return WeightMap(topology=topology(onnx), weights=dict(weights), engine=tuple(engine))


def has_map(manifest: EngineManifest) -> bool:
    """Whether an engine came with a weight map, so that it can be refitted."""
    return any(file.path == WEIGHT_MAP for file in manifest.files)


def read_map(manifest: EngineManifest, folder: Path) -> WeightMap:
    """The weight map of an engine; raises `EngineMismatch` without one, or when it is cut."""
    name = manifest.module.name
    if not has_map(manifest):
        raise EngineMismatch(f"The engine of {name} was built without a weight map.", _BUILD)
    try:
        return WeightMap.model_validate_json((folder / WEIGHT_MAP).read_text(encoding="utf-8"))
    except (OSError, ValueError, ValidationError):
        raise EngineMismatch(f"{folder / WEIGHT_MAP} cannot be read.", _BUILD) from None


def find_change(module: ModuleSpec, built: WeightMap, onnx: OnnxFile) -> Change:
    """What differs between the weights that an engine holds and those of `onnx`.

    Raises `EngineMismatch` when more than the weights differs, when a changed weight was not found
    in the engine at build time, or when the engine holds one weight where `onnx` now has two.
    """
    part = first_difference(built.topology, topology(onnx))
    if part is not None:
        raise EngineMismatch(
            f"The engine of {module.name} was built from another graph: {part} differs.", _BUILD
        )
    now = digest_weights(onnx)
    changed = tuple(name for name, one in now.items() if built.weights.get(name) != one)
    lost = sorted(set(changed) & set(built.uncovered()))
    if lost:
        raise EngineMismatch(
            f"The build of {module.name} merged {lost[0]} into other values"
            + (f", and {len(lost) - 1} more like it" if len(lost) > 1 else "")
            + ", so it cannot be replaced.",
            _BUILD,
        )
    affected = tuple(one for one in built.engine if not set(changed).isdisjoint(one.sources))
    for one in affected:
        if one.layout == UNKNOWN or len({now[source].sha256 for source in one.sources}) > 1:
            raise EngineMismatch(
                f"The engine of {module.name} does not tell {' and '.join(one.sources[:2])} apart: "
                "they were equal when it was built, and now they are not.",
                _BUILD,
            )
    size = sum(len(onnx.initializers[name].data) for name in changed)
    return Change(changed=changed, engine=affected, weights=now, bytes=size)
