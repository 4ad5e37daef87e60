"""Does an engine compute what the PyTorch module computes: a comparison on stored tensors."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fastface_trt.engines.device import Array
from fastface_trt.engines.engine import Engine, check_inputs
from fastface_trt.engines.files import verify_files
from fastface_trt.engines.manifest import ModuleSpec
from fastface_trt.errors import EngineMismatch, ExportIncomplete, InvalidRequest

PROBE_FILE = "probe.safetensors"
INPUT, OUTPUT = "input.", "output."


def read_probe(module: ModuleSpec, source: Path) -> tuple[dict[str, Array], dict[str, Array]]:
    """Inputs and expected outputs of the probe of `module`, whose export lies in `source`.

    Raises `ExportIncomplete` when the module has none, its file is missing or changed, or what is
    in it are not inputs and outputs of the module.
    """
    from safetensors.numpy import load_file

    if module.probe is None:
        raise ExportIncomplete(
            f"The export of {module.name} has no probe to check an engine with.",
            "Export it again with this version.",
        )
    verify_files(source, [module.probe.file])
    try:
        tensors = load_file(source / module.probe.file.path)
    except Exception as error:  # the library's own, and numpy's for types that it lacks
        raise ExportIncomplete(
            f"The probe of {module.name} cannot be read: {error}.", "Export it again."
        ) from None
    sides: tuple[dict[str, Array], dict[str, Array]] = ({}, {})
    for name, tensor in tensors.items():
        prefix = INPUT if name.startswith(INPUT) else OUTPUT
        sides[prefix == OUTPUT][name.removeprefix(prefix)] = tensor
    try:
        check_inputs(module, sides[0])
    except InvalidRequest as error:
        raise ExportIncomplete(
            f"The probe of {module.name} is another module's: {error.message}", "Export it again."
        ) from None
    strange = sides[1].keys() - {tensor.name for tensor in module.outputs}
    if strange or not sides[1]:
        raise ExportIncomplete(
            f"The probe of {module.name} is another module's: its outputs are {sorted(sides[1])}.",
            "Export it again.",
        )
    return sides


def check_probe(engine: Engine, module: ModuleSpec, source: Path) -> dict[str, float]:
    """Run the probe of `module` and return the relative L2 error of each output, ‖e − p‖ / ‖p‖.

    Raises `EngineMismatch` for an error above the probe's tolerance or a value that is not finite,
    and what `read_probe` and the engine raise.
    """
    inputs, expected = read_probe(module, source)
    outputs = {name: engine.device.download(one) for name, one in engine(**inputs).items()}
    errors = relative_errors(outputs, expected)
    assert module.probe is not None
    for name, error in errors.items():
        if not error <= module.probe.tolerance:
            raise EngineMismatch(
                f"The engine of {module.name} does not compute what the export does: {name} is "
                f"off by {error:.2g} (relative L2), {module.probe.tolerance:g} is allowed.",
                "Build it instead: fastface-trt build.",
            )
    return errors


def relative_errors(actual: Mapping[str, Array], expected: Mapping[str, Array]) -> dict[str, float]:
    """‖a − e‖ / ‖e‖ of each output in float64; NaN where `actual` is not finite.

    Of whole numbers, only what is beyond one step counts; see `beyond_rounding`.
    """
    errors = {}
    for name, wanted in expected.items():
        reference = wanted.astype(np.float64)
        difference = actual[name].astype(np.float64) - reference
        if wanted.dtype.kind == "u":
            difference = beyond_rounding(difference)
        scale = float(np.linalg.norm(reference)) or 1.0
        errors[name] = float(np.linalg.norm(difference)) / scale
    return errors


def beyond_rounding(difference: Array) -> Array:
    """What is left of a difference of rounded numbers where a step of 1 is nobody's error.

    What lies near the middle between two may fall to either side on another backend.
    """
    beyond: Array = np.maximum(np.abs(difference) - 1, 0)
    return beyond
