"""Whole modules: a backend's outputs beside those of ONNX Runtime on the CPU, unoptimised."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from fastface_trt.engines.backends import builder_for
from fastface_trt.engines.cache import EngineCache
from fastface_trt.engines.engine import EngineBuilder, Progress
from fastface_trt.engines.manifest import ExportManifest, ModuleSpec
from fastface_trt.engines.onnx.file import verify_module
from fastface_trt.engines.ort.session import open_session
from fastface_trt.engines.tensorrt.options import TensorRTOptions
from fastface_trt.errors import EngineFailed
from fastface_trt.verify.difference import Difference, compare
from fastface_trt.verify.inputs import module_inputs, picture_sizes
from fastface_trt.verify.tolerances import tolerance_for

Array = NDArray[Any]


@dataclass(frozen=True)
class ModuleVerdict:
    """How far one module is from its reference, output by output."""

    module: str
    tolerance: float
    differences: Mapping[str, Difference]

    @property
    def agrees(self) -> bool:
        """Whether every output is within the tolerance."""
        return not any(d.exceeds(self.tolerance) for d in self.differences.values())

    def as_json(self) -> dict[str, Any]:
        """The verdict for machines."""
        return {
            "module": self.module,
            "tolerance": self.tolerance,
            "agrees": self.agrees,
            "outputs": {name: d.as_json() for name, d in self.differences.items()},
        }


def verify_builder(
    backend: str, manifest: ExportManifest, *, threads: int | None = None
) -> EngineBuilder:
    """The builder of `backend` with engines for exactly the sizes that are compared.

    Raises `UnknownName`.
    """
    if backend.startswith("tensorrt"):
        sizes = picture_sizes(manifest.modules["unet"], manifest)
        options = TensorRTOptions(
            requests=(sizes["requests"],),
            branches=(sizes["branches"],),
            latent_sizes=((sizes["height"], sizes["width"]),),
            prompt_windows=1,
        )
        return builder_for(backend, options=options)
    return builder_for(backend, **({} if threads is None else {"threads": threads}))


def run_reference(
    module: ModuleSpec, folder: Path, inputs: Mapping[str, Array], *, threads: int | None = None
) -> dict[str, Array]:
    """All outputs of `module` from ONNX Runtime's CPU kernels, node by node as the graph says.

    Without graph optimisation nothing is fused, folded or laid out anew. Raises `EngineFailed` with
    ONNX Runtime's message, for instance for an operator that it has no kernel for, and
    `ExportIncomplete`.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if threads is not None:
        options.intra_op_num_threads = threads
    names = [tensor.name for tensor in module.outputs]
    graph = verify_module(folder, module)
    try:
        session = open_session(str(graph), options, "cpu")
        results = session.run(names, dict(inputs))
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise EngineFailed(
            f"ONNX Runtime, the reference, cannot run {module.name}: {reason}",
            "Export the module in fp32 or fp16 and verify that.",
        ) from error
    return dict(zip(names, results, strict=True))


def run_backend(
    module: ModuleSpec,
    folder: Path,
    inputs: Mapping[str, Array],
    builder: EngineBuilder,
    cache: EngineCache,
    progress: Progress,
) -> dict[str, Array]:
    """All outputs of `module` from an engine of `builder`, as numpy arrays."""
    with cache.open(module, folder, builder, progress) as engine:
        return {name: engine.device.download(output) for name, output in engine(**inputs).items()}


def verify_modules(
    folder: Path,
    manifest: ExportManifest,
    builder: EngineBuilder,
    cache: EngineCache,
    *,
    modules: Sequence[str] = (),
    tolerance: float | None = None,
    seed: int = 0,
    threads: int | None = None,
    progress: Progress = lambda line: None,
) -> list[ModuleVerdict]:
    """Run each module on both sides with the same inputs; all of them unless `modules` names some.

    `tolerance` overrides that of the export's precision. Raises the errors of building and running
    an engine, and `UnknownName`.
    """
    verdicts = []
    for name in modules or manifest.modules:
        module = manifest.modules[name]
        inputs = module_inputs(module, manifest, folder, seed=seed)
        ours = run_backend(module, folder, inputs, builder, cache, progress)
        progress(f"Running {name} on the reference")
        reference = run_reference(module, folder, inputs, threads=threads)
        allowed = tolerance or tolerance_for(manifest.precision, name).relative_l2
        differences = {key: compare(ours[key], reference[key]) for key in reference}
        verdicts.append(ModuleVerdict(name, allowed, differences))
    return verdicts
