"""Layers of the fp16 UNet as TensorRT-RTX parses it, and the form that fused attention needs."""

import json
from dataclasses import replace

import pytest
from click.testing import CliRunner

from benchmarks.attention_pattern import Layer, find_attentions
from benchmarks.graph_layers import examine, layers_of_blocks, main, read_layers
from fastface_trt.engines.contract import FUNCTION_NAME
from fastface_trt.errors import InvalidRequest

MOST_LAYERS = 195
"""Per decoupled block. One order statistic by counting costs 8 layers in each of 4 rounds and 20
around them, two norms 6 each, AdaIN over tokens 18 and over D 30, eight parameter columns 2 each:
180 with the plain arithmetic. One Slice of known bounds in the body adds 27, one Range 12, a shape
put together from single sizes 10; so the margin lets the parser change, and none of those in."""


def chain(*changes):
    """q·c, kᵀ → product → softmax → product with v, as layers; `changes` replace some by name."""
    layers = {
        "c": Layer("c", "CONSTANT", (), ("c",), "HALF"),
        "scale": Layer("scale", "ELEMENTWISE", ("q", "c"), ("qs",), "HALF"),
        "turn": Layer("turn", "SHUFFLE", ("k",), ("kt",), "HALF"),
        "first": Layer("first", "MATRIX_MULTIPLY", ("qs", "kt"), ("s",), "HALF"),
        "soft": Layer("soft", "SOFTMAX", ("s",), ("p",), "HALF"),
        "size": Layer("size", "SHAPE", ("s",), ("n",), "INT64"),
        "view": Layer("view", "SHUFFLE", ("p", "n"), ("pv",), "HALF"),
        "second": Layer("second", "MATRIX_MULTIPLY", ("pv", "v"), ("out",), "HALF"),
    }
    return list((layers | {layer.name: layer for layer in changes}).values())


@pytest.mark.parametrize(
    ("changes", "faults"),
    [
        ((), ()),
        (
            (Layer("turn", "ELEMENTWISE", ("k", "c"), ("kt",), "HALF"),),
            ("scale on both factors",),
        ),
        ((Layer("scale", "SHUFFLE", ("q",), ("qs",), "HALF"),), ("no scale on Q or K",)),
        (
            (
                Layer("up", "CAST", ("s",), ("sf",), "FLOAT"),
                Layer("soft", "SOFTMAX", ("sf",), ("p",), "FLOAT"),
                Layer("down", "CAST", ("pv",), ("ph",), "HALF"),
                Layer("second", "MATRIX_MULTIPLY", ("ph", "v"), ("out",), "HALF"),
            ),
            ("CAST after the softmax", "CAST before the softmax"),
        ),
        (
            (Layer("mask", "ELEMENTWISE", ("p", "x"), ("y",), "HALF"),),
            ("MATRIX_MULTIPLY and ELEMENTWISE after the softmax",),
        ),
    ],
)
def test_departures_from_the_fused_pattern_are_named(changes, faults):
    (attention,) = find_attentions(chain(*changes), outside=FUNCTION_NAME)
    assert tuple(sorted(attention.faults)) == faults


def test_softmax_of_a_decoupled_block_is_not_a_big_attention():
    inside = f"[ONNX Layer: n10 | node_7 ({FUNCTION_NAME})]"
    layers = [replace(layer, metadata=inside) for layer in chain()]
    assert find_attentions(layers, outside=FUNCTION_NAME) == []
    assert layers_of_blocks(layers) == {"node_7": len(layers)}


def test_helpers_belong_to_the_layer_that_they_precede():
    block = f"[ONNX Layer: n1 | n2 (Softmask) | node_3 ({FUNCTION_NAME})]"
    notes = ["[ONNX Layer: a]", "", "", block, "", "[ONNX Layer: b]", block]
    layers = [Layer(str(i), "SHUFFLE", (), (), "HALF", note) for i, note in enumerate(notes)]
    assert layers_of_blocks(layers) == {"node_3": 4}


@pytest.fixture(scope="module")
def layers(tiny_fp16_unet):
    pytest.importorskip("tensorrt_rtx")
    folder, spec = tiny_fp16_unet
    return read_layers(folder / spec.files[0].path)


def test_every_big_attention_has_the_fused_pattern(layers):
    attentions = find_attentions(layers, outside=FUNCTION_NAME)
    blocks = layers_of_blocks(layers)
    assert len(attentions) == 2 * len(blocks) > 0  # a self- and a text attention each
    assert {(a.dtype, a.faults) for a in attentions} == {("HALF", ())}


def test_decoupled_blocks_are_lean(layers):
    found = examine(layers)
    assert found.decoupled_blocks == 7
    assert found.layers_per_decoupled_block[1] <= MOST_LAYERS
    assert found.layers == len(layers) == sum(found.layers_by_type.values())
    assert found.attentions == found.fusible_attentions


def test_command_writes_and_extends_its_table(tiny_fp16_unet, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    folder, _ = tiny_fp16_unet
    out = tmp_path / "results" / "layers.json"
    for label in ("one", "two"):
        result = CliRunner().invoke(main, [f"{label}={folder}", "--out", str(out)])
        assert result.exit_code == 0, result.output
    report = json.loads(out.read_text())
    assert set(report["graphs"]) == {"one", "two"}
    assert report["graphs"]["one"] == report["graphs"]["two"]
    assert report["tensorrt_rtx"]


def test_files_that_do_not_parse_are_explained(tmp_path):
    pytest.importorskip("tensorrt_rtx")
    (tmp_path / "broken.onnx").write_bytes(b"not a graph")
    for name in ("broken.onnx", "absent.onnx"):
        with pytest.raises(InvalidRequest, match=name) as caught:
            read_layers(tmp_path / name)
        assert caught.value.hint
