"""DLPack: memory of ours to others, and memory of others to us, without a copy.

Both layouts are read, DLManagedTensor of DLPack 0.x and DLManagedTensorVersioned of 1.x
(https://dmlc.github.io/dlpack, `dlpack.h`), and written as far as the installed numpy does.
"""

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastface_trt.engines.dtypes import DLPACK, FROM_DLPACK, DType

HOST, CUDA, CUDA_HOST, CUDA_MANAGED = 1, 2, 3, 13
"""DLDeviceType."""

VERSION = (1, 0)
READ_ONLY, IS_COPIED = 1, 2
"""Flags of DLManagedTensorVersioned."""


class _Device(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int32), ("id", ctypes.c_int32))


class _DataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


class _ManagedVersioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


_VERSIONED, _UNVERSIONED = b"dltensor_versioned", b"dltensor"
_USED = {_VERSIONED: b"used_dltensor_versioned", _UNVERSIONED: b"used_dltensor"}

# Prototypes of our own: those of `ctypes.pythonapi` are shared with the whole process.
_name_of = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)(
    ("PyCapsule_GetName", ctypes.pythonapi)
)
_pointer_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
_rename = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_SetName", ctypes.pythonapi)
)


class _Owned:
    """Memory at an address as numpy takes it; holds its owner."""

    def __init__(self, address: int, shape: tuple[int, ...], typestr: str, owner: object) -> None:
        self.owner = owner
        self.__array_interface__ = {
            "version": 3,
            "shape": shape,
            "typestr": typestr,
            "data": (address, False),
        }


def host_array(address: int, shape: tuple[int, ...], typestr: str, owner: object) -> NDArray[Any]:
    """Dense memory as a numpy array that holds `owner`; nothing is read."""
    return np.asarray(_Owned(address, shape, typestr, owner))


def lend(
    address: int,
    shape: tuple[int, ...],
    dtype: DType,
    device: tuple[int, int],
    owner: object,
    *,
    versioned: bool,
    copied: bool = False,
) -> object:
    """A capsule of dense memory on any device; holds `owner` until its tensor is deleted.

    numpy makes the capsule, of an array that it never reads, and device and element type are put in
    afterwards. Deleters are called by C code on any thread, with an exception on its way, and after
    the interpreter has ended: numpy's stand all that, a callback in Python stands none of it.
    `versioned` asks for DLPack 1.x, which numpy has since 2.1.
    """
    code, bits = DLPACK[dtype]
    array = host_array(address, shape, f"<u{bits // 8}" if bits > 8 else "|u1", owner)
    try:
        capsule = array.__dlpack__(max_version=VERSION) if versioned else array.__dlpack__()
    except TypeError:
        capsule = array.__dlpack__()
    name = _name_of(capsule)
    managed = _managed(capsule, name)
    managed.tensor.device = _Device(*device)
    managed.tensor.dtype = _DataType(code, bits, 1)
    if name == _VERSIONED and copied:
        managed.flags |= IS_COPIED
    return capsule


@dataclass(frozen=True, slots=True)
class Borrowed:
    """A tensor in somebody else's memory, which `memory` keeps alive.

    `strides` are in elements, None where it is dense and row-major. `device` is (type, number).
    """

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    dtype: DType
    device: tuple[int, int]
    read_only: bool
    memory: object


class _Taken:
    """A tensor whose deleter is ours to call."""

    __slots__ = ("_delete", "_managed")

    def __init__(self, managed: int, deleter: int | None) -> None:
        self._managed = managed
        self._delete = deleter and ctypes.CFUNCTYPE(None, ctypes.c_void_p)(deleter)

    def __del__(self) -> None:
        if self._delete:
            self._delete(self._managed)


def take(capsule: object) -> Borrowed:
    """Take the tensor out of a capsule of `__dlpack__`; raises `BufferError` for what it is not."""
    try:
        name = _name_of(capsule)
    except ValueError:
        raise BufferError("what __dlpack__ returned is no capsule") from None
    if name not in _USED:
        raise BufferError(f"a DLPack capsule named {name!r} holds no tensor, or was taken before")
    managed = _managed(capsule, name)
    if name == _VERSIONED and managed.major != VERSION[0]:
        raise BufferError(f"DLPack {managed.major}.{managed.minor} is not {VERSION[0]}.x")
    _rename(capsule, _USED[name])
    taken = _Taken(ctypes.addressof(managed), managed.deleter)
    tensor = managed.tensor
    kind = tensor.dtype
    dtype = FROM_DLPACK.get((kind.code, kind.bits))
    if dtype is None or kind.lanes != 1:
        raise BufferError(f"elements of DLPack type {kind.code} with {kind.bits} bits")
    return Borrowed(
        (tensor.data or 0) + tensor.byte_offset,
        tuple(tensor.shape[: tensor.ndim]),
        tuple(tensor.strides[: tensor.ndim]) if tensor.strides else None,
        dtype,
        (tensor.device.type, tensor.device.id),
        name == _VERSIONED and bool(managed.flags & READ_ONLY),
        taken,
    )


def device_of(capsule: object) -> tuple[int, int]:
    """(DLDeviceType, number) of a capsule's tensor; raises `BufferError` for one that has none."""
    name = _name_of(capsule)
    if name not in _USED:
        raise BufferError("the DLPack capsule was taken before")
    device = _managed(capsule, name).tensor.device
    return device.type, device.id


def ask(source: Any, stream: int | None) -> Borrowed:
    """Take what `source.__dlpack__` gives, readable by work that follows on CUDA stream `stream`.

    A producer of DLPack 0.x does not know `max_version`. Raises `BufferError`.
    """
    order: dict[str, Any] = {} if stream is None else {"stream": stream}
    try:
        capsule = source.__dlpack__(max_version=VERSION, **order)
    except TypeError:
        capsule = source.__dlpack__(**order)
    return take(capsule)


def is_dense(shape: tuple[int, ...], strides: tuple[int, ...] | None) -> bool:
    """Whether strides in elements are those of a dense, row-major tensor."""
    if strides is None or 0 in shape:
        return True
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _managed(capsule: object, name: bytes) -> Any:
    kind = _ManagedVersioned if name == _VERSIONED else _Managed
    return kind.from_address(_pointer_of(capsule, name))
