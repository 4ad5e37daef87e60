"""Device memory and pinned host memory of the simulated GPU: bounds, lifetimes, nothing reused."""

import ctypes
import threading
from bisect import bisect_right
from dataclasses import dataclass

import numpy as np

GUARD = 2**20
FIRST_ADDRESS = 0x7F00_0000_0000


class Cuda(Exception):
    """A result code, which the simulated module turns into a return value."""


@dataclass
class Block:
    address: int
    content: np.ndarray
    alive: bool = True
    """False from the call that frees it; what was queued before may still use it."""
    readable: bool = True
    """False once the freeing has happened in its stream's order."""


class SimulatedMemory:
    """`memory` bytes of device memory; addresses are far apart and never given out twice."""

    def __init__(self, memory):
        self._memory = memory
        self._lock = threading.RLock()
        self._blocks, self._addresses = {}, []
        self._pinned = {}
        self._next = FIRST_ADDRESS

    def held(self):
        """Device bytes that are allocated."""
        return sum(b.content.nbytes for b in self._blocks.values() if b.readable)

    def read(self, address, size):
        """Bytes of device memory as an array that shares them."""
        return self._span(address, size, "readable")

    def allocate(self, size):
        """Memory that TensorRT takes for itself."""
        if self.held() + size > self._memory:
            raise Cuda("CUDA_ERROR_OUT_OF_MEMORY")
        with self._lock:
            address, self._next = self._next, self._next + -(-size // 256) * 256 + GUARD
            # What was never written must not look like zeros.
            self._blocks[address] = Block(address, np.full(size, 0xA5, np.uint8))
            self._addresses.append(address)
        return address

    def release(self, address):
        block = self._blocks.get(address)
        if block is None or not block.alive:
            raise Cuda("CUDA_ERROR_INVALID_VALUE")
        block.alive = block.readable = False

    def _span(self, address, size, state):
        index = bisect_right(self._addresses, int(address)) - 1
        block = self._blocks[self._addresses[index]] if index >= 0 else None
        offset = int(address) - block.address if block else 0
        if block is None or offset + size > block.content.nbytes or not getattr(block, state):
            raise Cuda("CUDA_ERROR_ILLEGAL_ADDRESS")
        return block.content[offset : offset + size]

    def _pinned_span(self, address, size):
        for start, part in self._pinned.items():
            if start <= address and address + size <= start + len(part):
                return np.frombuffer((ctypes.c_uint8 * size).from_address(address), np.uint8)
        raise Cuda("CUDA_ERROR_INVALID_VALUE")  # pageable memory would make the copy synchronous
