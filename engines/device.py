"""Where tensors live: a `Device` makes, copies and returns them; it computes nothing.

The runtime is written against `Device`, so one loop drives numpy arrays on the host and memory of
a GPU. Arithmetic on tensors is the engines' business; the little that the loop needs between two
UNet calls is an engine too (`guidance_step`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Final, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fastface_trt.engines.manifest import DType

Array: TypeAlias = NDArray[Any]

ITEM_BYTES: Final[dict[DType, int]] = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
}


@dataclass(frozen=True, slots=True, eq=False)
class DeviceTensor:
    """A dense, row-major tensor in device memory.

    `address` is a device pointer. `memory` is whatever must stay alive while the tensor is used;
    None for a view of a buffer that an engine owns and overwrites on its next call.
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

    def download(self, tensor: Tensor) -> Array:
        """The tensor as a numpy array, after all earlier work of this thread has finished."""
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

    def download(self, tensor: Tensor) -> Array:
        """The array itself."""
        return _on_host(tensor)

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
