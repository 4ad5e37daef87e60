"""TensorRT and TensorRT-RTX as a backend: identity, build, what an engine may run on, and refit.

A refit puts other weights into a built plan, on the GPU, and writes the result as a new plan. Two
routes exist. `OnnxParserRefitter` parses the whole new model and sets every weight by the names
that the parser gives. This uses `Refitter` directly instead: the build named each weight after its
initialiser (`network.name_weights`), so only what changed is set, by address from the mapped file
and without a parse, and the plan's own list of weights shows beforehand what cannot be set. It
happens in an engine in memory that nobody else uses, and is kept only once it is written.
"""

import mmap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastface_trt.engines.cuda.device import CudaDevice, SharedDevice
from fastface_trt.engines.engine import Progress
from fastface_trt.engines.hardware import cuda_driver, cuda_hardware
from fastface_trt.engines.manifest import BuildReport, EngineManifest, ModuleSpec
from fastface_trt.engines.onnx.file import OnnxFile
from fastface_trt.engines.tensorrt.engine import TensorRTEngine
from fastface_trt.engines.tensorrt.flavour import Flavour, FlavourName, find_flavour
from fastface_trt.engines.tensorrt.network import MessageLog, weight_types
from fastface_trt.engines.tensorrt.options import TensorRTOptions
from fastface_trt.engines.tensorrt.plan import PLAN, Event, Job, run_in_child, write_all
from fastface_trt.engines.tensorrt.profiles import choose_profile, make_profiles, read_profiles
from fastface_trt.engines.weight_map import Change, find_change, read_map
from fastface_trt.errors import BackendUnavailable, BuildFailed, EngineMismatch

ANY_TARGET = "any"
"""What the hardware of a TensorRT-RTX engine says when no GPU generation was chosen."""

Misfit = tuple[str, str, str, str]
"""A field, its value in the engine, its value here, and what to do."""

_BUILD_AGAIN = "Build it again on this machine: fastface-trt build."
_BUILD = "Build it instead: fastface-trt build."


