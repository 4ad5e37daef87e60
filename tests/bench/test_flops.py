"""Operation counts: known figures of full-size SDXL, PyTorch's own counter, and small graphs."""

from functools import cache

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

from fastface_trt.bench.flops import count_module
from fastface_trt.bench.random_weights import read_graph
from fastface_trt.errors import InvalidRequest
from fastface_trt.mini import folders

FULL_SIZE = {"batch": 1, "requests": 1, "height": 128, "width": 128}  # 1024² pixels
TERA = 1e12


@pytest.fixture(scope="module")
def full_size(tmp_path_factory):
    """Counts of the modules of full-size SDXL, whose graphs ship without weights."""
    folder = tmp_path_factory.mktemp("graphs")

    @cache
    def count(name, **sizes):
        (folder / f"{name}.onnx").write_bytes(read_graph(name))
        return count_module(folder / f"{name}.onnx", FULL_SIZE | sizes)

    return count


def test_unet_of_full_size_sdxl_has_the_known_operations(full_size):
    count = full_size("unet")
    assert count.flops / TERA == pytest.approx(6.76, rel=0.02)
    assert count.flops_without_attention / TERA == pytest.approx(5.98, rel=0.02)
    # 2.57·10⁹ parameters and the adapter's 0.34·10⁹, two bytes each.
    assert count.weight_bytes == pytest.approx(2 * 2.91e9, rel=0.02)
    assert count.output_bytes == 4 * 4 * 128 * 128


def test_operations_follow_the_rows_and_the_size(full_size):
    one, three = full_size("unet"), full_size("unet", batch=3)
    assert three.flops - 3 * one.flops == 0
    assert three.weight_bytes == one.weight_bytes
    half = full_size("unet", height=64, width=64)
    assert half.convolution == pytest.approx(one.convolution / 4, rel=1e-3)
    assert one.attention > 8 * half.attention  # self-attention grows with the square of positions


def test_vae_decoder_of_full_size_sdxl_has_the_known_operations(full_size):
    assert full_size("vae_decoder").flops / TERA == pytest.approx(10.5, rel=0.02)


@pytest.mark.parametrize(
    ("name", "layers", "width", "hidden", "positions", "beside"),
    [
        ("text_encoder", 11, 768, 3072, 77, 0),
        ("text_encoder_2", 32, 1280, 5120, 77, 2 * 1280 * 1280),
        ("image_encoder", 31, 1280, 5120, 257, 2 * 256 * 1280 * 3 * 14 * 14),
    ],
)
def test_transformers_have_the_operations_of_their_layers(
    full_size, name, layers, width, hidden, positions, beside
):
    """Penultimate states: a layer less, but for the encoder whose pooled output needs the last."""
    count = full_size(name)
    linear = 2 * positions * (4 * width * width + 2 * width * hidden)
    assert count.convolution + count.linear == layers * linear + beside
    assert count.attention == layers * 4 * positions * positions * width


def test_rows_of_a_table_are_what_moves_of_it(full_size):
    """77 tokens read 77 rows of the vocabulary, not 49,408."""
    count = full_size("text_encoder")
    layer = 4 * 768 * 768 + 2 * 768 * 3072 + 9 * 768 + 3072 + 4 * 768
    rows = 77 * 768 + 77 * 768  # tokens and positions
    assert count.weight_bytes == pytest.approx(2 * (11 * layer + rows), rel=0.01)


