"""Where tensors live: a `Device` makes, copies and returns them; it computes nothing.

The runtime is written against `Device`, so one loop drives numpy arrays on the host and memory of
a GPU. Arithmetic on tensors is the engines' business; the little that the loop needs between two
UNet calls is an engine too (`guidance_step`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from fastface_trt.engines import dlpack
from fastface_trt.engines.dtypes import ITEM_BYTES, TYPESTR, DType
from fastface_trt.errors import EngineFailed

Array: TypeAlias = NDArray[Any]


@runtime_checkable
class Lender(Protocol):
    """Device memory that others may hold: what `DeviceTensor.memory` is for tensors of ours."""

    ordinal: int

    def lend(self, stream: int | None = None) -> int:
        """Keep the memory beyond its device, and return the stream that its writes are on.

        Work that follows on CUDA stream `stream` waits for those writes.
        """
        ...

    def copy_of(self, tensor: "DeviceTensor") -> "DeviceTensor":
        """A copy, ordered behind the writes."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class DeviceTensor:
    """A dense, row-major tensor in device memory.

    `address` is a device pointer. `memory` is whatever must stay alive while the tensor is used;
    None for a view of a buffer that an engine owns and overwrites on its next call.

    Others see it by DLPack or the CUDA Array Interface, without a copy. What they hold outlives the
    device. They must be done with it before they drop it: the memory is used again in the order of
    the stream that it came from, which knows nothing of theirs.
    """

    address: int
    shape: tuple[int, ...]
    dtype: DType
    memory: object = None

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return prod(self.shape) * ITEM_BYTES[self.dtype]

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator["DeviceTensor"]:
        return (self[row] for row in range(len(self)))

    def __getitem__(self, row: int) -> "DeviceTensor":
        """Row `row` of the leading axis, sharing this tensor's memory."""
        if not 0 <= row < self.shape[0]:
            raise IndexError(f"row {row} of {self.shape[0]}")
        stride = prod(self.shape[1:]) * ITEM_BYTES[self.dtype]
        return DeviceTensor(self.address + row * stride, self.shape[1:], self.dtype, self.memory)

    def reshape(self, *shape: int) -> "DeviceTensor":
        """The same memory in another shape, as numpy's; one size may be −1."""
        known = -prod(shape)
        whole = tuple(prod(self.shape) // known if size == -1 else size for size in shape)
        if prod(whole) != prod(self.shape):
            raise ValueError(f"{self.shape} has no shape {shape}")
        return replace(self, shape=whole)

    def __dlpack_device__(self) -> tuple[int, int]:
        """(DLDeviceType, number), as in the array API standard."""
        return dlpack.CUDA, self._lender().ordinal

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> object:
        """A DLPack capsule, as in the array API standard: a view unless `copy` is True.

        `stream` is the consumer's CUDA stream; None and 1 are the default stream, 2 the one per
        thread, -1 asks for no ordering. Raises `BufferError` for a view of an engine's buffer, and
        for another device.
        """
        lender = self._lender()
        device = self.__dlpack_device__()
        if dl_device not in (None, device):
            raise BufferError(f"the tensor lies on {device}, not on {dl_device}: download it")
        if stream == 0:
            raise BufferError("stream 0 is ambiguous on CUDA: 1 is the default stream")
        tensor = lender.copy_of(self) if copy else self
        if copy:
            lender = tensor._lender()
        lender.lend(None if stream == -1 else stream or 1)
        return dlpack.lend(
            tensor.address,
            tensor.shape,
            tensor.dtype,
            device,
            tensor,
            versioned=max_version is not None and max_version[0] >= dlpack.VERSION[0],
            copied=bool(copy),
        )

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """CUDA Array Interface, version 3; valid while this tensor is held.

        Raises `AttributeError` for bfloat16, which it has no name for, and for a view of an
        engine's buffer.
        """
        if self.dtype not in TYPESTR or not isinstance(self.memory, Lender):
            raise AttributeError(f"no CUDA Array Interface for {self.dtype} here: use DLPack")
        return {
            "version": 3,
            "shape": self.shape,
            "typestr": TYPESTR[self.dtype],
            "data": (self.address, False),
            "strides": None,
            "stream": self.memory.lend(),
        }

    def _lender(self) -> Lender:
        if not isinstance(self.memory, Lender):
            raise BufferError(
                "a view of memory that is not this tensor's own, such as an engine's buffer, is "
                "not lent: copy it with Device.copy"
            )
        return self.memory


Tensor: TypeAlias = Array | DeviceTensor
"""A numpy array on the host or a `DeviceTensor`; an engine takes and returns its device's kind."""


@dataclass(slots=True)
class Copies:
    """Copies between host and device so far, in calls and bytes; all zero on the host."""

    to_device: int = 0
    to_device_bytes: int = 0
    to_host: int = 0
    to_host_bytes: int = 0


class Marker(Protocol):
    """A point in the work that one thread gave to a device."""

    def seconds_since(self, earlier: "Marker") -> float:
        """Seconds from `earlier` to this point, by the device's clock; waits until it is reached.

        Both are of one device.
        """
        ...


class Device(Protocol):
    """A place for tensors. Every method may be called from several threads side by side.

    Work is ordered within a thread. A tensor may be handed to another thread after `synchronize`.
    """

    name: str

    @property
    def copies(self) -> Copies:
        """What was copied to and from this device since it was opened."""
        ...

    def upload(self, array: Array) -> Tensor:
        """The array on this device; the array may be changed as soon as this returns."""
        ...

    def download(self, tensor: Tensor, out: Array | None = None) -> Array:
        """The tensor as a numpy array, after all earlier work of this thread has finished.

        `out`, of its shape and dtype and row-major, is filled and returned where it is given.
        """
        ...

    def copy(self, tensor: Tensor) -> Tensor:
        """A copy that its holder owns; what an engine returned is overwritten by its next call."""
        ...

    def stack(self, tensors: Sequence[Tensor]) -> Tensor:
        """Tensors of one shape [...] and dtype as the rows of a new one, [n, ...]."""
        ...

    def concatenate_last(self, tensors: Sequence[Tensor]) -> Tensor:
        """Tensors of one dtype side by side along their last axis."""
        ...

    def zeros(self, shape: Sequence[int], dtype: str) -> Tensor:
        """A tensor of zeros; `dtype` is a name such as float16."""
        ...

    def borrow(self, source: object, *, writable: bool = False) -> Tensor:
        """Memory of this device that somebody else made, as a dense tensor, without a copy.

        `source` has `__dlpack__`, the CUDA Array Interface, or on the host numpy's; it is held as
        long as the tensor. Work of this thread follows what its maker has queued. Raises
        `BufferError` where the memory lies elsewhere, is not dense, has other element types, or is
        read-only and must not be.
        """
        ...

    def write(self, target: Tensor, values: Array) -> None:
        """Fill a borrowed tensor from an array of its shape and dtype; done when this returns."""
        ...

    def wait(self, *, stream: object = None, event: object = None) -> None:
        """Work of this thread from now on waits for what is on `stream` now, and for `event`.

        They are somebody else's: CUDA handles as integers, or objects with `__cuda_stream__`.
        Without effect on the host, where nothing is queued: what is passed must be ready.
        """
        ...

    def signal(self, *, stream: object = None, event: object = None) -> None:
        """Work put on `stream` from now on waits for this thread's; `event` is recorded behind it.

        Without effect on the host, where work is done when a call returns.
        """
        ...

    def synchronize(self) -> None:
        """Wait until all earlier work of this thread has finished."""
        ...

    def mark(self) -> Marker | None:
        """The point that this thread's work has come to, without waiting for it.

        None where work is done when a call returns, so that the host's clock tells the same.
        """
        ...

    def close(self) -> None:
        """Free what the device holds; its tensors must not be used afterwards."""
        ...


class DeviceLost(EngineFailed):
    """An error after which every call of this process to its device fails: only another helps."""


class HostDevice:
    """The host: tensors are numpy arrays, uploads and downloads are the array itself."""

    name = "host"

    @property
    def copies(self) -> Copies:
        """Always zero: nothing has to cross to another memory."""
        return Copies()

    def upload(self, array: Array) -> Array:
        """The array itself, which must not be changed afterwards."""
        return array

    def download(self, tensor: Tensor, out: Array | None = None) -> Array:
        """The array itself, or `out` with its values."""
        if out is None:
            return _on_host(tensor)
        self.write(out, _on_host(tensor))
        return out

    def copy(self, tensor: Tensor) -> Array:
        """A copy, as `numpy.copy`."""
        return _on_host(tensor).copy()

    def stack(self, tensors: Sequence[Tensor]) -> Array:
        """`numpy.stack` along a new first axis."""
        return np.stack([_on_host(tensor) for tensor in tensors])

    def concatenate_last(self, tensors: Sequence[Tensor]) -> Array:
        """`numpy.concatenate` along the last axis."""
        return np.concatenate([_on_host(tensor) for tensor in tensors], axis=-1)

    def zeros(self, shape: Sequence[int], dtype: str) -> Array:
        """`numpy.zeros`."""
        return np.zeros(tuple(shape), dtype=dtype)

    def borrow(self, source: object, *, writable: bool = False) -> Array:
        """The array that shares the source's memory."""
        if isinstance(source, np.ndarray):
            array = source
        elif hasattr(source, "__dlpack__"):
            array = _array_of(dlpack.ask(source, None))
        elif hasattr(source, "__cuda_array_interface__"):
            raise BufferError("the memory lies on a GPU")
        else:
            array = np.asarray(source if hasattr(source, "__array_interface__") else _view(source))
        if not array.flags.c_contiguous:
            raise BufferError("the elements are not dense and row-major")
        if writable and not array.flags.writeable:
            raise BufferError("the memory is read-only")
        return array

    def write(self, target: Tensor, values: Array) -> None:
        """Copy into the array."""
        np.copyto(_on_host(target), values, casting="no")

    def wait(self, *, stream: object = None, event: object = None) -> None:
        """Nothing is queued that could wait."""

    def signal(self, *, stream: object = None, event: object = None) -> None:
        """Nothing is queued that could be waited for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def mark(self) -> None:
        """None: nothing is queued."""

    def close(self) -> None:
        """Nothing to free."""


def dtype_name(tensor: Tensor) -> str:
    """The element type's name, such as float16, of a tensor on any device."""
    return str(tensor.dtype)


def _on_host(tensor: Tensor) -> Array:
    if isinstance(tensor, DeviceTensor):
        raise TypeError("a tensor in device memory reached the host device")
    return np.asarray(tensor)


def _array_of(borrowed: dlpack.Borrowed) -> Array:
    kind, _ = borrowed.device
    if kind not in (dlpack.HOST, dlpack.CUDA_HOST, dlpack.CUDA_MANAGED):
        raise BufferError(f"the memory lies on a device of DLPack type {kind}")
    if borrowed.dtype not in TYPESTR:
        raise BufferError(f"numpy has no {borrowed.dtype}")
    if not dlpack.is_dense(borrowed.shape, borrowed.strides):
        raise BufferError("the elements are not dense and row-major")
    typestr = TYPESTR[borrowed.dtype]
    array = dlpack.host_array(borrowed.address, borrowed.shape, typestr, borrowed.memory)
    if borrowed.read_only:
        array.flags.writeable = False
    return array


def _view(source: Any) -> memoryview:
    try:
        return memoryview(source)
    except TypeError:
        raise BufferError(
            f"{type(source).__name__} has none of __dlpack__, __cuda_array_interface__, "
            "__array_interface__ and the buffer protocol"
        ) from None
