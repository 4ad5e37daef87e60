"""`TensorRTEngine`: a plan of either flavour, run on the calling thread's stream.

From a call to the GPU: `__call__` checks the inputs, chooses the built profile that fits their
shapes, and hands them to the `ProfileContext` of this thread and profile, which copies them into
its buffers and launches the work. Nothing waits for the GPU but who downloads a result.
"""

import mmap
from pathlib import Path
from threading import Lock
from typing import Any

from fastface_trt.engines.closing import Closing
from fastface_trt.engines.cuda.device import CudaDevice
from fastface_trt.engines.cuda.stream import Stream
from fastface_trt.engines.device import Tensor
from fastface_trt.engines.engine import check_inputs
from fastface_trt.engines.manifest import EngineManifest, ModuleSpec
from fastface_trt.engines.tensorrt.context import ProfileContext
from fastface_trt.engines.tensorrt.flavour import Flavour
from fastface_trt.engines.tensorrt.network import MessageLog
from fastface_trt.engines.tensorrt.plan import PLAN
from fastface_trt.engines.tensorrt.profiles import (
    Shape,
    choose_profile,
    read_profiles,
    request_counts,
)
from fastface_trt.engines.tensorrt.runtime_cache import RuntimeCacheFile
from fastface_trt.errors import EngineFailed, EngineMismatch, InvalidRequest

_TYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT64": "int64",
    "INT32": "int32",
    "UINT8": "uint8",
}
_BUILD_AGAIN = "Build it again: fastface-trt build."
_LESS_MEMORY = (
    "Close other programs that use the GPU, or build with fewer requests at once, a smaller size, "
    "or --weight-streaming."
)