def test_counts_agree_with_those_of_pytorch():
    """Convolutions and linear layers to the operation; the graph's AdaIN adds T × T products."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from fastface_trt.checkpoints import find_checkpoint
    from fastface_trt.engines import contract
    from fastface_trt.export.modules import unet_export
    from fastface_trt.export.options import ExportOptions
    from fastface_trt.export.weights import CheckpointWeights

    unet = CheckpointWeights(ExportOptions(find_checkpoint("mini"))).unet()
    export = unet_export(unet, tokens=4, latent_size=(24, 24), fixed_size=False)
    inputs = dict(export.inputs)
    columns = contract.MANIPULATION_COLUMNS
    inputs[contract.MANIPULATION][..., columns.index("kind")] = contract.KINDS.index("softmask")
    with (
        torch.no_grad(),
        FlopCounterMode(display=False) as counter,
        sdpa_kernel(SDPBackend.MATH),  # the fused kernel of CPUs is not counted at all
    ):
        export.module(**inputs)
    by_kind = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    count = count_module(
        folders.EXPORT / "unet" / "model.onnx",
        {"batch": 6, "requests": 2, "height": 24, "width": 24, "text": 77},
    )
    assert count.convolution == by_kind["aten.convolution"]
    assert count.linear == by_kind["aten.addmm"] + by_kind["aten.mm"]
    assert by_kind["aten.bmm"] <= count.attention < 1.01 * by_kind["aten.bmm"]


def small(tmp_path, text, weights=()):
    """A model in ONNX's text form, with weights by name, written to a file."""
    model = parser.parse_model(text)
    for name, shape in weights:
        model.graph.initializer.append(
            numpy_helper.from_array(np.zeros(shape, dtype=np.float32), name)
        )
    onnx.save(model, tmp_path / "small.onnx")
    return tmp_path / "small.onnx"


HEAD = '<ir_version: 8, opset_import: ["" : 20]>\n'


@pytest.mark.parametrize(
    ("body", "weights", "kind", "flops"),
    [
        # 2 rows, 6 filters of 2 channels (two groups) by 3 × 3, on 4 × 4 positions
        (
            "(float[n,4,8,8] x) => (float[n,6,4,4] y) "
            "{ y = Conv <group=2, strides=[2,2], pads=[1,1,1,1]> (x, w) }",
            [("w", (6, 2, 3, 3))],
            "convolution",
            2 * 2 * 6 * 16 * 2 * 9,
        ),
        # 4 × 4 positions of 3 channels each spread into 5 channels by 2 × 2
        (
            "(float[n,3,4,4] x) => (float[n,5,8,8] y) { y = ConvTranspose <strides=[2,2]> (x, w) }",
            [("w", (3, 5, 2, 2))],
            "convolution",
            2 * 2 * 3 * 16 * 5 * 4,
        ),
        (
            "(float[n,7,8] x) => (float[n,7,9] y) { y = MatMul(x, w) }",
            [("w", (8, 9))],
            "linear",
            2 * 2 * 7 * 8 * 9,
        ),
        (
            "(float[n,7,8] x) => (float[n,7,9] y) { t = Transpose <perm=[1,0]> (w) "
            "y = MatMul(x, t) }",
            [("w", (9, 8))],
            "linear",
            2 * 2 * 7 * 8 * 9,
        ),
        (
            "(float[8,n] x) => (float[n,9] y) { y = Gemm <transA=1, transB=1> (x, w, b) }",
            [("w", (9, 8)), ("b", (9,))],
            "linear",
            2 * 2 * 8 * 9,
        ),
        (
            "(float[n,3,7,8] x, float[n,1,8,5] z) => (float[n,3,7,5] y) { y = MatMul(x, z) }",
            [],
            "attention",
            2 * 2 * 3 * 7 * 8 * 5,
        ),
        (
            "(float[n,7,3,8] x, float[n,5,3,8] z) => (float[n,3,7,5] y) "
            '{ y = Einsum <equation="bihd,bjhd->bhij"> (x, z) }',
            [],
            "attention",
            2 * 2 * 7 * 3 * 8 * 5,
        ),
    ],
)
def test_products_of_matrices_by_hand(tmp_path, body, weights, kind, flops):
    count = count_module(small(tmp_path, f"{HEAD}g {body}", weights), {"n": 2})
    assert {k: getattr(count, k) for k in ("convolution", "linear", "attention")} == {
        "convolution": 0,
        "linear": 0,
        "attention": 0,
        kind: flops,
    }
    assert count.flops == flops
    assert count.weight_bytes == sum(4 * int(np.prod(shape)) for _, shape in weights)


