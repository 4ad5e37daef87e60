"""Full-size modules that ship without their weights, and the weights that are drawn instead.

    full_size/NAME.onnx.xz    a module's graph; its weights are external data in one file
    full_size/template.json   the manifest of the export, and what each such file holds

A file is drawn from 16-bit random numbers, each of which stands for one quantile of the normal
distribution: every machine gets the same bytes, so their hashes are in the manifest that ships. A
file consists of regions of one type and mean: weights and biases lie around 0, scales of norms
around 1, and nothing is exactly either, or a graph optimiser would drop what it makes needless.
"""

import lzma
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from statistics import NormalDist
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from fastface_trt.engines.manifest import ExportManifest, ModuleSpec, Positive, Strict
from fastface_trt.engines.threads import usable_cores

GRAPHS: Final = Path(__file__).resolve().parent / "full_size"
TEMPLATE: Final = "template.json"
WEIGHT_STD: Final = 0.02
"""Standard deviation of every weight: activations of SDXL's modules stay finite in float16."""

_CHUNK: Final = 1 << 22
"""Values of one random stream; a part of the format, as is the order of draws."""

_BLOCK: Final = 1 << 16
"""Values looked up at once, so that their indices stay in the cache of a core."""


class Region(Strict):
    """Consecutive values of a data file: their type, their mean and how many there are."""

    dtype: Literal["float16", "float32"]
    mean: float
    count: Positive

    @property
    def bytes(self) -> int:
        """Bytes in the file."""
        return self.count * np.dtype(self.dtype).itemsize


class Template(Strict):
    """The export that `write_modules` makes, and the regions of each module's data file."""

    manifest: ExportManifest
    regions: dict[str, tuple[Region, ...]]


@cache
def read_template() -> Template:
    """The template of the package."""
    return Template.model_validate_json((GRAPHS / TEMPLATE).read_text(encoding="utf-8"))


def read_graph(name: str) -> bytes:
    """The ONNX graph of the full-size module `name`, which refers to its weights' file."""
    return lzma.decompress((GRAPHS / f"{name}.onnx.xz").read_bytes())


def write_module(spec: ModuleSpec, folder: Path, threads: int | None = None) -> None:
    """Write graph and weights of a module of the template into export folder `folder`.

    Uses one thread per core if `threads` is None; the bytes are the same for any number. Raises
    `OSError`.
    """
    graph, *data = (folder / file.path for file in spec.files)
    graph.parent.mkdir(parents=True)
    graph.write_bytes(read_graph(spec.name))
    for path in data:
        draw_weights(path, read_template().regions[spec.name], threads)


def draw_weights(path: Path, regions: tuple[Region, ...], threads: int | None = None) -> None:
    """Write a data file of these regions; see `write_module`.

    Time is about 3 ns a value and core, memory 40 MB a thread.
    """
    with open(path, "wb") as file:
        file.truncate(sum(region.bytes for region in regions))

    def draw(piece: tuple[int, int, int, Region]) -> None:
        stream, offset, count, region = piece
        with open(path, "r+b", buffering=0) as file:
            file.seek(offset)
            rest = memoryview(_values(stream, count, region).tobytes())
            while rest:
                rest = rest[file.write(rest) :]

    with ThreadPoolExecutor(threads or usable_cores()) as pool:
        for _ in pool.map(draw, _pieces(regions)):
            pass  # only so that an exception comes out


def _pieces(regions: tuple[Region, ...]) -> Iterator[tuple[int, int, int, Region]]:
    """Number of the stream, offset in bytes, count of values, region."""
    stream = start = 0
    for region in regions:
        for first in range(0, region.count, _CHUNK):
            offset = start + first * np.dtype(region.dtype).itemsize
            yield stream, offset, min(_CHUNK, region.count - first), region
            stream += 1
        start += region.bytes


def _values(stream: int, count: int, region: Region) -> NDArray[Any]:
    # random_raw is what NumPy promises to keep from version to version.
    indices = np.random.SFC64(stream).random_raw(-(-count // 4)).view(np.uint16)[:count]
    quantiles = _quantiles(region.dtype, region.mean)
    values = np.empty(count, quantiles.dtype)
    for first in range(0, count, _BLOCK):
        block = slice(first, first + _BLOCK)
        np.take(quantiles, indices[block], out=values[block], mode="clip")  # "raise" would buffer
    return values


@cache
def _quantiles(dtype: str, mean: float) -> NDArray[Any]:
    """The normal distribution as 65,536 equally likely values."""
    normal, count = NormalDist(mean, WEIGHT_STD), 1 << 16
    return np.array([normal.inv_cdf((i + 0.5) / count) for i in range(count)], dtype)
