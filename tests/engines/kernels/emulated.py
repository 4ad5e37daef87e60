"""The CUDA kernels as a shared library for this CPU, compiled by g++ through `emulation.h`."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
SOURCES = HERE.parents[2] / "engines" / "kernels"
COMPILER = shutil.which("g++")


def build(folder, head_size, dtype, heads_last=False, source="emulated.cpp", tokens=4):
    """Compile `source` for one head size, dtype and layout; the loaded library."""
    library = folder / f"{source}-{head_size}-{np.dtype(dtype).name}-{int(heads_last)}-{tokens}.so"
    command = [COMPILER, "-std=c++20", "-O1", "-ffp-contract=off", "-shared", "-fPIC"]
    command += [f"-DHEAD_SIZE={head_size}", f"-DFLOAT32={int(dtype == np.float32)}"]
    command += [f"-DHEADS_LAST={int(heads_last)}", f"-DTOKENS={tokens}"]
    command += [f"-I{SOURCES}", f"-I{HERE}", str(HERE / source), "-o", str(library), "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))


def heads_inside(x_BHND):
    """[B,N,H·D] of [B,H,N,D]."""
    rows, _, positions, _ = x_BHND.shape
    return np.ascontiguousarray(x_BHND.swapaxes(1, 2)).reshape(rows, positions, -1)


def heads_outside(x_BNC, heads):
    """[B,H,N,D] of [B,N,H·D]."""
    return x_BNC.reshape(*x_BNC.shape[:2], heads, -1).swapaxes(1, 2)


def aligned(shape, dtype, fill=0):
    """An array on a 16-byte boundary, as device memory is."""
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.empty(count + 16, np.uint8)
    start = -raw.ctypes.data % 16
    out = raw[start : start + count].view(dtype).reshape(shape)
    out[...] = fill
    return out


class EmulatedAttention:
    """The two launches, fibre by fibre: [B,H,N,D] in and out, whatever the layout in memory."""

    def __init__(self, folder, dtype=np.float16, heads_last=False):
        self.folder, self.dtype, self.heads_last, self.built = folder, dtype, heads_last, {}

    def __call__(self, q, k, v, manipulation, ip_scale, reverse=False, base=None, mask=None):
        rows, heads, positions, size = q.shape
        tokens = k.shape[2]
        if (size, tokens) not in self.built:
            made = build(self.folder, size, self.dtype, self.heads_last, tokens=tokens)
            self.built[size, tokens] = made.run
        addend = None
        if self.heads_last:
            q, k, v = map(heads_inside, (q, k, v))
        if base is not None:
            addend = aligned(q.shape, self.dtype)
            addend[...] = heads_inside(base)
        inputs = []
        kinds = (self.dtype,) * 3 + (np.float32,) * 2
        for x, dtype in zip((q, k, v, manipulation, ip_scale), kinds, strict=True):
            inputs.append(aligned(np.shape(x), dtype))
            inputs[-1][...] = x
        # Garbage where a kernel might rely on memory that nobody zeroed.
        maps = aligned((rows, heads, positions, tokens), np.float32, np.nan)
        statistics = aligned((rows, heads, 3, tokens), np.float32, np.nan)
        out = aligned(q.shape, self.dtype, np.nan)
        sizes = (len(inputs[3]), rows, heads, positions)
        buffers = (*inputs, *sizes, maps, statistics, out, addend, mask, int(reverse))
        arguments = [
            ctypes.c_void_p(x.ctypes.data) if isinstance(x, np.ndarray) else x for x in buffers
        ]
        stuck = self.built[size, tokens](*arguments)
        assert stuck == 0, f"threads of launch {stuck} wait for each other"
        self.maps, self.statistics = maps, statistics
        return heads_outside(out, heads) if self.heads_last else out
