"""The ONNX Runtime backend: an engine is the optimised graph, written once and loaded as it is.

Optimising a graph (folding constants, fusing, choosing memory layouts) takes long and much memory;
loading the result with optimisation off takes seconds, since its weights are mapped from the file.

On the CPU, which computes in float32, `optimization="all"` folds the casts of a float16 module
into its weights: the engine is twice as large as the module and, on large matrix products, runs
about twice as fast. A build takes memory for the engine once, a running session again for packed
copies of its weights. With "extended" or "basic" the weights stay float16 and are mapped from the
file: opening takes next to no memory, and every run casts them again.

For the CUDA provider a module is brought into a form of its own first (`engines.onnx.forms`), with
the attention kernels as a custom operator where its library is at hand; see `cuda_engine` for how
it is run. Its weights lie outside of the arena, and the arena is not laid out anew for every
set of shapes, so that one session serves them all with the memory that the largest needs.

The providers `tensorrt` and `nv-tensorrt-rtx` compile the module whenever it is opened: what they
would keep on the disk is loaded without being verified, so it is not kept. The backends `tensorrt`
and `tensorrt-rtx` build once.
"""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from fastface_trt.engines.cache import identity_of
from fastface_trt.engines.cuda.device import SharedDevice
from fastface_trt.engines.device import Device, HostDevice, Tensor
from fastface_trt.engines.engine import Closing, Progress, check_inputs, host_arrays
from fastface_trt.engines.hardware import cpu_hardware, cuda_hardware
from fastface_trt.engines.manifest import BuildReport, EngineManifest, ModuleSpec
from fastface_trt.engines.onnx import forms
from fastface_trt.engines.onnx.file import OnnxFile, check_references
from fastface_trt.engines.ort.cuda_engine import BoundEngine
from fastface_trt.engines.ort.operator import (
    has_operator,
    image_tokens,
    operator_identity,
    operator_problem,
    place_operator,
    register_operator,
)
from fastface_trt.engines.ort.options import (
    DEFAULTS,
    ProviderOptions,
    build_options,
    checked_options,
)
from fastface_trt.engines.ort.session import (
    PROVIDERS,
    Provider,
    check_provider,
    interface_problem,
    lacks_a_kernel,
    load_onnxruntime,
    open_session,
    short_message,
)
from fastface_trt.engines.ort.threads import (
    LARGEST_BYTES,
    Run,
    fastest_threads,
    read_threads,
    usable_cores,
    write_threads,
)
from fastface_trt.engines.ort.weights import find_weights, replace_weights
from fastface_trt.engines.probe import read_probe
from fastface_trt.engines.weight_map import (
    WEIGHT_MAP,
    Change,
    digest_weights,
    find_change,
    make_map,
    read_map,
)
from fastface_trt.errors import (
    BackendUnavailable,
    BuildFailed,
    EngineFailed,
    EngineMismatch,
    ExportIncomplete,
    FastFaceError,
    InvalidRequest,
)

Optimization = Literal["all", "extended", "basic"]

_COMPILES: frozenset[Provider] = frozenset(("tensorrt", "nv-tensorrt-rtx"))
_LEVELS: dict[str, str] = {
    "all": "ORT_ENABLE_ALL",
    "extended": "ORT_ENABLE_EXTENDED",
    "basic": "ORT_ENABLE_BASIC",
    "off": "ORT_DISABLE_ALL",
}
_GRAPH = "engine.onnx"
_WEIGHTS = "engine.data"
_SMALLEST_EXTERNAL_BYTES = 1024
"""Smaller initialisers stay in the graph: shape inference reads shapes only from there."""


