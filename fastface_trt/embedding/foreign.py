"""Tensors of other libraries, checked and on the engines' device; output buffers of callers.

Anything counts that has `__dlpack__`, `__cuda_array_interface__` or `__array_interface__`, on the
host also the buffer protocol. What lies on the host goes to a GPU if the engines are there; what
lies on a GPU is never brought to the host behind the caller's back.
"""

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fastface_trt.engines import dlpack
from fastface_trt.engines.device import Array, Device, DeviceTensor, HostDevice, Tensor, dtype_name
from fastface_trt.errors import InvalidRequest

Foreign: TypeAlias = Any
"""An object with one of the protocols above."""

Target: TypeAlias = NDArray[np.uint8] | DeviceTensor
"""Where a picture goes: uint8 [H, W, 3] in the caller's memory."""

_FLOATS = ("float32", "float16", "bfloat16")


def place(
    device: Device,
    source: Foreign,
    *,
    name: str,
    shape: Sequence[int],
    dtype: str = "float32",
    view: bool = False,
) -> Tensor:
    """`source` as a dense tensor of `shape` and `dtype` on `device`, in memory of its own.

    On the host any floating-point type is cast to `dtype`; on a GPU it has to be that. With `view`
    nothing is copied: the caller keeps the values as they are until everything that uses the tensor
    has run, and gives them in `dtype` on the device. Raises `InvalidRequest`, naming `name`.
    """
    on_host = location(source, name) == "host"
    if not on_host and isinstance(device, HostDevice):
        raise InvalidRequest(
            f"{name} lies on a GPU and the engines run on the host.", "Copy it to the host first."
        )
    if on_host:
        values = host_values(source, name=name, shape=shape, dtype=dtype, view=view)
        if view and not isinstance(device, HostDevice):
            raise InvalidRequest(
                f"{name} lies on the host and the engines run on {device.name}.",
                "Pass it without view.",
            )
        return device.upload(values)
    tensor = _borrow(device, source, name)
    _check_shape(name, tensor.shape, shape)
    if dtype_name(tensor) != dtype:
        raise InvalidRequest(
            f"{name} is {dtype_name(tensor)} and the engine takes {dtype}.",
            "Convert it on the GPU; only values on the host are converted here.",
        )
    return tensor if view else device.copy(tensor)


def host_values(
    source: Foreign,
    *,
    name: str,
    shape: Sequence[int],
    dtype: str = "float32",
    view: bool = False,
    device: Device | None = None,
) -> Array:
    """`source` as an array of `shape` and `dtype` on the host, a copy unless `view`.

    What lies on a GPU is downloaded where `device` is given. Raises `InvalidRequest`.
    """
    if location(source, name) == "gpu":
        if device is None or isinstance(device, HostDevice):
            raise InvalidRequest(f"{name} lies on a GPU.", "Copy it to the host first.")
        tensor = _borrow(device, source, name)
        if dtype_name(tensor) == "bfloat16":
            raise InvalidRequest(f"{name} is bfloat16, which numpy lacks.", "Pass float32.")
        array = device.download(tensor)
    else:
        borrowed = _borrow(HostDevice(), source, name)
        assert isinstance(borrowed, np.ndarray)
        array = borrowed
    _check_shape(name, array.shape, shape)
    if array.dtype != dtype and (view or array.dtype.kind != "f" or dtype not in _FLOATS):
        raise InvalidRequest(f"{name} is {array.dtype}, not {dtype}.", "Convert it first.")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise InvalidRequest(f"{name} holds values that are not finite.", "Check its source.")
    return array if view else np.array(array, dtype=dtype)


def target(device: Device, out: Foreign, height: int, width: int) -> Target:
    """The caller's memory for a picture: uint8 [H, W, 3], or as many bytes in one row.

    Raises `InvalidRequest` unless it is dense, writable and exactly as large as the picture.
    """
    name, shape = "The output buffer", (height, width, 3)
    on_host = location(out, name) == "host"
    if not on_host and isinstance(device, HostDevice):
        raise InvalidRequest(
            f"{name} lies on a GPU and the engines run on the host.", "Pass host memory."
        )
    memory = _borrow(HostDevice() if on_host else device, out, name, writable=True)
    if dtype_name(memory) != "uint8":
        raise InvalidRequest(f"{name} holds {dtype_name(memory)}, not uint8.", "Pass bytes.")
    if tuple(memory.shape) not in (shape, (height * width * 3,)):
        raise InvalidRequest(
            f"{name} has shape {list(memory.shape)} and the picture {list(shape)}.",
            f"Pass exactly {height * width * 3} bytes.",
        )
    if isinstance(memory, DeviceTensor):
        return DeviceTensor(memory.address, shape, "uint8", memory.memory)
    return memory.reshape(shape)


def location(source: Foreign, name: str) -> Literal["host", "gpu"]:
    """Where the memory of `source` lies; raises `InvalidRequest` for neither."""
    if isinstance(source, np.ndarray):
        return "host"
    if isinstance(source, DeviceTensor):
        return "gpu"
    if hasattr(source, "__dlpack_device__"):
        kind = int(source.__dlpack_device__()[0])
        if kind not in (dlpack.HOST, dlpack.CUDA_HOST, dlpack.CUDA, dlpack.CUDA_MANAGED):
            raise InvalidRequest(
                f"{name} lies on a device of DLPack type {kind}.", "Pass host or CUDA memory."
            )
        return "host" if kind in (dlpack.HOST, dlpack.CUDA_HOST) else "gpu"
    return "gpu" if hasattr(source, "__cuda_array_interface__") else "host"


def _borrow(device: Device, source: Foreign, name: str, *, writable: bool = False) -> Tensor:
    try:
        return device.borrow(source, writable=writable)
    except (BufferError, TypeError, ValueError, RuntimeError) as error:  # each library has its own
        raise InvalidRequest(
            f"{name} cannot be taken: {str(error).rstrip('.')}.",
            "Pass a dense tensor with __dlpack__, or an array.",
        ) from None


def _check_shape(name: str, found: Sequence[int], wanted: Sequence[int]) -> None:
    if tuple(found) != tuple(wanted):
        raise InvalidRequest(
            f"{name} has shape {list(found)}, not {list(wanted)}.", "Reshape it first."
        )
