"""An ONNX module without its weights, compressed: shapes and operators, for counting and reading.

`python -m benchmarks.weightless_graph MODEL.onnx OUT.onnx.xz`. Weights become references to a file
that does not exist; small constants stay, since graphs compute sizes with them.
"""

import lzma
from math import prod
from pathlib import Path

import click
import onnx

LARGEST_KEPT = 256
"""Elements of the largest constant that stays in the graph."""


def without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model, changed in place: every constant of more than `LARGEST_KEPT` elements is absent.

    Values of the shapes in between and documentation go too; they follow from the rest.
    """
    del model.graph.value_info[:]
    for node in model.graph.node:
        del node.metadata_props[:]
        node.ClearField("doc_string")
    for tensor in model.graph.initializer:
        if prod(tensor.dims) <= LARGEST_KEPT:
            continue
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            del tensor.external_data[:]
        kept = {"name": tensor.name, "data_type": tensor.data_type, "dims": list(tensor.dims)}
        tensor.Clear()
        tensor.name, tensor.data_type = kept["name"], kept["data_type"]
        tensor.dims.extend(kept["dims"])
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="absent")
    return model


@click.command()
@click.argument("source", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.argument("target", type=click.Path(path_type=Path, dir_okay=False))
def main(source: Path, target: Path) -> None:
    """Write the graph of an ONNX module, without weights, as an xz file."""
    model = without_weights(onnx.load(source, load_external_data=False))
    target.write_bytes(lzma.compress(model.SerializeToString(), preset=9 | lzma.PRESET_EXTREME))
    click.echo(f"{target}: {target.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
