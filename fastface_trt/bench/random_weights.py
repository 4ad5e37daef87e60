"""Full-size SDXL with random weights, made once and kept: a time without a download.

In float16 the graphs come from the package and the weights are drawn, which takes less than a
minute and neither torch nor much memory. Everything else is exported with torch.

    full_size/NAME.onnx.xz    a module's graph; its weights are external data in one file
    full_size/template.json   the manifest of the export, and what each such file holds

A file is drawn from 16-bit random numbers, each of which stands for one quantile of the normal
distribution: every machine gets the same bytes, so their hashes are in the manifest that ships. A
file consists of regions of one type and mean: weights and biases lie around 0, scales of norms
around 1, and nothing is exactly either, or a graph optimiser would drop what it makes needless.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from statistics import NormalDist
from typing import Any, Final, Literal, cast

import numpy as np
from numpy.typing import NDArray

from fastface_trt.checkpoints import MINI, find_checkpoint
from fastface_trt.engines.cache import EngineCache
from fastface_trt.engines.engine import Progress
from fastface_trt.engines.files import describe_file, finished_folder
from fastface_trt.engines.manifest import (
    EXPORT_MANIFEST,
    ExportManifest,
    ModuleSpec,
    Positive,
    Strict,
)
from fastface_trt.engines.ort.threads import usable_cores
from fastface_trt.errors import InvalidRequest, MissingDependency, install_hint
from fastface_trt.mini import folders
from fastface_trt.runtime.export_folder import with_schedule_of
from fastface_trt.runtime.tokenizer import PAD_TOKENS, write_byte_tokenizer

GRAPHS: Final = Path(__file__).resolve().parent / "full_size"
TEMPLATE: Final = "template.json"
WEIGHT_STD: Final = 0.02
"""Standard deviation of every weight: activations of SDXL's modules stay finite in float16."""

_CHUNK: Final = 1 << 22
"""Values of one random stream; a part of the format, as is the order of draws."""

_BLOCK: Final = 1 << 16
"""Values looked up at once, so that their indices stay in the cache of a core."""

DRAWN: Final = "fp16"
"""The precision whose graphs ship with the package."""


def random_export(
    checkpoint: str,
    precision: str,
    steps: int | None,
    cache: EngineCache,
    progress: Progress,
) -> Path:
    """The folder of an export with the shapes of `checkpoint` and random weights.

    It lies in `exports/` of the engine cache and is made at the first call: 8.7 GB of disk in fp16,
    which checkpoints of one shape share. Other precisions than fp16 need the extra `export` and
    about 6 GB of memory. Raises `MissingDependency`, `InvalidRequest`, `UnknownName`,
    `StorageError`.
    """
    if find_checkpoint(checkpoint) is MINI:
        raise InvalidRequest(
            "--random-weights makes full-size SDXL, not the mini model.",
            "Name hyper, lightning, lcm, turbo or base.",
        )
    place = cache.root / "exports"
    if precision == DRAWN:
        version = hashlib.sha256((GRAPHS / TEMPLATE).read_bytes()).hexdigest()[:8]
        return _drawn(checkpoint, place, f"random-{precision}-{version}", progress)
    name = f"{checkpoint}-random-{precision}" + (f"-{steps}steps" if steps else "")
    folder = place / name
    if not (folder / EXPORT_MANIFEST).is_file():
        _export(checkpoint, precision, steps, folder, progress)
    return folder


def _drawn(checkpoint: str, place: Path, kind: str, progress: Progress) -> Path:
    """The export of the package's graphs, with the schedule and the size of `checkpoint`."""
    folder = place / f"{checkpoint}-{kind}"
    if (folder / EXPORT_MANIFEST).is_file():
        return folder
    shape = read_template().manifest
    with finished_folder(folder, EXPORT_MANIFEST) as draft:
        others = [other for other in place.glob(f"*-{kind}") if (other / EXPORT_MANIFEST).is_file()]
        for name, spec in shape.modules.items():
            size = sum(file.bytes for file in spec.files)
            progress(f"{name}: drawing {size / 1e6:,.0f} MB of random weights")
            if not any(_linked(spec, other, draft.path) for other in others):
                shutil.rmtree(draft.path / name, ignore_errors=True)
                write_module(spec, draft.path)
        for name, pad_token in PAD_TOKENS.items():
            write_byte_tokenizer(draft.path / name, pad_token)
        shutil.copytree(folders.FACE_MODEL, draft.path / shape.face_model)
        extra = [
            describe_file(draft.path, path)
            for name in (*PAD_TOKENS, shape.face_model)
            for path in sorted((draft.path / name).iterdir())
        ]
        entry = find_checkpoint(checkpoint)
        own = {"checkpoint": checkpoint, "height": entry.size, "width": entry.size}
        manifest = with_schedule_of(shape, checkpoint).model_copy(
            update=own | {"extra_files": tuple(extra)}
        )
        progress("Waiting for the disk")
        draft.finish(manifest)
    return folder


def _linked(spec: ModuleSpec, other: Path, draft: Path) -> bool:
    """Whether the module's files could be had from another export, by further names for them."""
    try:
        for file in spec.files:
            (draft / file.path).parent.mkdir(exist_ok=True)
            os.link(other / file.path, draft / file.path)
            if (draft / file.path).stat().st_size != file.bytes:
                return False
    except OSError:  # gone, or a file system without such names
        return False
    return True


def _export(
    checkpoint: str, precision: str, steps: int | None, folder: Path, progress: Progress
) -> None:
    try:
        from fastface_trt.export.exporter import run_export
        from fastface_trt.export.options import ExportOptions
        from fastface_trt.export.precision import QUANTIZED_FORMATS
        from fastface_trt.export.quantization.calibration import RandomCalibration
        from fastface_trt.export.sources import quiet_libraries
    except ImportError as error:
        raise MissingDependency(
            f"Random weights in {precision} have to be exported, which needs {error.name}; those "
            f"in {DRAWN} need nothing.",
            f"Leave out --precision for {DRAWN}, or install it with: {install_hint('export')}",
        ) from None
    quiet_libraries()
    progress(f"Random weights in {precision} are exported with torch; those in {DRAWN} are drawn")
    options = ExportOptions(
        find_checkpoint(checkpoint),
        precision=cast(Any, precision),
        steps=steps,
        random_weights=True,
        calibration=RandomCalibration() if precision in QUANTIZED_FORMATS else None,
    )
    run_export(options, folder, progress)


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
