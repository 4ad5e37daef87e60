"""The CUDA kernels as a shared library for this CPU, compiled by g++ through `emulation.h`."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
SOURCES = HERE.parent.parent / "engines" / "kernels"
COMPILER = shutil.which("g++")


def build(folder, head_size, dtype):
    """Compile for one head size and dtype; returns the function of `emulated.cpp`."""
    library = folder / f"emulated-{head_size}-{np.dtype(dtype).name}.so"
    command = [COMPILER, "-std=c++20", "-O1", "-ffp-contract=off", "-shared", "-fPIC"]
    command += [f"-DHEAD_SIZE={head_size}", f"-DFLOAT32={int(dtype == np.float32)}"]
    command += [f"-I{SOURCES}", f"-I{HERE}", str(HERE / "emulated.cpp"), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library)).run


def aligned(shape, dtype, fill=0):
    """An array on a 16-byte boundary, as device memory is."""
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.empty(count + 16, np.uint8)
    start = -raw.ctypes.data % 16
    out = raw[start : start + count].view(dtype).reshape(shape)
    out[...] = fill
    return out


class EmulatedAttention:
    """`fastface::DecoupledAttention` by the two launches, fibre by fibre."""

    def __init__(self, folder, dtype=np.float16):
        self.folder, self.dtype, self.built = folder, dtype, {}

    def __call__(self, q, k, v, manipulation, ip_scale, reverse=False):
        rows, heads, positions, size = q.shape
        if size not in self.built:
            self.built[size] = build(self.folder, size, self.dtype)
        inputs = []
        kinds = (self.dtype,) * 3 + (np.float32,) * 2
        for x, dtype in zip((q, k, v, manipulation, ip_scale), kinds, strict=True):
            inputs.append(aligned(np.shape(x), dtype))
            inputs[-1][...] = x
        # Garbage where a kernel might rely on memory that nobody zeroed.
        maps = aligned((rows, heads, positions, 4), np.float32, np.nan)
        statistics = aligned((rows, heads, 3, 4), np.float32, np.nan)
        out = aligned(q.shape, self.dtype, np.nan)
        sizes = (len(inputs[3]), rows, heads, positions)
        buffers = (*inputs, *sizes, maps, statistics, out, int(reverse))
        arguments = [
            ctypes.c_void_p(x.ctypes.data) if isinstance(x, np.ndarray) else x for x in buffers
        ]
        stuck = self.built[size](*arguments)
        assert stuck == 0, f"threads of launch {stuck} wait for each other"
        self.maps, self.statistics = maps, statistics
        return out