class OnnxRuntimeBuilder:
    """Builds and opens ONNX Runtime engines for one execution provider.

    `threads` is the number of threads per operator (None: what was fastest when the engine was
    built, one per core for large modules); it changes no engine. `provider_options` are those of
    the CUDA provider, see `ort.options`; all but the few that change the saved graph take
    effect when an engine is opened, so engines that were built with others serve.

    Raises `UnknownName` and `InvalidRequest` for provider options that there are not.
    """

    def __init__(
        self,
        provider: Provider = "cpu",
        threads: int | None = None,
        optimization: Optimization = "all",
        provider_options: Mapping[str, object] | None = None,
    ) -> None:
        self.provider: Provider = provider
        self.threads = threads
        self.optimization = optimization
        self.backend = "onnxruntime" if provider == "cpu" else f"onnxruntime-{provider}"
        if provider_options and provider != "cuda":
            raise InvalidRequest(
                f"The backend {self.backend} takes no provider options.",
                "They are for onnxruntime-cuda.",
            )
        self.provider_options = checked_options(provider_options or {})
        self._host, self._gpu = HostDevice(), SharedDevice()

    def device(self) -> Device:
        """The host, or GPU 0 for every other provider."""
        return self._host if self.provider == "cpu" else self._gpu.get()

    def identity(self, module: ModuleSpec) -> Mapping[str, Any]:
        """Backend, ONNX Runtime's version, provider, optimisation, form, and the hardware.

        The hardware counts because the saved graph holds layouts and fusions chosen for it. For the
        CUDA provider a UNet's says whether its attention kernels are here.
        """
        return self._identity(module)

    def _identity(self, module: ModuleSpec, *, operator: bool | None = None) -> dict[str, Any]:
        options: dict[str, Any] = {
            "provider": PROVIDERS[self.provider],
            "optimization": self.optimization,
        }
        if self.provider not in _COMPILES:
            options["form"] = forms.VERSION
        if self.provider == "cuda":
            options |= build_options(self.provider_options)
            if image_tokens(module) is not None:
                options |= operator_identity(available=operator)
        return {
            "backend": self.backend,
            "backend_version": str(load_onnxruntime().__version__),
            "options": options,
            "hardware": cpu_hardware() if self.provider == "cpu" else cuda_hardware(),
        }

    def _identity_with_operator(self, module: ModuleSpec) -> dict[str, Any] | None:
        """That of an engine that holds its attention kernels, whether or not more can be made."""
        if self.provider != "cuda" or image_tokens(module) is None:
            return None
        return self._identity(module, operator=True)

    def check_runs_here(self) -> None:
        check_provider(self.provider)

    def takes(self, manifest: EngineManifest) -> bool:
        """Only what it would make, since a build takes seconds, and one with attention kernels.

        Those lie in the engine, so that it serves where the compiler for them is gone.
        """
        return identity_of(manifest) == self._identity_with_operator(manifest.module)

    def build(
        self, module: ModuleSpec, source: Path, target: Path, progress: Progress
    ) -> BuildReport:
        """Optimise `module` and write graph and weights into `target`.

        For a provider that compiles when it opens, the engine is the module as it is. Raises
        `BuildFailed` with ONNX Runtime's own message, `BackendUnavailable` when the provider does
        not run here. Needs memory for the optimised weights once.
        """
        self.check_runs_here()
        if self.provider in _COMPILES:
            for file in module.files:
                shutil.copyfile(source / file.path, target / Path(file.path).name)
            return BuildReport()
        self._gpu.enter_thread()  # a build allocates, and an engine may be recording a graph
        graph = target / _GRAPH
        options = self._options(self.optimization, prepack=False)
        options.optimized_model_filepath = str(graph)
        # Beside the graph, because a graph of more than 2 GB cannot be written; it is also what
        # lets the weights be mapped instead of read.
        prefix = "session.optimized_model_external_initializers"
        options.add_session_config_entry(f"{prefix}_file_name", _WEIGHTS)
        options.add_session_config_entry(
            f"{prefix}_min_size_in_bytes", str(_SMALLEST_EXTERNAL_BYTES)
        )
        progress(f"Optimising {module.name} with ONNX Runtime")
        try:
            model, warnings = self._model(module, source, target, options, progress)
            session = self._optimise(model, options)
            problem = interface_problem(session, module)
            del session  # its memory is needed again
            # Here, because it imports the package onnx, which opening an engine does without.
            from fastface_trt.engines.onnx.functions import drop_repeated_initializers

            drop_repeated_initializers(graph)
            if problem is None:
                # A graph that still refers to the export's data, or was cut, shows here.
                self._session(graph, self._options("off", prepack=False, engine=target))
        except FastFaceError:
            raise
        except Exception as error:
            raise BuildFailed(
                f"ONNX Runtime cannot build {module.name}: {short_message(error)}",
                (
                    f"{PROVIDERS[self.provider]} lacks a kernel for a type of this export (for "
                    "bfloat16 the CPU's always does): build a bf16 export with a TensorRT backend, "
                    "or export with --precision fp16."
                )
                if lacks_a_kernel(error)
                else "Export the module again; if that does not help, report the message.",
            ) from error
        if problem is not None:
            raise BuildFailed(
                f"The graph of {module.name} does not fit its manifest: {problem}.",
                "Export the module again.",
            )
        with OnnxFile(source / module.files[0].path) as onnx, OnnxFile(graph) as engine:
            weights = digest_weights(onnx)
            make_map(onnx, weights, find_weights(onnx, weights, engine)).write(target)
        self._measure_threads(module, source, target)
        return BuildReport(warnings=warnings)

    def _measure_threads(self, module: ModuleSpec, source: Path, target: Path) -> None:
        """Keep beside the engine with how many threads its probe runs fastest, unless told."""
        size = sum(path.stat().st_size for path in target.iterdir())
        told = self.threads is not None or self.provider != "cpu"
        if told or module.probe is None or size > LARGEST_BYTES:
            return
        inputs, _ = read_probe(module, source)

        def prepare(threads: int) -> Run:
            options = self._options("off", prepack=True)
            options.intra_op_num_threads = threads
            session = self._session(target / _GRAPH, options)
            return lambda: session.run(None, inputs)

        write_threads(target, fastest_threads(prepare, usable_cores()))

    def refit(
        self, base: EngineManifest, folder: Path, module: ModuleSpec, source: Path, target: Path
    ) -> Change:
        """Write the engine of `module` into `target`: that of `base` with other weights.

        Copies the optimised graph of `folder` and swaps the weights that differ; no optimisation
        runs, so it takes as long as copying. Raises `EngineMismatch` when more than weights
        differs, or a weight is not where it can be replaced.
        """
        built = read_map(base, folder)
        beside = (file.path for file in base.files if file.path not in (_GRAPH, WEIGHT_MAP))
        with OnnxFile(source / module.files[0].path) as onnx:
            change = find_change(module, built, onnx)
            replace_weights(folder, target, (_GRAPH, *beside), change, onnx)
        built.with_weights(change.weights).write(target)
        return change

    def open(self, manifest: EngineManifest, folder: Path) -> "OnnxRuntimeEngine | BoundEngine":
        """Load a verified engine; the graph is not optimised again.

        Raises `EngineMismatch` when it was built for another backend, version or machine, or
        cannot be loaded; `BackendUnavailable` when the provider does not run here.
        """
        if not self.takes(manifest):
            for field, here in self.identity(manifest.module).items():
                built = getattr(manifest, field)
                if built != here:
                    raise EngineMismatch(
                        f"The engine of {manifest.module.name} was built with {field} {built}, "
                        f"here it is {here}.",
                        "Build it again on this machine: fastface-trt build.",
                    )
        self.check_runs_here()
        module = manifest.module
        if self.provider == "cpu":
            session = self._open_session(manifest, folder / _GRAPH, {})
            return OnnxRuntimeEngine(module, session, self._host)
        compiles = self.provider in _COMPILES
        graph = folder / (Path(module.files[0].path).name if compiles else _GRAPH)
        device = self._gpu.get()
        return BoundEngine(
            module,
            device,
            load_onnxruntime().RunOptions,
            lambda provider_options: self._open_session(manifest, graph, provider_options),
            captures=not compiles and self._can_capture(manifest, folder, device.warn),
        )

    def _can_capture(
        self, manifest: EngineManifest, folder: Path, warn: Callable[[str], None]
    ) -> bool:
        """Whether runs are worth recording as CUDA graphs; tells where the engine is in the way."""
        if self.provider_options.get("enable_cuda_graph") == "0":
            return False
        if image_tokens(manifest.module) is None or has_operator(folder):
            return True
        why = " ".join(manifest.report.warnings) or operator_problem()
        warn(
            f"No CUDA graph of {manifest.module.name}, launching kernels one by one: without the "
            f"attention kernels its attention manipulation is a branch of the graph. {why}".strip()
        )
        return False

    def _open_session(
        self, manifest: EngineManifest, graph: Path, provider_options: ProviderOptions
    ) -> Any:
        options = self._options("off", prepack=True, engine=graph.parent)
        if provider_options.get("enable_cuda_graph") == "1":
            options.log_severity_level = 4  # a refusal to record is told by the engine
        if self.provider == "cuda":
            chosen = {k: v for k, v in self.provider_options.items() if k != "enable_cuda_graph"}
            provider_options = {**DEFAULTS, **chosen, **provider_options}
        measured = read_threads(graph.parent)
        if self.threads is None and measured is not None:
            options.intra_op_num_threads = measured
        if self.provider in _COMPILES:
            # A node that the provider leaves over would run on the CPU, slowly and unnoticed.
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        try:
            check_references(graph.parent, graph.name, os.listdir(graph.parent))
            session = open_session(str(graph), options, self.provider, provider_options)
        except BackendUnavailable:
            raise
        except ExportIncomplete as error:
            raise EngineMismatch(error.message, "Build it again: fastface-trt build.") from None
        except Exception as error:
            raise EngineMismatch(
                f"ONNX Runtime cannot open the engine of {manifest.module.name}: "
                f"{short_message(error)}",
                "Build it again: fastface-trt build.",
            ) from error
        problem = interface_problem(session, manifest.module)
        if problem is not None:
            raise EngineMismatch(
                f"The engine of {manifest.module.name} does not fit its manifest: {problem}.",
                "Build it again: fastface-trt build.",
            )
        return session

    def _model(
        self, module: ModuleSpec, source: Path, target: Path, options: Any, progress: Progress
    ) -> tuple[Path | bytes, tuple[str, ...]]:
        """What is optimised, and what to say about it: the export's graph, or a form of it.

        For the CUDA provider the library of its operators is in `target` then.
        """
        path = source / module.files[0].path
        tokens = image_tokens(module)
        model: bytes | None = None
        warnings: tuple[str, ...] = ()
        if self.provider == "cuda":
            model, warnings = self._cuda_form(module, path, target, progress)
            register_operator(options, target)
        elif self.provider == "cpu" and tokens is not None:
            form = forms.cpu_form(path, tokens)
            model = None if form is None else form.model
        if model is None:
            return path, warnings
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(path.parent)
        )
        return model, warnings

    def _cuda_form(
        self, module: ModuleSpec, path: Path, target: Path, progress: Progress
    ) -> tuple[bytes | None, tuple[str, ...]]:
        """The form with the attention kernels where they can be had, else the one with branches."""
        tokens = image_tokens(module)
        warnings: tuple[str, ...] = ()
        if tokens is not None and "operator" in operator_identity():
            form = forms.cuda_form(path, tokens, "operator")
            if form is not None and form.counts.get("decoupled_attention"):
                try:
                    place_operator(form.model, tokens, target)
                except FastFaceError as error:
                    warnings = (f"{error.message} {error.hint}".strip(),)
                    progress(f"Without the attention kernels: {warnings[0]}")
                else:
                    return form.model, ()
        form = forms.cuda_form(path, tokens, "branches")
        return (None if form is None else form.model), warnings

    def _optimise(self, graph: Path | bytes, options: Any) -> Any:
        """A session on the export's graph, which writes the optimised graph when it is made."""
        try:
            return self._session(graph, options)
        except Exception as error:
            if not (lacks_a_kernel(error) or "float8" in str(error)):
                raise
        # Its optimiser moves DequantizeLinear past a Reshape or a Transpose, which take no 8-bit
        # floats. Left where they are, the pairs compute the same values.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        return self._session(graph, options)

    def _options(self, level: str, prepack: bool, engine: Path | None = None) -> Any:
        """Session options; `engine` is the folder of one whose custom operator is needed."""
        ort = load_onnxruntime()
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, _LEVELS[level])
        if self.threads is not None:
            options.intra_op_num_threads = self.threads
        # Several sessions live in one process and run one after the other. Idle threads of one must
        # not spin on the cores that the next one needs; within a run spinning stays, it is faster.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if self.provider == "cuda":
            # Weights of their exact size, beside the arena, which only holds activations then. They
            # share what it has, whatever the shapes; laid out anew for each set of shapes they
            # would take a block for each.
            options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
            options.enable_mem_pattern = False
            if engine is not None:
                register_operator(options, engine)
        if not prepack:
            # Packed copies of the weights serve only runs; a build makes none.
            options.add_session_config_entry("session.disable_prepacking", "1")
        return options

    def _session(self, graph: Path | bytes, options: Any) -> Any:
        model = graph if isinstance(graph, bytes) else str(graph)
        return open_session(model, options, self.provider, build_options(self.provider_options))


class OnnxRuntimeEngine(Closing):
    """One module in an ONNX Runtime session; calls from several threads run side by side."""

    def __init__(self, spec: ModuleSpec, session: Any, device: HostDevice) -> None:
        self.spec = spec
        self.request_counts = None
        self.device = device
        self._session: Any = session
        self._outputs = [tensor.name for tensor in spec.outputs]

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Run the module once; names, shapes and dtypes are those of `spec`.

        Returns new arrays, which the caller owns. Raises `InvalidRequest` for an input that does
        not fit, `EngineFailed` when ONNX Runtime fails or the engine is closed.
        """
        session = self._session  # a close() during the run takes nothing away from it
        if session is None:
            raise EngineFailed(f"The engine of {self.spec.name} is closed.", "Load it again.")
        ready = host_arrays(self.spec, check_inputs(self.spec, inputs))
        try:
            results = session.run(self._outputs, ready)
        except Exception as error:
            raise EngineFailed(
                f"ONNX Runtime failed in {self.spec.name}: {short_message(error)}",
                "If memory ran out, ask for fewer or smaller pictures at once.",
            ) from error
        return dict(zip(self._outputs, results, strict=True))

    def close(self) -> None:
        """Free the session; calling it twice is harmless."""
        self._session = None