class TensorRTBuilder:
    """Builds plans of one flavour in a child process, and opens them.

    With `exact` only an engine of exactly these options will do; without, any engine of the module
    that this machine can run and that is of the right sizes, such as one built with more profiles.
    `on_event` is told what happens during a build (see `plan.Event`) with the module's name added;
    `timing_cache` is a file that TensorRT keeps its measurements in, and TensorRT-RTX ignores.
    """

    def __init__(
        self,
        flavour: FlavourName,
        options: TensorRTOptions | None = None,
        *,
        exact: bool = True,
        timing_cache: Path | None = None,
        on_event: Callable[[Event], None] = lambda event: None,
    ) -> None:
        self.flavour: Flavour = find_flavour(flavour)
        self.backend: str = flavour
        self.options = options or TensorRTOptions()
        self.options.check_flavour(self.flavour)
        self._exact = exact
        self._timing_cache = timing_cache
        self._on_event = on_event
        self._device = SharedDevice()

    def identity(self, module: ModuleSpec) -> Mapping[str, Any]:
        """Flavour, its version, the module's profiles, the options, and the GPU it is tied to.

        A TensorRT plan belongs to one GPU model, with `same_compute_capability` to all of its
        compute capability, with `hardware_compatible` to everything from Ampere on; a TensorRT-RTX
        plan to the generations that were chosen.
        """
        profiles = [one.model_dump(mode="json") for one in make_profiles(module, self.options)]
        return {
            "backend": self.backend,
            "backend_version": self.flavour.version(),
            "options": {"profiles": profiles, **self.options.engine_options()},
            "hardware": self._hardware(),
        }

    def check_runs_here(self) -> None:
        """Raise `BackendUnavailable` without the binding, or without a GPU that it takes."""
        self.flavour.module()
        gpu = cuda_hardware()
        if gpu["gpu"] != "unknown":
            self.flavour.check_gpu(gpu)
        else:
            builds = "builds_without_gpu" in self.flavour.supports
            raise BackendUnavailable(
                f"{self.flavour.label} finds no NVIDIA GPU and driver here.",
                "Use the backend onnxruntime"
                + (", or `fastface-trt build` to build for another machine." if builds else "."),
            )

    def takes(self, manifest: EngineManifest) -> bool:
        """Without `exact`: an engine of this backend and version that has the wanted profiles."""
        if self._exact or manifest.backend != self.backend or _stripped(manifest):
            return False
        built = read_profiles(manifest)
        wanted = make_profiles(manifest.module, self.options)
        if any(choose_profile(built, profile.best) is None for profile in wanted):
            return False
        return self._misfit(manifest, cuda_hardware()) is None

    def build(
        self, module: ModuleSpec, source: Path, target: Path, progress: Progress
    ) -> BuildReport:
        """Write `target`/engine.plan; raises `BuildFailed`, `BackendUnavailable` or `OSError`.

        Memory for about two and a half times the module's weights; the ONNX file is mapped.
        """
        if "builds_without_gpu" not in self.flavour.supports:
            self.check_runs_here()
        elif cuda_hardware()["gpu"] != "unknown" and not self.options.targets:
            self.flavour.check_gpu(cuda_hardware())  # an engine for this GPU would never open
        for dtype in {tensor.dtype for tensor in (*module.inputs, *module.outputs)}:
            if dtype == "bfloat16":
                raise BuildFailed(
                    f"Module {module.name} has bfloat16 inputs or outputs, which the host cannot "
                    "hold.",
                    "Export it again with this version, which casts inside the module.",
                )
        job = Job(
            flavour=self.flavour.name,
            options=self.options,
            module=module,
            source=str(source.absolute()),
            target=str(target.absolute()),
            timing_cache=None if self._timing_cache is None else str(self._timing_cache),
        )

        def tell(event: Event) -> None:
            if event["event"] == "parsed":
                progress(f"{module.name}: {event['layers']} layers in {event['seconds']:.0f} s")
            self._on_event({"module": module.name, **event})

        facts = run_in_child(job, tell)
        return BuildReport(**facts, built_on=cuda_hardware() | cuda_driver())

    def refit(
        self, base: EngineManifest, folder: Path, module: ModuleSpec, source: Path, target: Path
    ) -> Change:
        """Write the plan of `module` into `target`: that of `base` with other weights.

        A stripped one gets all weights, so this is also how a shipped engine is completed. Raises
        `EngineMismatch`, `BuildFailed`, `OSError`; `BackendUnavailable` without a GPU.
        """
        self._check(base)
        built = read_map(base, folder)
        with OnnxFile(source / module.files[0].path) as onnx:
            change = find_change(module, built, onnx)
            if change.changed and not base.options.get("refittable", False):
                raise EngineMismatch(
                    f"The engine of {module.name} takes only the weights that it was built with, "
                    f"and {change.changed[0]} differs.",
                    "Build it with --refittable.",
                )
            refit_plan(self.flavour, module, change, onnx, folder, target, stripped=_stripped(base))
        built.with_weights(change.weights).write(target)
        return change

    def open(self, manifest: EngineManifest, folder: Path) -> TensorRTEngine:
        """Load a verified plan onto the GPU.

        Raises `EngineMismatch` naming the field that differs when it was built for another flavour,
        version or GPU, `BackendUnavailable` without a GPU, `OutOfMemory` before anything is loaded.
        """
        self._check(manifest)
        if _stripped(manifest):
            raise EngineMismatch(
                f"The engine of {manifest.module.name} was built without its weights.",
                "Put them in first: fastface-trt refit --export FOLDER.",
            )
        return TensorRTEngine.open(
            self.flavour, manifest, folder, self.device(), self.options.kernel_specialization
        )

    def _check(self, manifest: EngineManifest) -> None:
        """Raise unless an engine of this manifest can be opened on this machine."""
        self.check_runs_here()
        misfit = self._misfit(manifest, cuda_hardware())
        if misfit is not None:
            field, built, here, hint = misfit
            raise EngineMismatch(
                f"The engine of {manifest.module.name} was built with {field} {built}, here it is "
                f"{here}.",
                hint,
            )

    def device(self) -> CudaDevice:
        """GPU 0, which all engines of this builder share."""
        return self._device.get()

    def _misfit(self, manifest: EngineManifest, gpu: Mapping[str, str]) -> Misfit | None:
        """The first field in which an engine does not fit this machine, None if it fits."""
        if manifest.backend != self.backend:
            return "backend", manifest.backend, self.backend, _BUILD_AGAIN
        built, here = manifest.backend_version, self.flavour.version()
        forward = manifest.options.get("version_compatible", False)
        if built != here and not (forward and _version(built) < _version(here)):
            return "backend_version", built, here, _BUILD_AGAIN
        targets = manifest.hardware.get("targets")
        if targets is not None:
            generation = "sm" + gpu["compute_capability"].replace(".", "")
            if targets == ANY_TARGET or generation in targets.split():
                return None
            hint = f"Build it with --target {generation}, or without --target for all."
            return "targets", targets, generation, hint
        if manifest.options.get("hardware_compatible", False):
            capability = gpu["compute_capability"]
            if _version(capability) >= (8, 0):
                return None
            hint = "Build it without --hardware-compatible on this machine."
            return "compute_capability", "8.0 or later", capability, hint
        for field, value in manifest.hardware.items():
            if gpu.get(field) != value:
                return field, value, gpu.get(field, "unknown"), _BUILD_AGAIN
        return None

    def _hardware(self) -> dict[str, str]:
        if "compute_capabilities" in self.flavour.supports:
            return {"targets": " ".join(self.options.targets) or ANY_TARGET}
        if self.options.hardware_compatible:
            return {}
        gpu = cuda_hardware()
        fields = ("compute_capability",) if self.options.same_compute_capability else tuple(gpu)
        return {field: gpu[field] for field in fields}


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


def _stripped(manifest: EngineManifest) -> bool:
    return bool(manifest.options.get("strip_weights", False))


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdigit())
