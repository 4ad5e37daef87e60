"""Which weight of a module lies where in its engine: written at build time, read by a refit.

`weights.json` is a file of the engine like any other, so the cache verifies it by hash. It holds
the topology of the ONNX file, the hash of every weight in it, and for every weight of the engine
the initialiser that it came from and the layout that it has. A weight is found in the engine by
its content, not by what a tool is believed to have done with it.
"""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final, Literal

from pydantic import ValidationError

from fastface_trt.engines.hardware import Topology, first_difference, is_weight, topology
from fastface_trt.engines.manifest import EngineManifest, ModuleSpec, Strict
from fastface_trt.engines.onnx.file import Initializer, OnnxFile
from fastface_trt.errors import EngineMismatch

WEIGHT_MAP: Final = "weights.json"
UNKNOWN: Final = "unknown"
"""Layout of an engine weight whose bytes several layouts explain (all zeros): it cannot change."""

_BUILD: Final = "Build it instead: fastface-trt build."


class Weight(Strict):
    """An initialiser of the ONNX file: element type, shape, SHA-256 of its bytes."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str


class EngineWeight(Strict):
    """A weight inside an engine, `dtype` and `layout` as `weight_layout.arrange` takes them.

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
