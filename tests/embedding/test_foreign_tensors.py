"""Tensors of other libraries on the host: what is taken, what is refused and in which words."""

import array
import ctypes

import numpy as np
import pytest

from fastface_trt.embedding import session as foreign
from fastface_trt.engines import dlpack
from fastface_trt.engines.device import HostDevice
from fastface_trt.errors import InvalidRequest

VALUES = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)


class Interface:
    def __init__(self, values):
        self.values = values
        self.__array_interface__ = values.__array_interface__


class Exported:
    """DLPack of a chosen device, and nothing else."""

    def __init__(self, values, device=(dlpack.HOST, 0)):
        self.values, self.device = values, device

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, **_):
        values = self.values
        return dlpack.lend(
            values.ctypes.data,
            values.shape,
            str(values.dtype),
            self.device,
            self,
            versioned=True,
        )


class OnGpu:
    __cuda_array_interface__ = {  # noqa: RUF012
        "version": 3,
        "shape": (3, 4),
        "typestr": "<f4",
        "data": (0x7F00_0000_0000, False),
    }


def place(source, **options):
    return foreign.place(HostDevice(), source, name="The thing", shape=(3, 4), **options)


@pytest.mark.parametrize("wrap", [np.copy, Interface, Exported], ids=lambda w: w.__name__)
def test_values_are_copied_unless_a_view_is_asked_for(wrap):
    values = VALUES.copy()
    source = wrap(values)
    base = source if isinstance(source, np.ndarray) else values
    copied, view = place(source), place(source, view=True)
    assert view.ctypes.data == base.ctypes.data
    base[:] = 0
    np.testing.assert_array_equal(copied, VALUES)
    np.testing.assert_array_equal(view, 0)


def test_a_view_lives_as_long_as_it_is_held():
    view = place(Exported(VALUES.copy()), view=True)
    np.testing.assert_array_equal(view, VALUES)


def test_tensors_of_torch():
    torch = pytest.importorskip("torch")
    tensor = torch.from_numpy(VALUES.copy())
    assert place(tensor, view=True).ctypes.data == tensor.data_ptr()
    half = place(tensor.half())
    assert half.dtype == np.float32
    np.testing.assert_array_equal(half, VALUES.astype(np.float16))
    for bad, message in ((tensor.bfloat16(), "bfloat16"), (tensor[:2], "shape")):
        with pytest.raises(InvalidRequest, match=message):
            place(bad)
    with pytest.raises(InvalidRequest, match="dense"):
        place(torch.from_numpy(VALUES.T.copy()).T)
    theirs = torch.from_dlpack(Exported(VALUES.copy()))
    np.testing.assert_array_equal(theirs.numpy(), VALUES)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (VALUES[:2], {}, r"The thing has shape \[2, 4\], not \[3, 4\]"),
        (VALUES.T.copy().T, {}, "dense"),
        (VALUES.astype(np.int32), {}, "is int32, not float32"),
        (VALUES.astype(np.float64), {"view": True}, "is float64, not float32"),
        (np.full((3, 4), np.nan, np.float32), {}, "not finite"),
        ("text", {}, "str has none of"),
        (None, {}, "NoneType has none of"),
        (OnGpu(), {}, "lies on a GPU and the engines run on the host"),
        (Exported(VALUES, (dlpack.CUDA, 0)), {}, "lies on a GPU"),
        (Exported(VALUES, (10, 0)), {}, "DLPack type 10"),
    ],
)
def test_what_does_not_fit_is_named(source, options, message):
    with pytest.raises(InvalidRequest, match=message):
        place(source, **options)


def test_a_broken_producer_is_the_callers_error():
    class Broken:
        def __dlpack_device__(self):
            return dlpack.HOST, 0

        def __dlpack__(self, **_):
            raise RuntimeError("call detach() first.")

    with pytest.raises(InvalidRequest, match=r"call detach\(\) first\. Pass"):
        place(Broken())


def target(out, height=2, width=5):
    return foreign.output(HostDevice(), out, height, width)


BYTES = 2 * 5 * 3


@pytest.mark.parametrize(
    "out",
    [
        bytearray(BYTES),
        memoryview(bytearray(BYTES)),
        array.array("B", bytes(BYTES)),
        (ctypes.c_uint8 * BYTES)(),
        np.zeros((2, 5, 3), np.uint8),
        np.zeros(BYTES, np.uint8),
        Exported(np.zeros((2, 5, 3), np.uint8)),
    ],
    ids=lambda out: type(out).__name__,
)
def test_an_output_buffer_is_written_in_place(out):
    pixels = target(out)
    assert pixels.shape == (2, 5, 3)
    pixels[1, 4, 2] = 200
    seen = out.values if isinstance(out, Exported) else out
    assert np.frombuffer(seen, np.uint8)[-1] == 200


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (bytearray(BYTES - 1), r"has shape \[29\] and the picture \[2, 5, 3\]"),
        (bytearray(BYTES + 1), "Pass exactly 30 bytes"),
        (np.zeros((5, 2, 3), np.uint8), "has shape"),
        (np.zeros((2, 5, 4), np.uint8)[..., :3], "dense"),
        (np.zeros((2, 5, 3), np.int8), "holds int8"),
        (np.zeros((2, 5, 3), np.float32), "holds float32"),
        (bytes(BYTES), "read-only"),
        (memoryview(bytearray(BYTES)).toreadonly(), "read-only"),
        (OnGpu(), "Pass host memory"),
        (7, "int has none of"),
    ],
)
def test_an_output_buffer_that_does_not_fit_is_refused(out, message):
    with pytest.raises(InvalidRequest, match=message):
        target(out)