class TensorRTEngine(Closing):
    """One module's plan on a GPU; calls from several threads run side by side.

    Each thread that calls it gets an execution context of its own for each profile it uses, and
    outputs that are valid until its next call.
    """

    @classmethod
    def open(
        cls, flavour: Flavour, manifest: EngineManifest, folder: Path, device: CudaDevice
    ) -> "TensorRTEngine":
        """Load the verified plan in `folder` onto `device`.

        Raises `OutOfMemory` before anything is loaded when the GPU has too little memory left,
        `EngineMismatch` when TensorRT refuses the plan or it does not fit its manifest.
        """
        binding = flavour.module()
        log = MessageLog(binding)
        name, plan_file = manifest.module.name, folder / PLAN
        streams_weights = bool(manifest.options.get("weight_streaming", False))
        if not streams_weights:
            device.require(plan_file.stat().st_size, f"The engine of {name}", _LESS_MEMORY)
        # Engines may carry code for the host, which runtimes run only if they are told to. Ours are
        # not told: `engine_host_code_allowed` stays False.
        runtime = binding.Runtime(log.logger)
        plan = _deserialize(runtime, plan_file)
        if plan is None:
            raise EngineMismatch(
                f"{flavour.label} cannot open the engine of {name}: {log.reason()}", _BUILD_AGAIN
            )
        problem = _interface_problem(binding, plan, manifest)
        if problem is not None:
            raise EngineMismatch(
                f"The engine of {name} does not fit its manifest: {problem}.", _BUILD_AGAIN
            )
        if streams_weights:
            # What stays on the GPU of the weights; before the first context, or it has no effect.
            plan.weight_streaming_budget_v2 = plan.get_weight_streaming_automatic_budget()
        growth = device.stream().scratch.growth(int(plan.device_memory_size_v2))
        device.require(growth, f"The engine of {name}", _LESS_MEMORY)
        return cls(flavour, manifest, folder, device, runtime, plan, log)

    def __init__(
        self,
        flavour: Flavour,
        manifest: EngineManifest,
        folder: Path,
        device: CudaDevice,
        runtime: Any,
        plan: Any,
        log: MessageLog,
    ) -> None:
        self.spec: ModuleSpec = manifest.module
        self.device = device
        self._backend = manifest.backend
        self._profiles = read_profiles(manifest)
        self.request_counts = request_counts(manifest.module, self._profiles)
        self._log = log
        self._runtime, self._plan = runtime, plan
        self._lock = Lock()
        self._contexts: dict[tuple[Stream, int], ProfileContext] = {}
        binding = flavour.module()
        self._config: Any = plan.create_runtime_config()
        # The scratch memory is ours, one piece for all engines of a thread.
        self._config.set_execution_context_allocation_strategy(
            binding.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        # TensorRT-RTX swaps in better kernels as they are compiled and records its graph again
        # then; a graph recorded from outside would keep the first kernels for ever.
        self._captures = "cuda_graph_strategy" not in flavour.supports
        if not self._captures:
            self._config.cuda_graph_strategy = binding.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        self._kernels: RuntimeCacheFile | None = None
        if "runtime_cache" in flavour.supports:
            cache = self._config.create_runtime_cache()
            self._kernels = RuntimeCacheFile(
                folder, manifest.key, manifest.backend_version, device.gpu, cache
            )
            self._kernels.load()
            self._config.set_runtime_cache(cache)

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Put one run on this thread's stream; names, shapes and dtypes are those of `spec`.

        Takes tensors of `device` or numpy arrays, which it uploads. Returns views of the engine's
        own buffers, valid until this thread's next call or `close`. Raises `InvalidRequest` for
        shapes that no built profile covers, `EngineMismatch` for a device tensor of another dtype,
        `EngineFailed` when TensorRT fails or the engine is closed.
        """
        ready = check_inputs(self.spec, inputs)
        shapes = {name: tuple(tensor.shape) for name, tensor in ready.items()}
        index = choose_profile(self._profiles, shapes)
        if index is None:
            raise self._not_built_for(shapes)
        stream = self.device.stream()
        with stream.lock:  # against a close() by another thread
            return self._context(stream, index).run(ready)

    def close(self) -> None:
        """Free contexts, buffers and weights, after all queued runs; twice is harmless."""
        with self._lock:
            contexts, self._contexts = self._contexts, {}
            plan, self._plan = self._plan, None
        if plan is None:
            return
        if not self.device.closed:
            self.device.stream()  # a thread's first call needs the context
            for (stream, _), context in contexts.items():
                with stream.lock:
                    context.close()
        if self._kernels is not None and contexts:
            self._kernels.save()
        self._config = self._kernels = None
        contexts.clear()
        # The plan before the runtime that made it.
        del plan
        self._runtime = None

    def _context(self, stream: Stream, index: int) -> ProfileContext:
        with self._lock:
            if self._plan is None:
                raise EngineFailed(f"The engine of {self.spec.name} is closed.", "Load it again.")
            if (stream, index) not in self._contexts:
                self._contexts[stream, index] = ProfileContext(
                    self._plan,
                    self._config,
                    self.spec,
                    index,
                    self._profiles[index],
                    self.device,
                    stream,
                    self._log,
                    captures=self._captures,
                )
            return self._contexts[stream, index]

    def _not_built_for(self, shapes: dict[str, Shape]) -> InvalidRequest:
        first = self.spec.inputs[0].name
        wanted = " x ".join(map(str, shapes[first]))
        built = "; ".join(profile.words() for profile in self._profiles)
        return InvalidRequest(
            f"The engine of {self.spec.name} does not run {first} {wanted}. It was built for "
            f"{built}.",
            f"Build another: fastface-trt build --backend {self._backend}"
            f"{_counts(self.spec, shapes)} --size WIDTHxHEIGHT (or --dynamic for a range).",
        )


def _deserialize(runtime: Any, file: Path) -> Any:
    """The plan in `file`, read through its mapping: the host never holds a copy of the weights."""
    with (
        open(file, "rb") as plain,
        mmap.mmap(plain.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
    ):
        return runtime.deserialize_cuda_engine(mapped)


def _interface_problem(binding: Any, plan: Any, manifest: EngineManifest) -> str | None:
    """What differs between the plan and its manifest, None if nothing."""
    profiles = len(read_profiles(manifest))
    if plan.num_optimization_profiles != profiles:
        return f"it has {plan.num_optimization_profiles} profiles, expected {profiles}"
    module = manifest.module
    found: dict[bool, dict[str, str]] = {True: {}, False: {}}
    for index in range(plan.num_io_tensors):
        name = plan.get_tensor_name(index)
        if plan.get_tensor_location(name) != binding.TensorLocation.DEVICE:
            return f"its tensor {name} lies on the host"
        is_input = plan.get_tensor_mode(name) == binding.TensorIOMode.INPUT
        dtype = plan.get_tensor_dtype(name).name
        found[is_input][name] = _TYPES.get(dtype, dtype)
    for is_input, side, wanted in (
        (True, "inputs", module.inputs),
        (False, "outputs", module.outputs),
    ):
        expected = {tensor.name: tensor.dtype for tensor in wanted}
        if found[is_input] != expected:
            return f"its {side} are {found[is_input]}, expected {expected}"
    return None


def _counts(module: ModuleSpec, shapes: dict[str, Shape]) -> str:
    """The options of `build` for the numbers of requests and branches in these shapes."""
    sizes = {
        name: size
        for tensor in module.inputs
        for name, size in zip(tensor.shape, shapes[tensor.name], strict=True)
    }
    if "requests" not in sizes:
        return ""
    requests = sizes["requests"]
    return f" --requests {requests} --branches {sizes.get('batch', requests) // requests}"
