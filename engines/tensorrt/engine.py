"""`TensorRTEngine`: a plan of either flavour, run on the calling thread's stream.

From a call to the GPU: `__call__` checks the inputs, chooses the built profile that fits their
shapes, and hands them to the `ProfileContext` of this thread and profile. It copies them into
buffers that stay at their addresses for its life, and outputs come out of such buffers, so a CUDA
graph of a run stays valid and a call allocates nothing. Nothing waits for the GPU but who downloads
a result.

TensorRT-RTX compiles kernels when an engine runs; a `RuntimeCacheFile` keeps them for the next
start.
"""

import hashlib
import mmap
from collections.abc import Mapping
from contextlib import suppress
from math import prod
from pathlib import Path
from threading import Lock
from typing import Any

from fastface_trt.engines.contract import TEXT, TEXT_POSITIONS
from fastface_trt.engines.cuda.device import CudaDevice
from fastface_trt.engines.cuda.graphs import GraphKey
from fastface_trt.engines.cuda.stream import Stream
from fastface_trt.engines.device import DeviceTensor, Tensor
from fastface_trt.engines.dtypes import FROM_TENSORRT, ITEM_BYTES
from fastface_trt.engines.engine import Closing, check_inputs
from fastface_trt.engines.files import write_durably
from fastface_trt.engines.manifest import EngineManifest, ModuleSpec
from fastface_trt.engines.tensorrt.flavour import Flavour
from fastface_trt.engines.tensorrt.network import MessageLog
from fastface_trt.engines.tensorrt.options import KernelSpecialization
from fastface_trt.engines.tensorrt.plan import PLAN
from fastface_trt.engines.tensorrt.profiles import (
    Profile,
    Shape,
    choose_profile,
    read_profiles,
    request_counts,
)
from fastface_trt.errors import EngineFailed, EngineMismatch, InvalidRequest

