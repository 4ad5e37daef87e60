"""Engines that can become the engine of another module by taking its weights."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastface_trt.engines.engine import EngineBuilder
from fastface_trt.engines.manifest import EngineManifest, ModuleSpec
from fastface_trt.engines.onnx_file import OnnxFile
from fastface_trt.engines.topology import topology
from fastface_trt.engines.weight_map import has_map, read_map
from fastface_trt.errors import FastFaceError

_IDENTITY = {"backend", "backend_version", "options", "hardware"}


def find_donors(
    engines: Iterable[EngineManifest],
    root: Path,
    module: ModuleSpec,
    source: Path,
    builder: EngineBuilder,
) -> list[EngineManifest]:
    """Those of `engines` in cache folder `root` that were built like `module` would be.

    Options and hardware that `builder` accepts, the same inputs and outputs, and the same graph but
    for its weights; in the order given. Whether every changed weight can be replaced shows later.
    """
    alike = [one for one in engines if may_donate(one, module, builder)]
    if not alike:
        return []
    donors = []
    try:
        with OnnxFile(source / module.files[0].path) as onnx:
            wanted = topology(onnx)
    except FastFaceError:
        return []  # whoever reads the file next says what is wrong with it
    for one in alike:
        try:
            if read_map(one, root / one.key).topology == wanted:
                donors.append(one)
        except FastFaceError:
            continue
    return donors


def may_donate(donor: EngineManifest, module: ModuleSpec, builder: EngineBuilder) -> bool:
    """Whether `builder` would use an engine of `module` that is built like `donor`."""
    same_module = (
        donor.module.name == module.name
        and donor.module.inputs == module.inputs
        and donor.module.outputs == module.outputs
    )
    if not same_module or not has_map(donor):
        return False
    same_build = {"options": {}, "hardware": {}} | dict(builder.identity(module))
    return build_identity(donor) == same_build or builder.takes(
        donor.model_copy(update=build_identity(donor))
    )


def build_identity(donor: EngineManifest) -> dict[str, Any]:
    """The builder's identity of an engine that a refit makes from `donor`.

    A stripped plan is a full one whose weights are missing, and a refit puts them in.
    """
    identity = donor.model_dump(include=_IDENTITY)
    identity["options"] = {k: v for k, v in donor.options.items() if k != "strip_weights"}
    return identity
