"""What one thread works with: a CUDA stream, and all that is ordered by it.

Threads do not share streams, so they run side by side. Work on a stream runs later than the calls
return; memory is freed, and staging memory reused, only where the stream's order or a `synchronize`
makes that safe. What others hold by DLPack outlives the stream, and with it the GPU's context.
"""

import ctypes
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from threading import RLock

import numpy as np

from fastface_trt.engines.cuda.driver import Driver, Handle
from fastface_trt.engines.cuda.graphs import Graphs
from fastface_trt.engines.device import Array, Copies, DeviceTensor
from fastface_trt.errors import EngineFailed, FastFaceError

_ALIGNMENT = 256
_FIRST_STAGING_BYTES = 4 * 2**20


class Stream:
    """A CUDA stream with its staging, scratch memory, graphs and counters, for one thread.

    `lock` is held by an engine while it puts a run on the stream, and by whoever frees what such a
    run uses: an engine may be closed by another thread than the one that runs it.
    """

    def __init__(
        self, driver: Driver, pool: Handle, warn: Callable[[str], None], lent: "LentMemory"
    ) -> None:
        self._driver, self._pool = driver, pool
        self.lent = lent
        self.lock = RLock()
        self.handle: Handle = driver.stream_create()
        self.copies = Copies()
        self.staging = Staging(driver)
        self.graphs = Graphs(driver, self.handle, warn)
        self.scratch = Scratch(driver, self._scratch_goes)
        self.dropped: deque[int] = deque()
        self._live: set[int] = set()
        self._borrowed: list[object] = []

    def allocate(self, size: int) -> "Memory":
        """Device memory of `size` bytes, for work that follows on this stream."""
        self._free_dropped()
        # The pool takes no request for nothing.
        address = self._driver.mem_alloc_async(max(size, 1), self._pool, self.handle)
        self._live.add(address)
        return Memory(address, self)

    def reads(self, memory: object) -> None:
        """Work on this stream reads `memory`: keep it until the work is done.

        Memory of another thread's stream, or of another library, is freed in an order that knows
        nothing of this stream.
        """
        if memory is not None and not (isinstance(memory, Memory) and memory.stream is self):
            self._borrowed.append(memory)

    def lend(self, address: int, stream: int | None) -> int:
        """On any thread."""
        with self.lock:
            self._require_open()
            self.lent.add(address, self.handle, stream)
            return int(self.handle)

    def copy_of(self, tensor: DeviceTensor) -> DeviceTensor:
        """A copy in this stream's order; on any thread, whose context is the GPU's."""
        with self.lock:
            self._require_open()
            memory = self.allocate(tensor.nbytes)
            if tensor.nbytes:
                self._driver.copy_within(memory.address, tensor.address, tensor.nbytes, self.handle)
        return DeviceTensor(memory.address, tensor.shape, tensor.dtype, memory)

    def drop(self, address: int) -> None:
        """Memory of this stream that nobody holds any more."""
        self.dropped.append(address)
        if self.handle is None:
            self.lent.end(address)

    def to_device(self, address: int, array: Array) -> None:
        """Copy `array` to device memory at `address`, through pinned memory."""
        if array.nbytes == 0:
            return
        source, part = self.staging.take(array.nbytes, self.synchronize)
        part[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self._driver.copy_to_device(address, source, array.nbytes, self.handle)
        self.copies.to_device += 1
        self.copies.to_device_bytes += array.nbytes

    def to_host(self, address: int, array: Array) -> None:
        """Fill the contiguous `array` from device memory at `address`; waits for the stream."""
        if array.nbytes == 0:
            return
        target, part = self.staging.take(array.nbytes, self.synchronize)
        self._driver.copy_to_host(target, address, array.nbytes, self.handle)
        self.copies.to_host += 1
        self.copies.to_host_bytes += array.nbytes
        self.synchronize()
        array.reshape(-1).view(np.uint8)[:] = part

    def synchronize(self) -> None:
        """Wait for all work of this stream."""
        self._free_dropped()
        self._driver.stream_synchronize(self.handle)
        self.staging.reset()
        self._borrowed.clear()

    def close(self) -> None:
        """Free everything but what was lent to others, tensors that somebody holds included.

        Twice is harmless.
        """
        if self.handle is None:
            return
        self._free_dropped()
        self.dropped.extend(self._live - self.lent.outlive(self._live))
        self.synchronize()
        self.graphs.close()
        self.staging.free()
        self.scratch.close()
        self._driver.stream_destroy(self.handle)
        self.handle = None
        for address in list(self.dropped):  # while this closed
            self.lent.end(address)

    def _require_open(self) -> None:
        if self.handle is None:
            raise EngineFailed("The device of this tensor is closed.", "Lend it before that.")

    def _free_dropped(self) -> None:
        while self.dropped:
            try:
                address = self.dropped.popleft()
            except IndexError:  # another thread that copies what it lends was first
                return
            self._live.discard(address)
            self.lent.forget(address)
            self._driver.mem_free_async(address, self.handle)

    def _scratch_goes(self, address: int) -> None:
        self.graphs.forget(address=address)
        self._driver.stream_synchronize(self.handle)


class Memory:
    """Device memory from the pool of a stream; freed in the stream's order after the last use.

    The end of its life may come on any thread and in the middle of anything, so it makes no CUDA
    call: the owning thread frees it before its next allocation. Only what was lent and has outlived
    its stream is freed at once.
    """

    __slots__ = ("address", "stream")

    def __init__(self, address: int, stream: Stream) -> None:
        self.address = address
        self.stream = stream

    @property
    def ordinal(self) -> int:
        """Number of its GPU."""
        return self.stream.lent.ordinal

    def lend(self, stream: int | None = None) -> int:
        """See `device.Lender`."""
        return self.stream.lend(self.address, stream)

    def copy_of(self, tensor: DeviceTensor) -> DeviceTensor:
        """See `device.Lender`."""
        return self.stream.copy_of(tensor)

    def __del__(self) -> None:
        self.stream.drop(self.address)


class Staging:
    """Pinned host memory that copies pass through, used from front to back.

    A part is free again when its copy has finished, which `reset` is told by a synchronised stream.
    """

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._address, self._size, self._used = 0, 0, 0

    @property
    def size(self) -> int:
        """Bytes of pinned memory held."""
        return self._size

    def take(self, size: int, synchronize: Callable[[], None]) -> tuple[int, Array]:
        """Address and bytes of a part of `size`; calls `synchronize` when it has to start over."""
        if self._used + size > self._size:
            synchronize()  # ends in reset()
            if size > self._size:
                self.free()
                self._size = max(_FIRST_STAGING_BYTES, _rounded(size))
                self._address = self._driver.pinned_alloc(self._size)
        address = self._address + self._used
        self._used += _rounded(size)
        part = (ctypes.c_uint8 * size).from_address(address)
        return address, np.ctypeslib.as_array(part)

    def reset(self) -> None:
        """All copies so far have finished."""
        self._used = 0

    def free(self) -> None:
        """Free the pinned memory; no copy may be under way."""
        if self._size:
            self._driver.pinned_free(self._address)
        self._address, self._size, self._used = 0, 0, 0


class Scratch:
    """One piece of device memory for the activations of all engines of a thread.

    Engines of a thread run one after the other, so they share it; it is as large as the most that
    an engine which still needs it has asked for.
    """

    def __init__(self, driver: Driver, freeing: Callable[[int], None]) -> None:
        self._driver, self._freeing = driver, freeing
        self._wanted: dict[int, int] = {}
        self._address, self._size = 0, 0

    @property
    def size(self) -> int:
        """Bytes of device memory held."""
        return self._size

    def growth(self, size: int) -> int:
        """Bytes that would be added for an engine that needs `size`."""
        return max(0, size - self._size)

    def get(self, engine: int, size: int) -> tuple[int, int]:
        """Address and bytes of memory for `engine`, at least `size`; (0, 0) where it needs none.

        The address changes when another engine needs more: ask before every run.
        """
        self._wanted[engine] = size
        if size > self._size:
            self._replace(max(self._wanted.values()))
        return self._address, self._size

    def release(self, engine: int) -> None:
        """`engine` will not run again; what only it needed is freed."""
        self._wanted.pop(engine, None)
        if max(self._wanted.values(), default=0) < self._size:
            self._replace(0)

    def close(self) -> None:
        """Free the memory, whoever still needs it."""
        self._wanted.clear()
        self._replace(0)

    def _replace(self, size: int) -> None:
        if self._size:
            self._freeing(self._address)
            self._driver.mem_free(self._address)
        self._address, self._size = 0, 0
        if size:
            self._address, self._size = self._driver.mem_alloc(size), size


class LentMemory:
    """Which memory of GPU `ordinal` was lent; shared by the streams of a device.

    What was lent once may be held by others until its `Memory` ends, so a closing stream leaves it.
    """

    def __init__(self, driver: Driver, device: Handle, context: Handle, ordinal: int) -> None:
        self.ordinal = ordinal
        self._driver, self._device, self._context = driver, device, context
        self._lent: set[int] = set()
        self._outliving: set[int] = set()

    def add(self, address: int, written_on: Handle, stream: int | None) -> None:
        """Lend it; work that follows on CUDA stream `stream` waits for `written_on`."""
        self._lent.add(address)
        if stream is not None:
            with self._driver.context(self._context):
                self._driver.stream_follow_once(self._driver.stream(stream), written_on)

    def forget(self, address: int) -> None:
        """It is freed where it came from."""
        self._lent.discard(address)

    def outlive(self, addresses: set[int]) -> set[int]:
        """Those of `addresses` that stay when their stream is closed; the context stays for them.

        Their pool may go: CUDA keeps it until the last of its memory is freed.
        """
        staying = addresses & self._lent
        for address in staying:
            self._driver.retain_context(self._device)
            self._outliving.add(address)
        return staying

    def end(self, address: int) -> None:
        """Nobody holds it any more, after its stream was closed. On any thread, in any context."""
        try:
            self._outliving.remove(address)
        except KeyError:  # not lent, or the other of two threads was first
            return
        self._lent.discard(address)
        with suppress(FastFaceError):  # a broken GPU has nothing to free; nobody can be told
            with self._driver.context(self._context):
                self._driver.mem_free(address)
            self._driver.release_context(self._device)


def _rounded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
