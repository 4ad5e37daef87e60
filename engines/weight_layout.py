"""How builders rearrange weights: the layouts that are recognised, and how to make them.

A layout is a word: `same`, `pad`, `permute:1,0` (axes), `blocked:16` or `blocked-out:16`. The last
two are ONNX Runtime's NCHWc layouts of a convolution's weight.

Shape legend: O output channels, I input channels, H × W kernel, b channels per block (o, i inside).
"""

import itertools
import math
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Shape = tuple[int, ...]

_BLOCKS: Final = (4, 8, 16, 32)
_STORED_AS: Final = {"bfloat16": "uint16", "float8_e4m3fn": "uint8"}
_CASTS: Final = {("float16", "float32"), ("bfloat16", "float32")}
"""Exact ones only: a rounded copy could not be told from another weight's."""


def view(data: memoryview, dtype: str, shape: Shape) -> Array:
    """The bytes of a weight as an array; types that numpy lacks as integers of their size."""
    return np.frombuffer(data, _STORED_AS.get(dtype, dtype)).reshape(shape)


def can_become(dtype: str, other: str) -> bool:
    """Whether a weight of type `dtype` may stand in an engine as type `other`."""
    return dtype == other or (dtype, other) in _CASTS


def cast(array: Array, dtype: str, other: str) -> Array:
    """`array` of type `dtype` as type `other`, exactly."""
    if dtype == other:
        return array
    if dtype == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(other)


def possible_layouts(shape: Shape, target: Shape) -> Iterator[str]:
    """The layouts other than `same` by which a weight of `shape` may have become `target`."""
    if shape == (1,) * len(shape):
        return
    if 2 <= len(shape) <= 4 and sorted(shape) == sorted(target):
        for axes in itertools.permutations(range(len(shape))):
            # A permutation that moves only axes of size 1 leaves the bytes as they are.
            moved = [axis for axis in axes if shape[axis] > 1]
            if moved != sorted(moved) and tuple(shape[axis] for axis in axes) == target:
                yield "permute:" + ",".join(map(str, axes))
    if len(shape) == len(target) == 1 and shape[0] < target[0]:
        yield "pad"
    if len(shape) == len(target) == 4:
        for block in _BLOCKS:
            rows = _up(shape[0], block)
            if target == (rows, _up(shape[1], block), *shape[2:]):
                yield f"blocked:{block}"
            if target == (rows, *shape[1:]):
                yield f"blocked-out:{block}"


def arrange(array: Array, layout: str, shape: Shape) -> Array:
    """`array` in `layout`, filled with zeros up to `shape`; contiguous."""
    kind, _, detail = layout.partition(":")
    if kind == "permute":
        return np.ascontiguousarray(array.transpose([int(axis) for axis in detail.split(",")]))
    if kind == "same":
        return np.ascontiguousarray(array)
    padded = np.zeros(shape, array.dtype)
    padded[tuple(slice(0, size) for size in array.shape)] = array
    if kind == "pad":
        return padded
    block = int(detail)
    o, i, h, w = shape
    if kind == "blocked-out":
        blocks_OoIHW = padded.reshape(o // block, block, i, h, w)
        return np.ascontiguousarray(blocks_OoIHW.transpose(0, 2, 3, 4, 1))
    blocks_OoIiHW = padded.reshape(o // block, block, i // block, block, h, w)
    return np.ascontiguousarray(blocks_OoIiHW.transpose(0, 2, 4, 5, 3, 1))


def same_layout(shape: Shape, one: str, other: str, target: Shape) -> bool:
    """Whether two layouts put every element of a weight of `shape` at the same place."""
    index = np.arange(1, 1 + math.prod(shape)).reshape(shape)
    return np.array_equal(
        arrange(index, one, target).ravel(), arrange(index, other, target).ravel()
    )


def _up(size: int, block: int) -> int:
    return -(-size // block) * block