@pytest.mark.parametrize("flat", [False, True])
def test_attention_as_one_operator(tmp_path, flat):
    """2 rows, 3 heads, 7 queries, 5 keys, width 8: Q Kᵀ and A V."""
    shapes = [(2, 7, 24), (2, 5, 24)] if flat else [(2, 3, 7, 8), (2, 3, 5, 8)]
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("q", shapes[0]), ("k", shapes[1]), ("v", shapes[1]), ("y", shapes[0]))
    ]
    heads = {"q_num_heads": 3, "kv_num_heads": 3} if flat else {}
    node = helper.make_node("Attention", ["q", "k", "v"], ["y"], **heads)
    graph = helper.make_graph([node], "g", values[:3], values[3:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])
    onnx.save(model, tmp_path / "attention.onnx")
    count = count_module(tmp_path / "attention.onnx", {})
    assert count.attention == count.flops == 2 * 2 * 3 * 7 * 5 * (8 + 8)


def test_sizes_that_go_through_arithmetic_and_functions(tmp_path):
    """h · w from the shape of the input, and a product of matrices inside a function."""
    text = """<ir_version: 8, opset_import: ["" : 20, "own" : 1]>
    g (float[n,8,h,w] x) => (float[n,p,9] y) {
        size = Shape(x)
        c2 = Constant <value_ints=[2]> ()
        c3 = Constant <value_ints=[3]> ()
        h = Gather(size, c2)
        w = Gather(size, c3)
        area = Mul(h, w)
        rest = Constant <value_ints=[0, 8]> ()
        shape = Concat <axis=0> (rest, area)
        flat = Reshape(x, shape)
        y = own.Project(flat, weight)
    }
    <domain: "own", opset_import: ["" : 20]>
    Project (flat, weight) => (y) {
        rows = Transpose <perm=[0,2,1]> (flat)
        product = MatMul(rows, weight)
        y = Relu(product)
    }"""
    path = small(tmp_path, text, [("weight", (8, 9))])
    count = count_module(path, {"n": 2, "h": 3, "w": 5, "unused": 1})
    assert count.linear == count.flops == 2 * 2 * 15 * 8 * 9
    assert count.elementwise == 2 * 15 * 9
    assert count.input_bytes == 4 * 2 * 8 * 15
    assert count.output_bytes == 4 * 2 * 15 * 9
    # Transpose reads and writes the input, MatMul reads it, both write and Relu reads the result.
    assert count.activation_bytes == 3 * count.input_bytes + 3 * count.output_bytes


def test_eight_bit_weights_move_as_they_are_stored(tmp_path):
    """Q/DQ around a linear layer: still a linear layer, its weights one byte each."""
    body = """g (float[n,8] x) => (float[n,9] y) {
        q = QuantizeLinear(x, scale, zero)
        d = DequantizeLinear(q, scale, zero)
        w = DequantizeLinear(w8, scale, zero)
        y = MatMul(d, w)
    }"""
    model = parser.parse_model(HEAD + body)
    for name, array in (
        ("scale", np.float32(0.1)),
        ("zero", np.int8(0)),
        ("w8", np.zeros((8, 9), np.int8)),
    ):
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    onnx.save(model, tmp_path / "quantised.onnx")
    count = count_module(tmp_path / "quantised.onnx", {"n": 2})
    assert (count.linear, count.attention) == (2 * 2 * 8 * 9, 0)
    assert count.weight_bytes == 8 * 9 + 4 + 1
    assert count.elementwise == 2 * 2 * 8  # quantised and back


def test_what_cannot_be_counted_is_said(tmp_path):
    path = small(tmp_path, HEAD + "g (float[n,4] x) => (float[n,4] y) { y = Relu(x) }")
    with pytest.raises(InvalidRequest, match="dynamic size n") as caught:
        count_module(path, {"m": 2})
    assert caught.value.hint
    with pytest.raises(InvalidRequest, match="not an ONNX model"):
        count_module(tmp_path / "absent.onnx", {})
    own = small(
        tmp_path,
        '<ir_version: 8, opset_import: ["" : 20, "own" : 1]>\n'
        "g (float[n,4] x) => (float[n,4] y) { y = own.Unheard(x) }",
    )
    with pytest.raises(InvalidRequest, match="operator Unheard"):
        count_module(own, {"n": 2})
    ellipsis = small(
        tmp_path,
        HEAD + "g (float[n,4] x, float[4,n] z) => (float[n,n] y) "
        '{ y = Einsum <equation="...i,i...->..."> (x, z) }',
    )
    with pytest.raises(InvalidRequest, match=r"ellipsis|shape"):
        count_module(ellipsis, {"n": 2})