_ALIGNMENT = 256
Shapes = tuple[Shape, ...]

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
        cls,
        flavour: Flavour,
        manifest: EngineManifest,
        folder: Path,
        device: CudaDevice,
        kernel_specialization: KernelSpecialization | None = None,
    ) -> "TensorRTEngine":
        """Load the verified plan in `folder` onto `device`; the last is of `TensorRTOptions`.

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
        runtime = log.attach(binding.Runtime(log.logger))
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
        return cls(flavour, manifest, folder, device, runtime, plan, log, kernel_specialization)

    def __init__(
        self,
        flavour: Flavour,
        manifest: EngineManifest,
        folder: Path,
        device: CudaDevice,
        runtime: Any,
        plan: Any,
        log: MessageLog,
        kernel_specialization: KernelSpecialization | None,
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
        if kernel_specialization is not None:
            strategies = binding.DynamicShapesKernelSpecializationStrategy
            chosen = getattr(strategies, kernel_specialization.upper())
            self._config.dynamic_shapes_kernel_specialization_strategy = chosen
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

    def _context(self, stream: Stream, index: int) -> "ProfileContext":
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
        names = [tensor.name for tensor in self.spec.inputs]
        first = next(
            (
                name
                for name in names
                if not any(profile.fits({name: shapes[name]}) for profile in self._profiles)
            ),
            names[0],
        )
        wanted = " x ".join(map(str, shapes[first]))
        built = "; ".join(dict.fromkeys(profile.words(first) for profile in self._profiles))
        windows = -(-shapes[TEXT][1] // TEXT_POSITIONS) if TEXT in shapes else 1
        return InvalidRequest(
            f"The engine of {self.spec.name} does not run {first} {wanted}. It was built for "
            f"{built}.",
            f"Build another: fastface-trt build --backend {self._backend}"
            f"{_counts(self.spec, shapes)} --size WIDTHxHEIGHT (or --dynamic for a range)"
            f"{f' --prompt-windows {windows}' if windows > 1 else ''}.",
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
        found[is_input][name] = FROM_TENSORRT.get(dtype, dtype)
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


class ProfileContext:
    """A context of the deserialised engine `plan` for its profile number `index`.

    `captures` says that runs are recorded as CUDA graphs here; TensorRT-RTX does it by itself.
    Every method needs `stream.lock`.
    """

    def __init__(
        self,
        plan: Any,
        config: Any,
        spec: ModuleSpec,
        index: int,
        profile: Profile,
        device: CudaDevice,
        stream: Stream,
        log: MessageLog,
        *,
        captures: bool,
    ) -> None:
        self._spec, self._index, self._captures = spec, index, captures
        self._device, self._stream, self._log = device, stream, log
        self._plan_id = id(plan)
        self._scratch_bytes = max(int(plan.device_memory_size_v2), _ALIGNMENT)
        self._context: Any = plan.create_execution_context(config)
        if self._context is None:
            raise self._failure("cannot make an execution context")
        self._output_shapes: dict[Shapes, Shapes] = {}
        self._prepared: GraphKey | None = None
        if not self._context.set_optimization_profile_async(index, int(stream.handle)):
            raise self._failure(f"does not take its profile {index}")
        self._addresses: dict[str, int] = {}
        self._buffer = self._allocate(profile)

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy the inputs in, put one run on the stream, and return views of the outputs."""
        for tensor in self._spec.inputs:
            given = inputs[tensor.name]
            shape = tuple(given.shape)
            view = DeviceTensor(self._addresses[tensor.name], shape, tensor.dtype)
            self._device.copy_into(view, given)
        shapes = tuple(tuple(inputs[tensor.name].shape) for tensor in self._spec.inputs)
        self._execute(shapes)
        return {
            tensor.name: DeviceTensor(self._addresses[tensor.name], shape, tensor.dtype)
            for tensor, shape in zip(self._spec.outputs, self._output_shapes[shapes], strict=True)
        }

    def close(self) -> None:
        """Free the context and its buffers, after the stream's work."""
        self._device.driver.stream_synchronize(self._stream.handle)
        self._stream.graphs.forget(engine=self._plan_id)
        self._stream.scratch.release(self._plan_id)
        self._context = None
        self._device.free(self._buffer)

    def _execute(self, shapes: Shapes) -> None:
        graphs = self._stream.graphs
        scratch, size = self._stream.scratch.get(self._plan_id, self._scratch_bytes)
        key = GraphKey(self._plan_id, self._index, shapes, (*self._addresses.values(), scratch))
        if self._captures and graphs.replay(key):
            return
        if self._prepared != key:
            self._prepare(shapes, scratch, size)
        elif self._captures and graphs.capture(key, self._enqueue):
            return
        self._enqueue()
        self._prepared = key

    def _prepare(self, shapes: Shapes, scratch: int, size: int) -> None:
        """Tell the context the shapes and its scratch memory."""
        self._prepared = None
        self._context.set_device_memory(scratch, size)
        self._output_shapes[shapes] = self._set_shapes(shapes)

    def _set_shapes(self, shapes: Shapes) -> Shapes:
        for tensor, shape in zip(self._spec.inputs, shapes, strict=True):
            if not self._context.set_input_shape(tensor.name, shape):
                raise self._failure(f"does not take shape {shape} for {tensor.name}")
        missing = self._context.infer_shapes()
        if missing:
            raise self._failure(f"has no shape for {', '.join(missing)}")
        return tuple(
            tuple(self._context.get_tensor_shape(tensor.name)) for tensor in self._spec.outputs
        )

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(int(self._stream.handle)):
            raise self._failure("failed")

    def _allocate(self, profile: Profile) -> int:
        """One buffer for all inputs and outputs at the profile's largest shapes."""
        sizes = {
            tensor.name: prod(profile.largest[tensor.name]) * ITEM_BYTES[tensor.dtype]
            for tensor in self._spec.inputs
        }
        self._set_shapes(tuple(profile.largest[tensor.name] for tensor in self._spec.inputs))
        for tensor in self._spec.outputs:
            sizes[tensor.name] = int(self._context.get_max_output_size(tensor.name))
        total, offsets = 0, {}
        for name, size in sizes.items():
            offsets[name] = total
            total += -(-size // _ALIGNMENT) * _ALIGNMENT
        buffer = self._device.allocate(total)
        for name, offset in offsets.items():
            self._addresses[name] = buffer + offset
            if not self._context.set_tensor_address(name, buffer + offset):
                self._device.free(buffer)
                raise self._failure(f"does not take an address for {name}")
        return buffer

    def _failure(self, what: str) -> EngineFailed:
        return EngineFailed(
            f"The engine of {self._spec.name} {what}: {self._log.reason()}",
            "If it comes back, build the engine again: fastface-trt build.",
        )


_DIGEST_BYTES = 32


class RuntimeCacheFile:
    """TensorRT-RTX's runtime cache of one engine on one GPU; `cache` is TensorRT's object for it.

    The file lies beside the engine cache's entries, not in one: an entry is verified against its
    manifest and never changes. Its name holds all that its contents depend on, and it starts with
    their SHA-256, so a file that was cut short never reaches TensorRT. TensorRT-RTX compares the
    rest with the machine itself and refuses what does not fit; such a file is deleted and written
    anew.
    """

    def __init__(
        self, entry: Path, key: str, version: str, gpu: Mapping[str, str], cache: Any
    ) -> None:
        where = hashlib.sha256(repr((version, sorted(gpu.items()))).encode()).hexdigest()
        self.path = entry.parent / "runtime" / f"{key}-{where[:16]}.cache"
        self._cache = cache
        self._known = b""

    def load(self) -> bool:
        """Take in the file; False, and no file any more, where there is none that fits."""
        content = b""
        with suppress(OSError):
            content = self.path.read_bytes()
        digest, blob = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        if blob and hashlib.sha256(blob).digest() == digest and self._cache.deserialize(blob):
            self._known = digest
            return True
        with suppress(OSError):
            self.path.unlink()
        return False

    def save(self) -> None:
        """Write the cache if it holds something new. A full or read-only disk costs only time."""
        serialized = self._cache.serialize()
        blob = b"" if serialized is None else bytes(memoryview(serialized))
        digest = hashlib.sha256(blob).digest()
        if not blob or digest == self._known:
            return
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_durably(self.path, digest + blob)
            self._known = digest
