"""Take the weights out of a full-size export: how the graphs that the package ships are made.

    fastface-trt export --checkpoint hyper --random-weights --fp16 EXPORT
    python -m benchmarks.weightless_graph EXPORT

A tensor counts as weights when its values are distributed as `export.full_size` draws them; other
constants, and short tensors, stay in the graph, since graphs compute sizes and masks with them.
`--module NAME` replaces one graph and keeps the others. Needs 9 GB of disk for a moment: the hashes
of what the package draws are part of what it ships.
"""

import lzma
from collections.abc import Iterable
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from fastface_trt.bench.random_weights import (
    GRAPHS,
    TEMPLATE,
    WEIGHT_STD,
    Region,
    Template,
    draw_weights,
)
from fastface_trt.engines.files import describe_file
from fastface_trt.engines.manifest import (
    EXPORT_MANIFEST,
    ExportManifest,
    ModuleSpec,
    read_manifest,
)

LARGEST_KEPT = 64
"""Elements of the largest tensor that stays in the graph whatever it holds."""

ALIGNMENT = 4096
"""Bytes, of every tensor in a data file, so that it can be mapped from there."""

_TYPES = {TensorProto.FLOAT16: "float16", TensorProto.FLOAT: "float32"}


def drawn_mean(values: np.ndarray) -> float | None:
    """0 for weights and biases, 1 for scales of norms, None for a constant of the graph."""
    mean, spread = float(np.mean(values, dtype=np.float64)), float(np.std(values, dtype=np.float64))
    nearest = round(mean)
    # Of 65 values the mean varies by 0.0025, the spread by a twelfth.
    alike = abs(mean - nearest) < 0.02 and 0.5 < spread / WEIGHT_STD < 1.5
    return float(nearest) if alike and nearest in (0, 1) else None


def without_weights(model: onnx.ModelProto, folder: Path, data: str) -> tuple[Region, ...]:
    """Make every weight of `model`, changed in place, a piece of the file `data`.

    `folder` is where the weights' present file lies. Returns the regions of the new file.
    """
    kinds: dict[tuple[str, float], list[onnx.TensorProto]] = {}
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor, str(folder))
        mean = (
            drawn_mean(values) if values.size > LARGEST_KEPT and values.dtype.kind == "f" else None
        )
        if mean is not None:
            kinds.setdefault((_TYPES[tensor.data_type], mean), []).append(tensor)
        elif tensor.data_location == TensorProto.EXTERNAL:
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    regions, end = [], 0
    for (dtype, mean), tensors in kinds.items():
        start = end
        for tensor in tensors:
            length = prod(tensor.dims) * np.dtype(dtype).itemsize
            _refer(tensor, data, end, length)
            end += -(-length // ALIGNMENT) * ALIGNMENT
        count = (end - start) // np.dtype(dtype).itemsize
        regions.append(Region(dtype=dtype, mean=mean, count=count))
    return tuple(regions)


def _refer(tensor: onnx.TensorProto, data: str, offset: int, length: int) -> None:
    name, kind, dims = tensor.name, tensor.data_type, list(tensor.dims)
    tensor.Clear()
    tensor.name, tensor.data_type = name, kind
    tensor.dims.extend(dims)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", data), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))


def pack(spec: ModuleSpec, export: Path, target: Path) -> tuple[ModuleSpec, tuple[Region, ...]]:
    """Write a module's graph to folder `target`; returns its new manifest entry and regions."""
    source = export / spec.files[0].path
    model = onnx.load(source, load_external_data=False)
    regions = without_weights(model, source.parent, f"{source.name}.data")
    graph = model.SerializeToString()
    packed = lzma.compress(graph, preset=9 | lzma.PRESET_EXTREME)
    (target / f"{spec.name}.onnx.xz").write_bytes(packed)
    with TemporaryDirectory(dir=export.parent) as folder:
        written = Path(folder) / spec.files[0].path
        written.parent.mkdir(parents=True)
        written.write_bytes(graph)
        paths = [written]
        if regions:
            paths.append(written.with_name(f"{source.name}.data"))
            draw_weights(paths[1], regions)
        files = tuple(describe_file(Path(folder), path) for path in paths)
    click.echo(f"{spec.name}: {len(packed) / 1000:.1f} kB for {files[-1].bytes / 1e6:.0f} MB")
    return spec.model_copy(update={"files": files, "probe": None}), regions


def pack_export(export: Path, target: Path, only: Iterable[str] = ()) -> None:
    """Write graphs and template of an export to folder `target`, or renew modules `only`."""
    manifest = read_manifest(export / EXPORT_MANIFEST, ExportManifest)
    target.mkdir(parents=True, exist_ok=True)
    only = set(only)
    known = Template(manifest=manifest, regions={})
    if only:
        known = Template.model_validate_json((target / TEMPLATE).read_text(encoding="utf-8"))
    specs, regions = dict(known.manifest.modules), dict(known.regions)
    for name in only or manifest.modules:
        specs[name], regions[name] = pack(manifest.modules[name], export, target)
    # Tokenizers and the face model are written anew by whoever makes an export of this.
    made = known.manifest.model_copy(update={"modules": specs, "extra_files": ()})
    text = Template(manifest=made, regions=regions).model_dump_json(indent=1)
    (target / TEMPLATE).write_text(text + "\n", encoding="utf-8")


@click.command(help=__doc__)
@click.argument("export", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--module", "modules", multiple=True, help="Only this module (repeatable).")
@click.option(
    "--out", type=click.Path(path_type=Path), default=GRAPHS, help="Folder [the package]."
)
def main(export: Path, modules: tuple[str, ...], out: Path) -> None:
    """Write the graphs of an export, without weights."""
    pack_export(export, out, modules)


if __name__ == "__main__":
    main()
