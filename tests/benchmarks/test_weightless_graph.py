"""A graph without its weights counts like the one with them, and holds none."""

import lzma

import onnx
from click.testing import CliRunner

from benchmarks.weightless_graph import LARGEST_KEPT, main
from fastface_trt.bench.flops import count_module
from fastface_trt.mini import folders


def test_the_graph_counts_the_same(tmp_path):
    source, packed = folders.EXPORT / "unet" / "model.onnx", tmp_path / "unet.onnx.xz"
    result = CliRunner().invoke(main, [str(source), str(packed)])
    assert result.exit_code == 0, result.output
    graph = tmp_path / "unet.onnx"
    graph.write_bytes(lzma.decompress(packed.read_bytes()))
    sizes = {"batch": 3, "requests": 1, "height": 24, "width": 16}
    assert count_module(graph, sizes) == count_module(source, sizes)
    assert packed.stat().st_size < 100_000 < source.stat().st_size
    model = onnx.load(graph, load_external_data=False)
    assert all(len(tensor.raw_data) <= 8 * LARGEST_KEPT for tensor in model.graph.initializer)
