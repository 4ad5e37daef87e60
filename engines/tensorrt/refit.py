"""Put other weights into a built plan, on the GPU, and write the result as a new plan.

Two routes exist. `OnnxParserRefitter` parses the whole new model and sets every weight by the names
that the parser gives. This uses `Refitter` directly instead: the build named each weight after its
initialiser (`network.name_weights`), so only what changed is set, by address from the mapped file
and without a parse, and the plan's own list of weights shows beforehand what cannot be set.

A refit happens in an engine in memory that nobody else uses, and is kept only once it is written.
"""

import mmap
from pathlib import Path
from typing import Any

from fastface_trt.engines.manifest import ModuleSpec
from fastface_trt.engines.onnx_file import OnnxFile
from fastface_trt.engines.tensorrt.flavour import Flavour
from fastface_trt.engines.tensorrt.network import MessageLog, weight_types
from fastface_trt.engines.tensorrt.plan import PLAN, write_all
from fastface_trt.engines.weight_map import Change
from fastface_trt.errors import BuildFailed, EngineMismatch

_BUILD = "Build it instead: fastface-trt build."


def refit_plan(
    flavour: Flavour,
    module: ModuleSpec,
    change: Change,
    onnx: OnnxFile,
    folder: Path,
    target: Path,
    *,
    stripped: bool = False,
) -> None:
    """Write `target`/engine.plan: that of `folder` with the weights of `onnx` where they changed.

    With `stripped` the plan holds no weights, and gets all of them. The new plan can be refitted
    again. Raises `EngineMismatch` for a plan that takes no weights, or not these; `BuildFailed`
    with TensorRT's reason; `OSError` for a full disk. Needs a GPU, and memory for the plan twice.
    """
    binding = flavour.module()
    log = MessageLog(binding)
    engine = _deserialize(flavour, binding, log, module, folder / PLAN)
    if not engine.refittable:
        raise EngineMismatch(
            f"The engine of {module.name} was built without the option refittable.",
            "Build it with --refittable.",
        )
    refitter = log.attach(binding.Refitter(engine, log.logger))
    known = set(refitter.get_all_weights())
    wanted = known if stripped else {one.name for one in change.engine}
    refused = sorted(wanted - known) or sorted(wanted - onnx.initializers.keys())
    if refused:
        raise EngineMismatch(
            f"The engine of {module.name} has no replaceable weight {refused[0]}.", _BUILD
        )
    types = weight_types(binding)
    given: set[str] = set()
    while wanted:
        for name in sorted(wanted):
            one = onnx.initializers[name]
            count = refitter.get_weights_prototype(name).size
            weights = binding.Weights(types[one.dtype], one.address, count)
            if weights.nbytes != len(one.data) or not refitter.set_named_weights(name, weights):
                raise _failed(flavour, module, f"it refuses the weight {name}", log)
        given |= wanted
        # A weight that TensorRT merged with one of these has to come along, changed or not.
        wanted = set(refitter.get_missing_weights()) - given
        if not wanted <= onnx.initializers.keys():
            lost = sorted(wanted - onnx.initializers.keys())[0]
            raise _failed(flavour, module, f"it also asks for {lost or 'an unnamed weight'}", log)
    if not refitter.refit_cuda_engine():
        raise _failed(flavour, module, "the refit failed", log)
    del refitter
    _serialize(flavour, binding, log, module, engine, target)


def _deserialize(
    flavour: Flavour, binding: Any, log: MessageLog, module: ModuleSpec, plan: Path
) -> Any:
    runtime = log.attach(binding.Runtime(log.logger))
    runtime.engine_host_code_allowed = False
    with (
        open(plan, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        engine = runtime.deserialize_cuda_engine(content)
    if engine is None:
        raise EngineMismatch(
            f"{flavour.label} cannot open the engine of {module.name}: {log.reason()}", _BUILD
        )
    return engine


def _serialize(
    flavour: Flavour,
    binding: Any,
    log: MessageLog,
    module: ModuleSpec,
    engine: Any,
    target: Path,
) -> None:
    config = engine.create_serialization_config()
    config.clear_flag(binding.SerializationFlag.EXCLUDE_WEIGHTS)
    config.set_flag(binding.SerializationFlag.INCLUDE_REFIT)  # or this was the plan's last refit
    plan = engine.serialize_with_config(config)
    if plan is None:
        raise _failed(flavour, module, "the refitted engine cannot be written", log)
    with open(target / PLAN, "wb", buffering=0) as file:
        write_all(file, memoryview(plan))


def _failed(flavour: Flavour, module: ModuleSpec, what: str, log: MessageLog) -> BuildFailed:
    return BuildFailed(
        f"{flavour.label} cannot refit {module.name}: {what} ({log.reason()}).", _BUILD
    )
