"""`CudaDevice`: tensors in the memory of one GPU, its own and what other libraries lend it.

Memory is of three kinds. Tensors that the runtime makes come from a stream-ordered pool: making and
dropping them costs no wait, and a picture's second step reuses what its first one freed. Buffers
that engines keep (`allocate`) are plain allocations, freed exactly when their engine is closed.
Scratch memory is shared by all engines of a thread (`stream.Scratch`).
"""

import threading
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import astuple
from math import prod
from typing import Any

import numpy as np

from fastface_trt.engines import dlpack
from fastface_trt.engines.cuda.driver import Driver, Handle
from fastface_trt.engines.cuda.stream import LentMemory, Stream
from fastface_trt.engines.device import (
    Array,
    Copies,
    DeviceTensor,
    HostDevice,
    Marker,
    Tensor,
    dtype_name,
)
from fastface_trt.engines.dtypes import FROM_TYPESTR, ITEM_BYTES, DType
from fastface_trt.errors import EngineFailed, EngineMismatch, OutOfMemory


class CudaDevice:
    """GPU `ordinal` as a `Device`; open until `close`.

    Each thread has a stream of its own, made on its first call and handed to another thread once it
    has ended. `warn` is told, in a sentence, what works more slowly than it should; the default is
    Python's `warnings`. Raises `BackendUnavailable` without a driver or GPU.
    """

    def __init__(self, ordinal: int = 0, *, warn: Callable[[str], None] | None = None) -> None:
        self.name = f"cuda:{ordinal}"
        self.warn = warn or _warn
        self.driver = Driver()
        self._device = self.driver.device(ordinal)
        self.gpu = {
            "gpu": self.driver.device_name(self._device),
            "compute_capability": self.driver.compute_capability(self._device),
            "driver": str(self.driver.version()),
        }
        self._context = self.driver.retain_context(self._device)
        self.enter_thread()
        self._pool = self.driver.pool_create(ordinal)
        self._events = TimingEvents(self.driver, self._context)
        self._ordinal = ordinal
        self._lent = LentMemory(self.driver, self._device, self._context, ordinal)
        self._lock = threading.Lock()
        self._here = threading.local()
        self._streams: list[tuple[weakref.ref[threading.Thread], Stream]] = []
        self._buffers: dict[int, int] = {}
        self.closed = False

    # What the runtime calls: see `engines.device.Device`

    @property
    def copies(self) -> Copies:
        """What all threads copied to and from the GPU."""
        with self._lock:
            counts = [astuple(stream.copies) for _, stream in self._streams]
        return Copies(*map(sum, zip(*counts, strict=True))) if counts else Copies()

    def upload(self, array: Array) -> DeviceTensor:
        """The array on the GPU; it has left `array` when this returns."""
        array = np.asarray(array)
        tensor = self.empty(array.shape, dtype_name(array))
        self.copy_into(tensor, array)
        return tensor

    def download(self, tensor: Tensor, out: Array | None = None) -> Array:
        """The tensor as a new numpy array, or in `out`; waits for this thread's work."""
        if not isinstance(tensor, DeviceTensor):
            return HostDevice().download(tensor, out)
        array = np.empty(tensor.shape, dtype=tensor.dtype) if out is None else out
        fits = (array.shape, array.dtype) == (tensor.shape, np.dtype(tensor.dtype))
        if not fits or not array.flags.c_contiguous:
            raise ValueError(f"{array.dtype} {array.shape} is no {tensor.dtype} {tensor.shape}")
        stream = self.stream()
        stream.reads(tensor.memory)
        stream.to_host(tensor.address, array)
        return array

    def copy(self, tensor: Tensor) -> DeviceTensor:
        """A copy in memory of its own."""
        target = self.empty(tensor.shape, dtype_name(tensor))
        self.copy_into(target, tensor)
        return target

    def stack(self, tensors: Sequence[Tensor]) -> DeviceTensor:
        """Tensors of one shape as rows of a new one."""
        first = tensors[0]
        target = self.empty((len(tensors), *first.shape), _common_dtype(tensors))
        for row, tensor in zip(target, tensors, strict=True):
            self.copy_into(row, tensor)
        return target

    def concatenate_last(self, tensors: Sequence[Tensor]) -> DeviceTensor:
        """Tensors side by side along the last axis, by copies with a pitch."""
        parts = [t if isinstance(t, DeviceTensor) else self.upload(t) for t in tensors]
        dtype = _common_dtype(parts)
        *leading, _ = parts[0].shape
        widths = [part.shape[-1] * ITEM_BYTES[dtype] for part in parts]
        target = self.empty((*leading, sum(part.shape[-1] for part in parts)), dtype)
        stream, at = self.stream(), target.address
        for part, width in zip(parts, widths, strict=True):
            stream.reads(part.memory)
            self.driver.copy_columns(
                at, sum(widths), part.address, width, width, prod(leading), stream.handle
            )
            at += width
        return target

    def zeros(self, shape: Sequence[int], dtype: str) -> DeviceTensor:
        """A tensor of zero bytes."""
        tensor = self.empty(shape, dtype)
        self.driver.fill_zero(tensor.address, tensor.nbytes, self.stream().handle)
        return tensor

    def borrow(self, source: object, *, writable: bool = False) -> DeviceTensor:
        """Memory of this GPU, by DLPack or the CUDA Array Interface."""
        if isinstance(source, DeviceTensor):
            return source
        stream = int(self.stream().handle)
        return _borrow(
            source, self._ordinal, stream, lambda other: self.wait(stream=other), writable
        )

    def write(self, target: Tensor, values: Array) -> None:
        """Through pinned memory into the borrowed tensor."""
        if not isinstance(target, DeviceTensor) or target.shape != values.shape:
            raise BufferError("the target lies elsewhere, or has another shape")
        stream = self.stream()
        stream.reads(target.memory)
        self.copy_into(target, values)
        stream.synchronize()

    def wait(self, *, stream: object = None, event: object = None) -> None:
        """A CUDA event on `stream` that this thread's stream waits for, and `event`."""
        own = self.stream().handle
        if stream is not None:
            self.driver.stream_follow_once(own, self.driver.stream(_number(stream)))
        if event is not None:
            self.driver.event_wait(own, self.driver.event(_number(event)))

    def signal(self, *, stream: object = None, event: object = None) -> None:
        """A CUDA event on this thread's stream that `stream` waits for, and `event`."""
        own = self.stream().handle
        if stream is not None:
            self.driver.stream_follow_once(self.driver.stream(_number(stream)), own)
        if event is not None:
            self.driver.event_record(self.driver.event(_number(event)), own)

    def synchronize(self) -> None:
        """Wait for this thread's work."""
        self.stream().synchronize()

    def mark(self) -> "Event":
        """A CUDA event on this thread's stream."""
        return self._events.record(self.stream().handle)

    def close(self) -> None:
        """Free everything on the GPU but what was lent to others; twice is harmless."""
        with self._lock:
            if self.closed:
                return
            self.closed = True
            self.driver.use_context(self._context)
            for _, stream in self._streams:
                with stream.lock:
                    stream.close()
            self._streams.clear()
            self._events.close()
            for address in self._buffers:
                self.driver.mem_free(address)
            self._buffers.clear()
            self.driver.pool_destroy(self._pool)
            self.driver.release_context(self._device)

    # What engines call besides

    def enter_thread(self) -> None:
        """Make the GPU's context the calling thread's, for one that needs no stream of its own.

        What the thread allocates then breaks no CUDA graph that another one records meanwhile.
        """
        self.driver.use_context(self._context)
        self.driver.ignore_captures_elsewhere()

    def stream(self) -> Stream:
        """The calling thread's stream; makes the GPU's context this thread's on its first call."""
        if self.closed:
            raise EngineFailed(f"The device {self.name} is closed.", "Load the model again.")
        stream: Stream | None = getattr(self._here, "stream", None)
        if stream is None:
            self.enter_thread()
            stream = self._here.stream = self._stream_for(threading.current_thread())
        return stream

    def empty(self, shape: Sequence[int], dtype: str) -> DeviceTensor:
        """A tensor whose contents are undefined."""
        kind = _dtype(dtype)
        memory = self.stream().allocate(prod(shape) * ITEM_BYTES[kind])
        return DeviceTensor(memory.address, tuple(shape), kind, memory)

    def copy_into(self, target: DeviceTensor, source: Tensor) -> None:
        """Fill `target` from a tensor of the same shape and dtype on either side."""
        stream = self.stream()
        if not isinstance(source, DeviceTensor):
            stream.to_device(target.address, source)
        elif source.nbytes:
            stream.reads(source.memory)
            self.driver.copy_within(target.address, source.address, target.nbytes, stream.handle)

    def allocate(self, size: int) -> int:
        """Address of a buffer that stays until `free`; any thread may use it."""
        address = self.driver.mem_alloc(size)
        with self._lock:
            self._buffers[address] = size
        return address

    def free(self, address: int) -> None:
        """Free a buffer of `allocate`; nothing may be using it. A closed device has done so."""
        with self._lock:
            known = self._buffers.pop(address, None)
        if known is not None:
            self.driver.mem_free(address)

    @property
    def held_bytes(self) -> int:
        """Bytes in engines' buffers and scratch memory; weights and tensors come on top."""
        with self._lock:
            scratch = sum(stream.scratch.size for _, stream in self._streams)
            return scratch + sum(self._buffers.values())

    def require(self, size: int, what: str, hint: str) -> None:
        """Raise `OutOfMemory` unless `size` more bytes are free; the pool gives back its own."""
        self.stream()  # a thread's first call needs the context
        self.driver.pool_trim(self._pool)
        free = self.driver.free_memory()
        if size > free:
            raise OutOfMemory(
                f"{what} needs {_gigabytes(size)} of GPU memory, {_gigabytes(free)} are free.", hint
            )

    def _stream_for(self, thread: threading.Thread) -> Stream:
        owner = weakref.ref(thread)
        with self._lock:
            for index, (earlier, stream) in enumerate(self._streams):
                before = earlier()
                if before is None or not before.is_alive():
                    self._streams[index] = (owner, stream)
                    break
            else:
                stream = Stream(self.driver, self._pool, self.warn, self._lent)
                self._streams.append((owner, stream))
        return stream


