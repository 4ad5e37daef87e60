"""Engines that can become the engine of another module by taking its weights."""

from collections.abc import Iterable, Mapping
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

    Same backend, version, options, hardware, inputs, outputs, and the same graph but for its
    weights; in the order given. Whether every changed weight can be replaced shows in the refit.
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
    """Whether `donor` was built for a module of the same interface in the same way."""
    same_module = (
        donor.module.name == module.name
        and donor.module.inputs == module.inputs
        and donor.module.outputs == module.outputs
    )
    if not same_module or not has_map(donor):
        return False
    return _without_strip(donor.model_dump(include=_IDENTITY)) == _without_strip(
        builder.identity(module)
    )


def _without_strip(identity: Mapping[str, Any]) -> dict[str, Any]:
    """A stripped plan is a full one whose weights are missing, which a refit puts in."""
    values = {"options": {}, "hardware": {}} | dict(identity)
    values["options"] = {k: v for k, v in values["options"].items() if k != "strip_weights"}
    return values
