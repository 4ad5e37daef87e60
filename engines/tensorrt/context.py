"""One execution context: a plan's profile on one thread's stream, with its buffers.

Inputs are copied into buffers that stay at their addresses for the context's life, and outputs come
out of such buffers, so a CUDA graph of a run stays valid and a call allocates nothing.
"""

from collections.abc import Mapping
from math import prod
from typing import Any

from fastface_trt.engines.cuda.device import CudaDevice
from fastface_trt.engines.cuda.graphs import GraphKey
from fastface_trt.engines.cuda.stream import Stream
from fastface_trt.engines.device import ITEM_BYTES, DeviceTensor, Tensor
from fastface_trt.engines.manifest import ModuleSpec
from fastface_trt.engines.tensorrt.network import MessageLog
from fastface_trt.engines.tensorrt.profiles import Profile, Shape
from fastface_trt.errors import EngineFailed

_ALIGNMENT = 256
Shapes = tuple[Shape, ...]


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