class SharedDevice:
    """The one `CudaDevice` of a builder's engines: opened when asked for, anew once closed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._device: CudaDevice | None = None

    def get(self) -> CudaDevice:
        """The open device; raises `BackendUnavailable` without a driver or GPU."""
        with self._lock:
            if self._device is None or self._device.closed:
                self._device = CudaDevice()
            return self._device

    def enter_thread(self) -> None:
        """Let this thread use the GPU beside the open device, if any; see `CudaDevice`."""
        with self._lock:
            if self._device is not None and not self._device.closed:
                self._device.enter_thread()


def _borrow(
    source: Any, ordinal: int, stream: int, wait: Callable[[int], None], writable: bool
) -> DeviceTensor:
    """A tensor over the memory of `source` on GPU `ordinal`.

    `stream` is the CUDA stream that will use it; `wait` makes that stream wait for another one.
    Raises `BufferError`.
    """
    if hasattr(source, "__dlpack__"):
        kind, number = source.__dlpack_device__()
        if (int(kind), number) not in ((dlpack.CUDA, ordinal), (dlpack.CUDA_MANAGED, ordinal)):
            raise BufferError(
                f"the memory lies on DLPack device ({int(kind)}, {number}), not on GPU {ordinal}"
            )
        borrowed = dlpack.ask(source, stream)
        if not dlpack.is_dense(borrowed.shape, borrowed.strides):
            raise BufferError("the elements are not dense and row-major")
        _require_writable(writable, borrowed.read_only)
        return DeviceTensor(borrowed.address, borrowed.shape, borrowed.dtype, borrowed.memory)
    described = getattr(source, "__cuda_array_interface__", None)
    if described is None:
        raise BufferError(
            f"{type(source).__name__} has neither __dlpack__ nor __cuda_array_interface__"
        )
    return _described(source, described, wait, writable)


def _described(
    source: object, described: dict[str, Any], wait: Callable[[int], None], writable: bool
) -> DeviceTensor:
    dtype = FROM_TYPESTR.get(described["typestr"])
    if dtype is None or described.get("mask") is not None:
        raise BufferError(f"elements of type {described['typestr']}, or a mask")
    shape, strides = tuple(described["shape"]), described.get("strides")
    size = np.dtype(described["typestr"]).itemsize
    if strides is not None and not dlpack.is_dense(shape, tuple(s // size for s in strides)):
        raise BufferError("the elements are not dense and row-major")
    address, read_only = described["data"]
    _require_writable(writable, read_only)
    stream = described.get("stream")
    if stream is not None:
        wait(stream)
    return DeviceTensor(address, shape, dtype, source)


def _require_writable(writable: bool, read_only: bool) -> None:
    if writable and read_only:
        raise BufferError("the memory is read-only")


class Event:
    """A point of a stream, read when the GPU has passed it.

    Its handle is used again once nobody holds the event any more.
    """

    __slots__ = ("_events", "handle")

    def __init__(self, handle: Handle, events: "TimingEvents") -> None:
        self.handle = handle
        self._events = events

    def seconds_since(self, earlier: Marker) -> float:
        """Seconds between two events by the GPU's clock; waits until the GPU has reached this one.

        Raises `EngineFailed` when their device was closed.
        """
        if not isinstance(earlier, Event):
            raise TypeError("the earlier point is not a CUDA event")
        return self._events.seconds(earlier.handle, self.handle)

    def __del__(self) -> None:
        # It may come on any thread and in the middle of anything, so it makes no CUDA call.
        self._events.unused.append(self.handle)


class TimingEvents:
    """The timing events of one device; any thread may record them."""

    def __init__(self, driver: Driver, context: Handle) -> None:
        self._driver, self._context = driver, context
        self._all: deque[Handle] = deque()
        self._closed = False
        self.unused: deque[Handle] = deque()

    def record(self, stream: Handle) -> Event:
        """An event behind what is on `stream` now."""
        try:
            handle = self.unused.popleft()
        except IndexError:
            handle = self._driver.timing_event_create()
            self._all.append(handle)
        self._driver.event_record(handle, stream)
        return Event(handle, self)

    def seconds(self, earlier: Handle, later: Handle) -> float:
        """Seconds between two recorded events."""
        if self._closed:
            raise EngineFailed(
                "The device of these times is closed.", "Read them before the model is closed."
            )
        # Whoever reads the times may be a thread that never worked on the GPU.
        self._driver.use_context(self._context)
        return self._driver.event_seconds(earlier, later)

    def close(self) -> None:
        """Destroy every event, also those that somebody still holds."""
        self._closed = True
        self.unused.clear()
        while self._all:
            self._driver.event_destroy(self._all.popleft())


def _number(handle: Any) -> int:
    """The CUDA handle of a stream or event that is one, or an object around one."""
    if hasattr(handle, "__cuda_stream__"):  # (version, handle): cuda.core's protocol
        return int(handle.__cuda_stream__()[1])
    return int(handle)


def _dtype(name: str) -> DType:
    for known in ITEM_BYTES:
        if known == name:
            return known
    raise EngineMismatch(
        f"A GPU engine was given numbers of type {name}.", f"It takes {', '.join(ITEM_BYTES)}."
    )


def _common_dtype(tensors: Sequence[Tensor]) -> DType:
    names = sorted({dtype_name(tensor) for tensor in tensors})
    if len(names) > 1:
        raise EngineMismatch(
            f"Modules of this export give {' and '.join(names)} where one type is needed.",
            "Export the model again with this version: fastface-trt export.",
        )
    return _dtype(names[0])


def _warn(line: str) -> None:
    warnings.warn(line, RuntimeWarning, stacklevel=2)


def _gigabytes(size: int) -> str:
    return f"{size / 2**30:.1f} GB"
