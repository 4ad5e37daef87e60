"""Device memory of other libraries as `DeviceTensor`: DLPack and the CUDA Array Interface."""

from collections.abc import Callable
from typing import Any, Final

import numpy as np

from fastface_trt.engines import dlpack
from fastface_trt.engines.device import DeviceTensor
from fastface_trt.engines.dlpack import ElementType

_BY_TYPESTR: Final[dict[str, ElementType]] = {
    "<f4": "float32",
    "<f2": "float16",
    "<i8": "int64",
    "<i4": "int32",
    "|u1": "uint8",
}


def borrow(
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
    dtype = _BY_TYPESTR.get(described["typestr"])
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
