"""DLPack capsules of memory that numpy knows nothing of, and tensors out of others' capsules."""

import gc
import subprocess
import sys
import weakref

import numpy as np
import pytest

from fastface_trt.engines import dlpack
from fastface_trt.engines.device import HostDevice


class Owner:
    """Memory that tells when it is let go."""

    def __init__(self, array, versioned=True, device=(dlpack.HOST, 0), dtype=None):
        self.array, self.versioned, self.device = array, versioned, device
        self.dtype = dtype or str(array.dtype)

    def __dlpack__(self, *, max_version=None, **_):
        return dlpack.lend(
            self.array.ctypes.data,
            self.array.shape,
            self.dtype,
            self.device,
            self,
            versioned=self.versioned,
        )

    def __dlpack_device__(self):
        return self.device


VALUES = np.arange(6, dtype=np.float32).reshape(2, 3)
versions = pytest.mark.parametrize("versioned", [True, False])


def held(make):
    """What `make` gives of a fresh owner, and a reference that tells whether it still lives."""
    owner = Owner(VALUES.copy())
    return make(owner), weakref.ref(owner), owner.array.ctypes.data


@versions
def test_numpy_sees_the_same_memory(versioned):
    owner = Owner(VALUES.copy(), versioned)
    seen = np.from_dlpack(owner)
    assert seen.ctypes.data == owner.array.ctypes.data
    np.testing.assert_array_equal(seen, VALUES)


def test_the_owner_lives_as_long_as_whoever_took_it():
    seen, owner, address = held(np.from_dlpack)
    gc.collect()
    assert owner() is not None
    assert seen.ctypes.data == address
    del seen
    assert owner() is None


def test_a_capsule_that_nobody_takes_lets_go_by_itself():
    capsule, owner, _ = held(lambda owner: owner.__dlpack__())
    assert owner() is not None
    del capsule
    assert owner() is None


@pytest.mark.parametrize(
    "take",
    [lambda owner: owner.__dlpack__(), np.from_dlpack, lambda owner: dlpack.ask(owner, None)],
    ids=["nobody", "numpy", "ours"],
)
def test_an_exception_on_its_way_stays_what_it_was(take):
    """C code deletes tensors while an exception unwinds; a callback would lose it, or crash."""
    owners = []

    def fail():
        owner = Owner(VALUES.copy())
        owners.append(weakref.ref(owner))
        return [take(owner), 1 / 0]

    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            fail()
    gc.collect()
    assert [owner() for owner in owners] == [None] * 3


def test_a_consumer_may_outlive_the_interpreter():
    """Deleters run when modules are torn down and after that; the process still ends well."""
    code = (
        "import sys, numpy as np\n"
        f"sys.path[:0] = {sys.path!r}\n"
        "from tests.engines.test_dlpack import Owner, VALUES\n"
        "seen = np.from_dlpack(Owner(VALUES.copy()))\n"
        "sys.kept = seen\n"
        "print(seen.sum())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, ["15.0"]), done.stderr


@versions
@pytest.mark.parametrize("dtype", ["float32", "float16", "int64", "int32", "uint8"])
def test_there_and_back(versioned, dtype):
    owner = Owner((VALUES * 10).astype(dtype), versioned)
    borrowed = dlpack.ask(owner, None)
    assert (borrowed.shape, borrowed.dtype) == ((2, 3), dtype)
    assert borrowed.address == owner.array.ctypes.data
    np.testing.assert_array_equal(HostDevice().borrow(owner), owner.array)


def test_any_device_and_bfloat16_are_written_and_read():
    owner = Owner(np.zeros(4, np.uint16), device=(dlpack.CUDA, 3), dtype="bfloat16")
    borrowed = dlpack.ask(owner, None)
    assert (borrowed.device, borrowed.dtype) == ((dlpack.CUDA, 3), "bfloat16")


def test_a_tensor_is_taken_once():
    capsule = Owner(VALUES.copy()).__dlpack__()
    assert dlpack.device_of(capsule) == (dlpack.HOST, 0)
    dlpack.take(capsule)
    for again in (dlpack.take, dlpack.device_of):
        with pytest.raises(BufferError, match="taken before"):
            again(capsule)
    with pytest.raises(BufferError, match="no capsule"):
        dlpack.take("a string")


def test_arrays_of_numpy_are_taken_with_their_strides_and_flags():
    array = VALUES.copy()
    array.flags.writeable = False
    borrowed = dlpack.ask(array, None)
    assert borrowed.read_only
    transposed = dlpack.ask(VALUES.T, None)
    assert transposed.strides == (1, 3)
    assert not dlpack.is_dense(transposed.shape, transposed.strides)
    with pytest.raises(BufferError, match="type 2 with 64 bits"):
        dlpack.ask(VALUES.astype(np.float64), None)


@pytest.mark.parametrize(
    ("shape", "strides", "dense"),
    [
        ((2, 3), None, True),
        ((2, 3), (3, 1), True),
        ((2, 3), (4, 1), False),
        ((1, 3), (99, 1), True),  # nobody steps along an axis of one
        ((0, 3), (7, 7), True),
        ((), (), True),
    ],
)
def test_dense(shape, strides, dense):
    assert dlpack.is_dense(shape, strides) is dense


def test_a_read_only_tensor_is_not_written():
    array = VALUES.copy()
    array.flags.writeable = False

    class ReadOnly:
        def __dlpack__(self, **order):
            return array.__dlpack__(**order)

    taken = HostDevice().borrow(ReadOnly())
    assert not taken.flags.writeable
    with pytest.raises(BufferError, match="read-only"):
        HostDevice().borrow(ReadOnly(), writable=True)


def test_a_producer_of_the_first_version_is_asked_again():
    class Old:
        def __dlpack__(self, *, stream=None):
            return VALUES.__dlpack__()

    np.testing.assert_array_equal(HostDevice().borrow(Old()), VALUES)
