"""How TensorRT sees an exported UNet: layers per decoupled block, and attentions that it can fuse.

`python -m benchmarks.graph_layers [LABEL=]PATH...` parses each export folder or UNet ONNX file with
TensorRT-RTX, prints a table and adds it to benchmarks/results/graph-layers.json under its label.
Nothing is built and no GPU is needed; weights stay in the file.
"""

import json
import os
import platform
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from benchmarks.attention_pattern import Attention, Layer, find_attentions
from fastface_trt.engines.contract import FUNCTION_NAME
from fastface_trt.errors import InvalidRequest, MissingDependency

RESULTS = Path(__file__).parent / "results" / "graph-layers.json"


@dataclass(frozen=True)
class GraphLayers:
    """What the parser makes of one UNet.

    layers_per_decoupled_block: smallest and largest number over the blocks; share: of all layers;
    attentions counts self- and text attentions, fusible those whose chain TensorRT can fuse.
    """

    layers: int
    layers_by_type: dict[str, int]
    decoupled_blocks: int
    layers_per_decoupled_block: tuple[int, int]
    share_of_decoupled_blocks: float
    attentions: int
    fusible_attentions: int
    faults: dict[str, int]


def read_layers(path: Path) -> list[Layer]:
    """The layers of the network that TensorRT-RTX parses from an ONNX file, in its order.

    Raises `MissingDependency` without TensorRT-RTX and `InvalidRequest` with the parser's reason.
    """
    try:
        import tensorrt_rtx as trt
    except ImportError as error:
        raise MissingDependency(
            "Counting layers needs TensorRT-RTX.", "pip install tensorrt-rtx-cu13"
        ) from error
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)  # TensorRT-RTX networks are strongly typed
    parser = trt.OnnxParser(network, logger)
    if not path.is_file() or not parser.parse_from_file(str(path)):
        reasons = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise InvalidRequest(
            f"TensorRT-RTX cannot parse {path}: {'; '.join(reasons) or 'no such file'}.",
            "Give an export folder or its unet/model.onnx.",
        )
    return [_layer(network.get_layer(i)) for i in range(network.num_layers)]


def _layer(layer: Any) -> Layer:
    outputs = [layer.get_output(i) for i in range(layer.num_outputs)]
    inputs = [layer.get_input(i) for i in range(layer.num_inputs)]
    return Layer(
        name=layer.name,
        type=layer.type.name,
        inputs=tuple(t.name for t in inputs if t is not None),
        outputs=tuple(t.name for t in outputs),
        dtype=outputs[0].dtype.name,
        metadata=layer.metadata,
    )


def layers_of_blocks(layers: list[Layer]) -> Counter[str]:
    """Number of layers per decoupled-attention node, by the node's name.

    The parser notes the ONNX node, and the function calls around it, on the layer that does a
    node's work. Helpers without a note (constants, broadcasts) come before the layer they serve.
    """
    counts: Counter[str] = Counter()
    waiting = 0
    for layer in layers:
        waiting += 1
        if layer.metadata:
            call = layer.call_of(FUNCTION_NAME)
            if call is not None:
                counts[call] += waiting
            waiting = 0
    return counts


def examine(layers: list[Layer]) -> GraphLayers:
    """Count and check the layers of one UNet."""
    blocks = layers_of_blocks(layers)
    attentions: list[Attention] = find_attentions(layers, outside=FUNCTION_NAME)
    numbers = sorted(blocks.values()) or [0]
    return GraphLayers(
        layers=len(layers),
        layers_by_type=dict(Counter(layer.type for layer in layers).most_common()),
        decoupled_blocks=len(blocks),
        layers_per_decoupled_block=(numbers[0], numbers[-1]),
        share_of_decoupled_blocks=round(sum(numbers) / max(len(layers), 1), 4),
        attentions=len(attentions),
        fusible_attentions=sum(not a.faults for a in attentions),
        faults=dict(Counter(fault for a in attentions for fault in a.faults)),
    )


def unet_file(path: Path) -> Path:
    """The UNet's ONNX file of an export folder, or the file itself."""
    return path / "unet" / "model.onnx" if path.is_dir() else path


def _machine() -> dict[str, str]:
    import tensorrt_rtx

    return {
        "machine": f"{platform.machine()} CPU, {os.cpu_count()} cores, no GPU used",
        "tensorrt_rtx": tensorrt_rtx.__version__,
    }


@click.command()
@click.argument("graphs", nargs=-1, required=True, metavar="[LABEL=]PATH...")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
def main(graphs: tuple[str, ...], out: Path) -> None:
    """Count the TensorRT layers of exported UNets."""
    report = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {"graphs": {}}
    report = {"what": "layers of the UNet as TensorRT-RTX parses it", **_machine()} | {
        "graphs": report["graphs"]
    }
    for graph in graphs:
        label, _, path = graph.rpartition("=")
        try:
            found = examine(read_layers(unet_file(Path(path))))
        except (InvalidRequest, MissingDependency) as error:
            raise click.ClickException(str(error)) from error
        report["graphs"][label or path] = asdict(found)
        low, high = found.layers_per_decoupled_block
        each = str(low) if low == high else f"{low} to {high}"
        click.echo(
            f"{label or path}: {found.layers} layers; {found.decoupled_blocks} decoupled blocks of "
            f"{each} ({found.share_of_decoupled_blocks:.0%}); "
            f"{found.fusible_attentions} of {found.attentions} attentions fusible"
        )
        for fault, count in found.faults.items():
            click.echo(f"  {count} attentions: {fault}")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
