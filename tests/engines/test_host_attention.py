"""The host form of attention: same numbers as the exported form, at every kind, scope and type."""

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest

from fastface_trt.engines.contract import KINDS, MANIPULATION_COLUMNS
from fastface_trt.engines.host_attention import host_form
from fastface_trt.engines.onnx_file import OnnxFile
from fastface_trt.errors import ExportIncomplete
from fastface_trt.mini.folders import EXPORT

UNET = EXPORT / "unet" / "model.onnx"
TOKENS = 4


@pytest.fixture(scope="module")
def rewritten():
    with OnnxFile(UNET) as file:
        return host_form(file, TOKENS)


@pytest.fixture(scope="module")
def sessions(rewritten):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return [
        onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        for model in (UNET.read_bytes(), rewritten)
    ]


def inputs_for(session, kinds, branches, size=(24, 32)):
    """Random inputs; `kinds` has one kind of manipulation per request."""
    rng = np.random.default_rng(7)
    sizes = {"requests": len(kinds), "batch": len(kinds) * branches}
    sizes |= {"height": size[0], "width": size[1]}
    feed = {}
    for one in session.get_inputs():
        shape = [sizes.get(dim, dim) for dim in one.shape]
        feed[one.name] = rng.standard_normal(shape).astype(np.float32)
    feed["timestep"][:] = 501
    rows = feed["attention_manipulation"]
    for index, kind in enumerate(kinds):
        for part in range(rows.shape[1]):
            values = {
                "kind": KINDS.index(kind),
                "scale": 1.2 + 0.3 * index,
                "power": 1.3,
                "quantile": 0.65,
                "sharpness": 5,
                "adain_weight": 0.7,
                "invert_first_token": 1,
                "upper_bound": 0.4 if part else 10,
            }
            rows[index, part] = [values[column] for column in MANIPULATION_COLUMNS]
    feed["ip_adapter_scale"] = np.abs(feed["ip_adapter_scale"])
    return feed


@pytest.mark.parametrize(
    ("kinds", "branches"),
    [
        (("off",), 1),
        (("scale_power",), 3),
        (("softmask",), 3),
        (("off", "scale_power"), 2),
        (("scale_power", "softmask", "off"), 3),
    ],
)
def test_predictions_are_those_of_the_exported_form(sessions, kinds, branches):
    exported, host = sessions
    feed = inputs_for(exported, kinds, branches)
    expected, actual = exported.run(None, feed)[0], host.run(None, feed)[0]
    np.testing.assert_allclose(actual, expected, atol=1e-5 * np.abs(expected).max())


def test_lambda_and_the_parameters_reach_the_lean_branch(sessions):
    """Each parameter that the lean branch reads changes what it computes."""
    _, host = sessions
    feed = inputs_for(host, ("scale_power",), 1)
    before = host.run(None, feed)[0]
    for column in ("kind", "scale", "power", "upper_bound"):
        changed = feed["attention_manipulation"].copy()
        changed[..., MANIPULATION_COLUMNS.index(column)] *= 0.5 if column != "kind" else 0
        after = host.run(None, feed | {"attention_manipulation": changed})[0]
        assert np.abs(after - before).max() > 1e-4, column
    assert np.abs(
        host.run(None, feed | {"ip_adapter_scale": 0 * changed[..., 0]})[0] - before
    ).max()


def test_every_attention_changes_its_form_and_the_weights_stay(rewritten):
    before, after = onnx.load(UNET), onnx.load_from_string(rewritten)
    had, has = (Counter(node.op_type for node in model.graph.node) for model in (before, after))
    assert has["MultiHeadAttention"] == had["Softmax"] > 0
    assert has["If"] == had["DecoupledAttention"] > 0
    assert has["Softmax"] == has["DecoupledAttention"] == 0
    kept = len(before.functions)
    assert list(after.functions)[:kept] == list(before.functions)
    assert len(after.functions) == kept * (1 + had["DecoupledAttention"])
    weights = {one.name: one for one in after.graph.initializer}
    assert all(weights[one.name] == one for one in before.graph.initializer)
    names = [name for node in after.graph.node for name in node.output]
    assert len(names) == len(set(names))


def test_a_tensor_that_is_an_output_keeps_its_attention(tmp_path):
    """`verify --layers` makes inner tensors outputs: such an attention must stay as it is."""
    model = onnx.load(UNET)
    softmax = next(node for node in model.graph.node if node.op_type == "Softmax")
    model.graph.output.append(onnx.helper.make_tensor_value_info(softmax.output[0], 1, None))
    onnx.save(model, tmp_path / "model.onnx")
    with OnnxFile(tmp_path / "model.onnx") as file:
        after = onnx.load_from_string(host_form(file, TOKENS))
    assert sum(node.op_type == "Softmax" for node in after.graph.node) == 1


@pytest.mark.parametrize("optimization", ["all", "extended", "basic"])
def test_the_optimised_graph_can_be_read_again(sessions, rewritten, tmp_path, optimization):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    level = f"ORT_ENABLE_{optimization.upper()}"
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.optimized_model_filepath = str(tmp_path / "engine.onnx")
    onnxruntime.InferenceSession(rewritten, options, providers=["CPUExecutionProvider"])
    plain = onnxruntime.SessionOptions()
    plain.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    again = onnxruntime.InferenceSession(tmp_path / "engine.onnx", plain)
    feed = inputs_for(again, ("softmask",), 3)
    expected = sessions[0].run(None, feed)[0]
    tolerance = 1e-5 * np.abs(expected).max()
    np.testing.assert_allclose(again.run(None, feed)[0], expected, atol=tolerance)


def test_a_model_without_attention_is_left_alone():
    with OnnxFile(EXPORT / "vae_decoder" / "model.onnx") as file:
        assert host_form(file, TOKENS) is None


def test_a_cut_model_is_named(tmp_path):
    (tmp_path / "model.onnx").write_bytes(UNET.read_bytes()[:-1000])
    with pytest.raises(ExportIncomplete), OnnxFile(tmp_path / "model.onnx") as file:
        host_form(file, TOKENS)
