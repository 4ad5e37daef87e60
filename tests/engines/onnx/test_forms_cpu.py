"""The CPU form: same numbers as the exported form, at every kind, scope and type."""

import subprocess
import sys
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest

from fastface_trt.engines.cache import EngineCache
from fastface_trt.engines.contract import MANIPULATION_COLUMNS
from fastface_trt.engines.onnx.forms import cpu_form, cuda_form
from fastface_trt.engines.ort.builder import OnnxRuntimeBuilder
from fastface_trt.errors import ExportIncomplete
from fastface_trt.export.probe import TOLERANCES
from fastface_trt.mini.folders import EXPORT
from tests.engines.onnx.spelled_out import inputs_for

UNET = EXPORT / "unet" / "model.onnx"
TOKENS = 4


@pytest.fixture(scope="module")
def rewritten():
    return cpu_form(UNET, TOKENS).model


@pytest.fixture(scope="module")
def sessions(rewritten):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return [
        onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        for model in (UNET.read_bytes(), rewritten)
    ]


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
    silent = {"ip_adapter_scale": 0 * feed["ip_adapter_scale"]}
    assert np.abs(host.run(None, feed | silent)[0] - before).max() > 1e-4


def all_nodes(graph):
    for node in graph.node:
        yield node
        for one in node.attribute:
            if one.type == onnx.AttributeProto.GRAPH:
                yield from all_nodes(one.g)


@pytest.mark.parametrize("form", ["cpu", "branches"])
def test_no_call_is_left_and_every_name_is_made_once(form):
    """ONNX Runtime 1.22 to 1.30 refuse an If around calls, which they inline under equal names."""
    made = cpu_form(UNET, TOKENS) if form == "cpu" else cuda_form(UNET, TOKENS, "branches")
    model = onnx.load_from_string(made.model)
    nodes = list(all_nodes(model.graph))
    assert not model.functions
    assert {node.domain for node in nodes} == {"", "com.microsoft"}
    assert {one.domain for one in model.opset_import} == {"", "com.microsoft"}
    names = [name for node in nodes for name in node.output if name]
    assert len(names) == len(set(names))
    assert sum(node.op_type == "If" for node in nodes) == 7


def test_every_attention_changes_its_form_and_the_weights_stay(rewritten):
    before, after = onnx.load(UNET), onnx.load_from_string(rewritten)
    had, has = (Counter(node.op_type for node in model.graph.node) for model in (before, after))
    assert has["MultiHeadAttention"] == had["Softmax"] > 0
    assert has["If"] == had["DecoupledAttention"] > 0
    assert has["Softmax"] == has["DecoupledAttention"] == 0
    weights = {one.name: one for one in after.graph.initializer}
    used = {name for node in before.graph.node for name in node.input}
    gone = {one.name for one in before.graph.initializer if weights.get(one.name) != one} & used
    kinds = {one.name: one.data_type for one in before.graph.initializer}
    assert {kinds[name] for name in gone} == {onnx.TensorProto.INT64}  # shapes with the heads in


def test_a_tensor_that_is_an_output_keeps_its_attention(tmp_path):
    """`verify --layers` makes inner tensors outputs: such an attention must stay as it is."""
    model = onnx.load(UNET)
    softmax = next(node for node in model.graph.node if node.op_type == "Softmax")
    model.graph.output.append(onnx.helper.make_tensor_value_info(softmax.output[0], 1, None))
    onnx.save(model, tmp_path / "model.onnx")
    form = cpu_form(tmp_path / "model.onnx", TOKENS)
    assert form.counts["attention"] == 13
    after = onnx.load_from_string(form.model)
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


@pytest.mark.parametrize("optimization", ["all", "extended", "basic"])
def test_a_float16_engine_can_be_read_again(tiny_fp16_unet, tmp_path, optimization):
    """Casts that ONNX Runtime inserts for the CPU get one name inside and outside of an If."""
    folder, spec = tiny_fp16_unet
    builder = OnnxRuntimeBuilder(threads=1, optimization=optimization)
    entry = EngineCache(tmp_path).get(spec, folder, builder)
    exported = onnxruntime.InferenceSession(folder / spec.files[0].path)
    for kinds in (("scale_power",), ("softmask",)):
        feed = inputs_for(exported, kinds, 3)
        expected = exported.run(None, feed)[0].astype(np.float32)
        with builder.open(*entry) as engine:
            actual = engine(**feed)["noise_prediction"].astype(np.float32)
        assert np.linalg.norm(actual - expected) < TOLERANCES["fp16"] * np.linalg.norm(expected)


def test_a_model_without_attention_is_left_alone():
    vae = EXPORT / "vae_decoder" / "model.onnx"
    assert cpu_form(vae, TOKENS) is cpu_form(vae, None) is None


@pytest.mark.parametrize("cut", [None, 1000])
def test_a_model_that_is_missing_or_cut_is_named(tmp_path, cut):
    path = tmp_path / "model.onnx"
    if cut is not None:
        path.write_bytes(UNET.read_bytes()[:-cut])
    for make in (lambda: cpu_form(path, TOKENS), lambda: cuda_form(path, TOKENS, "operator")):
        with pytest.raises(ExportIncomplete, match="Export it again"):
            make()


def test_opening_an_engine_does_not_import_onnx(tmp_path):
    """Making a form needs the package, which takes 60 ms and 11 MB; running an engine does not."""
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from fastface_trt.engines.cache import EngineCache\n"
        "from fastface_trt.engines.manifest import EXPORT_MANIFEST, ExportManifest, read_manifest\n"
        "from fastface_trt.engines.ort.builder import OnnxRuntimeBuilder\n"
        "from fastface_trt.mini.folders import EXPORT\n"
        "unet = read_manifest(EXPORT / EXPORT_MANIFEST, ExportManifest).modules['unet']\n"
        "builder = OnnxRuntimeBuilder(threads=1)\n"
        "builder.open(*EngineCache(Path(sys.argv[1])).get(unet, EXPORT, builder)).close()\n"
        "print('onnx' in sys.modules)\n"
    )
    said = [
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, text=True
        ).stdout.strip()
        for _ in range(2)
    ]
    assert said == ["True", "False"]
