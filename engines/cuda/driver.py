"""The CUDA driver calls that this package makes, each checked, in Python types.

Addresses are integers, sizes are bytes, streams and graphs are the binding's own handles. Nothing
else in the project calls `cuda.bindings`, so tests put a simulated driver in its place.
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from fastface_trt.engines.device import DeviceLost
from fastface_trt.errors import (
    BackendUnavailable,
    EngineFailed,
    FastFaceError,
    OutOfMemory,
    install_hint,
)

Handle = Any
"""A stream, event, graph, pool or context of the binding."""

_STICKY: Final = frozenset(
    {
        "CUDA_ERROR_ASSERT",
        "CUDA_ERROR_CONTEXT_IS_DESTROYED",
        "CUDA_ERROR_ECC_UNCORRECTABLE",
        "CUDA_ERROR_HARDWARE_STACK_ERROR",
        "CUDA_ERROR_ILLEGAL_ADDRESS",
        "CUDA_ERROR_ILLEGAL_INSTRUCTION",
        "CUDA_ERROR_INVALID_ADDRESS_SPACE",
        "CUDA_ERROR_INVALID_PC",
        "CUDA_ERROR_LAUNCH_FAILED",
        "CUDA_ERROR_LAUNCH_TIMEOUT",
        "CUDA_ERROR_MISALIGNED_ADDRESS",
    }
)
"""Errors after which every call of the process fails, whatever it is."""

_NO_DRIVER = "Install NVIDIA's driver (nvidia-smi shows it), or use the backend onnxruntime."


class Driver:
    """CUDA driver calls; raises `EngineFailed`, `OutOfMemory` or `BackendUnavailable` for errors.

    The constructor loads the driver and raises `BackendUnavailable` when there is none.
    """

    def __init__(self) -> None:
        try:
            self._cuda: Any = importlib.import_module("cuda.bindings.driver")
        except (ImportError, OSError) as error:
            raise BackendUnavailable(
                f"The CUDA bindings cannot be imported: {error}.",
                f"{install_hint('gpu')} (it brings cuda-python).",
            ) from None
        try:
            self._call("cuInit", 0)
        except RuntimeError as error:  # the binding's way to say that there is no libcuda
            raise BackendUnavailable(f"There is no CUDA driver: {error}.", _NO_DRIVER) from None
        except EngineFailed as error:
            raise BackendUnavailable(error.message, _NO_DRIVER) from None

    def version(self) -> int:
        """The CUDA version of the driver, such as 13020 for 13.2."""
        return int(self._call("cuDriverGetVersion"))

    # Device and context

    def device(self, ordinal: int) -> Handle:
        """GPU number `ordinal`."""
        return self._call("cuDeviceGet", ordinal)

    def device_name(self, device: Handle) -> str:
        """Its name, such as NVIDIA H100."""
        return str(self._call("cuDeviceGetName", 128, device).split(b"\0")[0].decode())

    def compute_capability(self, device: Handle) -> str:
        """Its compute capability, such as 9.0."""
        kind = self._cuda.CUdevice_attribute
        return ".".join(
            str(self._call("cuDeviceGetAttribute", which, device))
            for which in (
                kind.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                kind.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )
        )

    def retain_context(self, device: Handle) -> Handle:
        """The device's primary context, which TensorRT and ONNX Runtime use too."""
        return self._call("cuDevicePrimaryCtxRetain", device)

    def release_context(self, device: Handle) -> None:
        """Give back one `retain_context`."""
        self._call("cuDevicePrimaryCtxRelease", device)

    def use_context(self, context: Handle) -> None:
        """Make `context` the calling thread's."""
        self._call("cuCtxSetCurrent", context)

    @contextmanager
    def context(self, context: Handle) -> Iterator[None]:
        """Make `context` the calling thread's for a while, whatever the thread works with."""
        self._call("cuCtxPushCurrent", context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent")

    def ignore_captures_elsewhere(self) -> None:
        """Let this thread allocate while another thread records a CUDA graph.

        A recording in the strictest mode, such as ONNX Runtime's, forbids it to all threads that
        have not asked for this, and breaks when one of them allocates all the same.
        """
        mode = self._cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call("cuThreadExchangeStreamCaptureMode", mode)

    # Streams

    def stream(self, number: int) -> Handle:
        """The handle of somebody else's stream; 0 and 1 are the default stream."""
        return self._cuda.CUstream(number)

    def event(self, number: int) -> Handle:
        """The handle of somebody else's event."""
        return self._cuda.CUevent(number)

    def stream_create(self) -> Handle:
        """A stream that does not wait for the default stream."""
        flags = self._cuda.CUstream_flags.CU_STREAM_NON_BLOCKING
        return self._call("cuStreamCreate", int(flags))

    def stream_destroy(self, stream: Handle) -> None:
        """Destroy a stream whose work has finished."""
        self._call("cuStreamDestroy", stream)

    def stream_synchronize(self, stream: Handle) -> None:
        """Wait for all work of `stream`."""
        self._call("cuStreamSynchronize", stream)

    def event_create(self) -> Handle:
        """An event that takes no time stamps."""
        return self._call("cuEventCreate", int(self._cuda.CUevent_flags.CU_EVENT_DISABLE_TIMING))

    def event_destroy(self, event: Handle) -> None:
        """Destroy an event."""
        self._call("cuEventDestroy", event)

    def timing_event_create(self) -> Handle:
        """An event that takes the time at which the GPU reaches it."""
        return self._call("cuEventCreate", int(self._cuda.CUevent_flags.CU_EVENT_DEFAULT))

    def event_record(self, event: Handle, stream: Handle) -> None:
        """Put `event` behind what is on `stream` now."""
        self._call("cuEventRecord", event, stream)

    def event_seconds(self, earlier: Handle, later: Handle) -> float:
        """Seconds between two recorded timing events; waits until the GPU has reached `later`."""
        self._call("cuEventSynchronize", later)
        return float(self._call("cuEventElapsedTime", earlier, later)) / 1000

    def event_wait(self, stream: Handle, event: Handle) -> None:
        """Work put on `stream` from now on waits for `event`."""
        self._call("cuStreamWaitEvent", stream, event, 0)

    def stream_follow(self, later: Handle, earlier: Handle, event: Handle) -> None:
        """Work put on stream `later` from now on waits for what is on `earlier` now."""
        self.event_record(event, earlier)
        self.event_wait(later, event)

    def stream_follow_once(self, later: Handle, earlier: Handle) -> None:
        """`stream_follow` with an event made for it, for streams that several threads order."""
        event = self.event_create()
        try:
            self.stream_follow(later, earlier, event)
        finally:
            self.event_destroy(event)  # CUDA keeps it until it has been reached

    # Memory

    def free_memory(self) -> int:
        """Bytes that the GPU could still allocate."""
        free, _ = self._call("cuMemGetInfo")
        return int(free)

    def mem_alloc(self, size: int) -> int:
        """Address of new device memory, aligned to at least 256 bytes."""
        return int(self._call("cuMemAlloc", size))

    def mem_free(self, address: int) -> None:
        """Free `mem_alloc`'s memory; waits for the GPU."""
        self._call("cuMemFree", address)

    def pool_create(self, ordinal: int) -> Handle:
        """A pool for stream-ordered allocations on a GPU; it keeps what is freed for reuse."""
        cuda = self._cuda
        properties = cuda.CUmemPoolProps()
        properties.allocType = cuda.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        properties.handleTypes = cuda.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_NONE
        properties.location.type = cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        properties.location.id = ordinal
        pool = self._call("cuMemPoolCreate", properties)
        kept = cuda.CUmemPool_attribute.CU_MEMPOOL_ATTR_RELEASE_THRESHOLD
        self._call("cuMemPoolSetAttribute", pool, kept, cuda.cuuint64_t(2**64 - 1))
        return pool

    def pool_trim(self, pool: Handle) -> None:
        """Give memory that the pool keeps for reuse back to the GPU."""
        self._call("cuMemPoolTrimTo", pool, 0)

    def pool_destroy(self, pool: Handle) -> None:
        """Destroy a pool and all that it holds."""
        self._call("cuMemPoolDestroy", pool)

    def mem_alloc_async(self, size: int, pool: Handle, stream: Handle) -> int:
        """Address of memory from `pool`, usable by work that follows on `stream`."""
        return int(self._call("cuMemAllocFromPoolAsync", size, pool, stream))

    def mem_free_async(self, address: int, stream: Handle) -> None:
        """Free it once the work before this on `stream` has finished."""
        self._call("cuMemFreeAsync", address, stream)

    def pinned_alloc(self, size: int) -> int:
        """Address of host memory that the GPU copies from and to without the processor."""
        return int(self._call("cuMemAllocHost", size))

    def pinned_free(self, address: int) -> None:
        """Free `pinned_alloc`'s memory."""
        self._call("cuMemFreeHost", address)

    def copy_to_device(self, target: int, source: int, size: int, stream: Handle) -> None:
        """Pinned host memory to device memory."""
        self._call("cuMemcpyHtoDAsync", target, source, size, stream)

    def copy_to_host(self, target: int, source: int, size: int, stream: Handle) -> None:
        """Device memory to pinned host memory."""
        self._call("cuMemcpyDtoHAsync", target, source, size, stream)

    def copy_within(self, target: int, source: int, size: int, stream: Handle) -> None:
        """Device memory to device memory."""
        self._call("cuMemcpyDtoDAsync", target, source, size, stream)

    def copy_columns(
        self,
        target: int,
        target_pitch: int,
        source: int,
        source_pitch: int,
        width: int,
        rows: int,
        stream: Handle,
    ) -> None:
        """`rows` pieces of `width` bytes, which lie a pitch (bytes) apart on either side."""
        device = self._cuda.CUmemorytype.CU_MEMORYTYPE_DEVICE
        copy = self._cuda.CUDA_MEMCPY2D()
        copy.srcMemoryType, copy.dstMemoryType = device, device
        copy.srcDevice, copy.srcPitch = source, source_pitch
        copy.dstDevice, copy.dstPitch = target, target_pitch
        copy.WidthInBytes, copy.Height = width, rows
        self._call("cuMemcpy2DAsync", copy, stream)

    def fill_zero(self, address: int, size: int, stream: Handle) -> None:
        """Zero bytes in device memory."""
        self._call("cuMemsetD8Async", address, 0, size, stream)

    # Graphs

    def capture_begin(self, stream: Handle) -> None:
        """Record what this thread puts on `stream` instead of doing it."""
        # Other threads may allocate meanwhile; in the strictest mode that would break the capture.
        mode = self._cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call("cuStreamBeginCapture", stream, mode)

    def capture_end(self, stream: Handle) -> Handle:
        """The recorded graph; ends the recording also when it raises."""
        return self._call("cuStreamEndCapture", stream)

    def graph_instantiate(self, graph: Handle) -> Handle:
        """An executable copy of a recorded graph."""
        return self._call("cuGraphInstantiate", graph, 0)

    def graph_destroy(self, graph: Handle) -> None:
        """Destroy a recorded graph; its executable copies stay."""
        self._call("cuGraphDestroy", graph)

    def graph_launch(self, executable: Handle, stream: Handle) -> None:
        """Do on `stream` what was recorded."""
        self._call("cuGraphLaunch", executable, stream)

    def graph_exec_destroy(self, executable: Handle) -> None:
        """Destroy an executable graph that is not running."""
        self._call("cuGraphExecDestroy", executable)

    def _call(self, name: str, *arguments: Any) -> Any:
        error, *values = getattr(self._cuda, name)(*arguments)
        if int(error) != 0:
            raise _failure(name, str(error.name))
        return values[0] if len(values) == 1 else tuple(values)


def _failure(call: str, error: str) -> FastFaceError:
    if error == "CUDA_ERROR_OUT_OF_MEMORY":
        return OutOfMemory(
            f"The GPU is out of memory (in {call}).",
            "Close other programs that use it, or ask for fewer or smaller pictures at once.",
        )
    if error in _STICKY:
        return DeviceLost(
            f"The GPU stopped with {error} (in {call}); no further call in this process will work.",
            "Restart the process; if it comes back, report it with the request that led to it.",
        )
    return EngineFailed(
        f"CUDA failed with {error} in {call}.", "Restart the process; if it comes back, report it."
    )
