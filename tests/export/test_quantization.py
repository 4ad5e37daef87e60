"""8-bit UNets: which layers, which scales, and numbers against ModelOpt's own simulation."""

import sys
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from tiny_sdxl import tiny_unet

from fastface_trt.engines import contract
from fastface_trt.engines.manifest import EXPORT_MANIFEST, ExportManifest, read_manifest
from fastface_trt.engines.onnx_file import MODULE_KEY
from fastface_trt.errors import InvalidRequest, MissingDependency, WeightsError
from fastface_trt.export.adapter import attach_adapter, read_adapter
from fastface_trt.export.exporter import run_export
from fastface_trt.export.modules import unet_export
from fastface_trt.export.onnx_writer import write_module
from fastface_trt.export.options import ExportOptions
from fastface_trt.export.oracle import TorchUNet
from fastface_trt.export.quantization.calibration import RandomCalibration
from fastface_trt.export.quantization.graph import (
    LARGEST,
    QuantizationPlan,
    encode,
    quantize_graph,
    scale_of,
)
from fastface_trt.export.quantization.layers import choose_layers
from fastface_trt.export.quantization.ranges import measure_ranges

pytest.importorskip("modelopt")

FORMS = ("fp8", "int8")
CODE_TYPES = {"fp8": onnx.TensorProto.FLOAT8E4M3FN, "int8": onnx.TensorProto.INT8}


def quiet(line):
    pass


def adapted_unet(tiny):
    unet = tiny_unet()
    attach_adapter(unet, read_adapter(tiny / "adapter.safetensors"), lora_scale=1.0)
    return unet


def random_inputs(spec, seed):
    rng = np.random.default_rng(seed)
    sizes = {"batch": 3, "requests": 1, "height": 16, "width": 16}
    inputs = {
        t.name: rng.standard_normal(
            [sizes[d] if isinstance(d, str) else d for d in t.shape]
        ).astype(t.dtype)
        for t in spec.inputs
    }
    inputs[contract.TIMESTEP][:] = 500
    inputs[contract.TIME_IDS][:] = 96
    inputs[contract.MANIPULATION][:] = 0
    return inputs


class Quantized:
    """The tiny UNet in one format: ModelOpt's simulation, the ONNX file, independent statistics."""

    def __init__(self, tiny, form, folder):
        self.form, self.unet = form, adapted_unet(tiny)
        self.choice = choose_layers(self.unet, form)
        calls = [random_inputs(TorchUNet(self.unet).spec, seed) for seed in range(3)]
        self.input_amax = self._watch(calls)
        twins = []

        def run(twin):
            twins.append(twin)
            for call in calls:
                TorchUNet(twin)(**call)

        ranges = measure_ranges(self.unet, form, self.choice, run)
        self.simulation = TorchUNet(twins[0])
        self.plan = QuantizationPlan(form, ranges)
        # In float32, so that what differs is quantisation and not float16.
        export = unet_export(self.unet, tokens=4, latent_size=(16, 16), fixed_size=False)
        spec = write_module(replace(export, quantization=self.plan), folder / form)
        self.path = folder / form / spec.files[0].path
        self.model = onnx.load(self.path)

    def _watch(self, calls):
        """Largest magnitude per input channel of every layer, by hooks of our own."""
        seen = {}

        def hook(name):
            def watch(module, inputs):
                x = inputs[0].detach().abs()
                axis = 1 if isinstance(module, torch.nn.Conv2d) else x.ndim - 1
                amax = x.amax([a for a in range(x.ndim) if a != axis]).numpy()
                seen[name] = np.maximum(seen.get(name, 0), amax)

            return watch

        handles = [
            self.unet.get_submodule(name).register_forward_pre_hook(hook(name))
            for name in self.choice.quantized
        ]
        for call in calls:
            TorchUNet(self.unet)(**call)
        for handle in handles:
            handle.remove()
        return seen

    def layers(self):
        """Name to the node that multiplies by the layer's weight, for every layer of the graph."""
        held = {i.name for i in self.model.graph.initializer}
        made = {o: n for n in self.model.graph.node for o in n.output}
        found = {}
        for node in self.model.graph.node:
            if node.op_type not in ("MatMul", "Gemm", "Conv"):
                continue
            weight = node.input[1]
            if weight in made and made[weight].op_type != "DequantizeLinear":
                continue
            if weight not in held and weight not in made:
                continue
            module = next(p.value for p in node.metadata_props if p.key == MODULE_KEY)
            found[module.removeprefix("unet.")] = node
        return found, made, {i.name: i for i in self.model.graph.initializer}


@pytest.fixture(
    scope="module", params=["fp8", pytest.param("int8", marks=pytest.mark.engines)], ids=str
)
def quantized(request, tiny, tmp_path_factory):
    return Quantized(tiny, request.param, tmp_path_factory.mktemp("quantized"))


def test_every_layer_is_quantised_or_excluded_for_a_reason(tiny):
    unet = adapted_unet(tiny)
    everything = {
        name
        for name, module in unet.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    }
    for form in FORMS:
        choice = choose_layers(unet, form)
        excluded = [name for names in choice.excluded.values() for name in names]
        assert sorted([*choice.quantized, *excluded]) == sorted(everything)
        for name in ("conv_in", "conv_out", "time_embedding.linear_1", "add_embedding.linear_2"):
            assert name in excluded
        assert not [n for n in choice.quantized if "_ip" in n or "time_emb_proj" in n]
        assert not [n for n in choice.quantized if "conv_shortcut" in n]
        for ending in ("conv1", "attn1.to_q", "attn2.to_out.0", "ff.net.2", "proj_in"):
            assert [n for n in choice.quantized if n.endswith(ending)], ending
        text = [n for n in choice.quantized if n.endswith(("attn2.to_k", "attn2.to_v"))]
        assert bool(text) == (form == "fp8")


def test_graph_has_the_form_that_tensorrt_reads(quantized):
    layers, made, held = quantized.layers()
    for name in quantized.choice.quantized:
        node = layers[name]
        dequantize = made[node.input[0]]
        quantize = made[dequantize.input[0]]
        assert (quantize.op_type, dequantize.op_type) == ("QuantizeLinear", "DequantizeLinear")
        zero = held[quantize.input[2]]
        assert zero.data_type == CODE_TYPES[quantized.form]
        assert not zero.dims
        assert not any(zero.raw_data)
        assert quantize.input[1:3] == dequantize.input[1:3]
        weight = made[node.input[1]]
        codes, scale = held[weight.input[0]], numpy_helper.to_array(held[weight.input[1]])
        assert codes.data_type == CODE_TYPES[quantized.form]
        module = quantized.unet.get_submodule(name)
        outputs = module.weight.shape[0]
        assert scale.shape == ((outputs,) if quantized.form == "int8" else ())
        if quantized.form == "int8":
            assert codes.dims[weight.attribute[0].i] == outputs
    for names in quantized.choice.excluded.values():
        for name in names:
            assert layers[name].input[0] not in made or (
                made[layers[name].input[0]].op_type != "DequantizeLinear"
            )
            assert layers[name].input[1] in held


def test_queries_keys_and_values_share_their_input(quantized):
    if quantized.form == "int8":
        pytest.skip("SmoothQuant gives each its own factors")
    layers, _, _ = quantized.layers()
    for name in quantized.choice.quantized:
        if name.endswith("attn1.to_q"):
            inputs = {layers[name.replace("to_q", f"to_{x}")].input[0] for x in "qkv"}
            assert len(inputs) == 1


def test_scales_are_the_largest_magnitudes_over_the_largest_code(quantized):
    layers, made, held = quantized.layers()
    for name in quantized.choice.quantized:
        node = layers[name]
        amax = quantized.input_amax[name]
        module = quantized.unet.get_submodule(name)
        weight = module.weight.detach().numpy()
        quantize = made[made[node.input[0]].input[0]]
        before = made.get(quantize.input[0])
        assert quantized.form == "fp8" or weight.ndim == 4 or before.op_type == "Mul"
        if before is not None and before.input[-1].endswith(".smoothing"):
            factors = numpy_helper.to_array(held[before.input[1]])
            # Xiao et al., Eq. 4, with the exponent 0.8 on the input.
            expected = np.abs(weight).max(0) ** 0.2 / amax**0.8
            np.testing.assert_allclose(factors, expected, rtol=1e-4)
            amax, weight = amax * factors, weight / factors
        scale = numpy_helper.to_array(held[quantize.input[1]])
        assert float(scale) == pytest.approx(amax.max() / LARGEST[quantized.form], rel=1e-4)
        stored = numpy_helper.to_array(held[made[node.input[1]].input[1]])
        others = tuple(range(1, weight.ndim)) if quantized.form == "int8" else None
        np.testing.assert_allclose(
            stored, np.abs(weight).max(axis=others) / LARGEST[quantized.form], rtol=1e-4
        )


def test_numbers_are_those_of_modelopts_simulation(quantized):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Q/DQ as written: no fusing into integer kernels, no moving of float8 through a Reshape.
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(
        str(quantized.path), options, providers=["CPUExecutionProvider"]
    )
    inputs = random_inputs(quantized.simulation.spec, 9)
    ours = session.run(None, inputs)[0]
    expected = quantized.simulation(**inputs)[contract.NOISE_PREDICTION]
    plain = TorchUNet(quantized.unet)(**inputs)[contract.NOISE_PREDICTION]
    error = np.linalg.norm(ours - expected) / np.linalg.norm(expected)
    quantisation = np.linalg.norm(expected - plain) / np.linalg.norm(plain)
    # A last bit of difference before a rounding moves a value by a whole code, now and then.
    assert error < 0.1 * quantisation, (error, quantisation)


@pytest.mark.parametrize("form", FORMS)
def test_codes_are_those_of_the_onnx_operator(form):
    rng = np.random.default_rng(0)
    values = (rng.standard_normal(4096) * 3).astype(np.float32)
    values[:4] = [0, 1e4, -1e4, 1e-12]
    scale = scale_of(np.float64(7.0), form, np.dtype(np.float32))
    x, y = (
        onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [4096]),
        onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [4096]),
    )
    zero = onnx.helper.make_tensor("zero", CODE_TYPES[form], [], b"\0", raw=True)
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
            onnx.helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
        ],
        "g",
        [x],
        [y],
        [numpy_helper.from_array(np.asarray(scale), "scale"), zero],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)])
    expected = ReferenceEvaluator(model).run(None, {"x": values})[0]
    ours = encode(values, scale, form).astype(np.float32) * scale
    # onnx's int8 goes down to -128; a symmetric code stops at -127.
    np.testing.assert_allclose(ours, np.maximum(expected, -LARGEST[form] * scale), rtol=1e-6)


def test_scales_never_become_zero():
    half = np.dtype(np.float16)
    assert float(scale_of(np.float64(0.0), "int8", half)) == 1
    assert float(scale_of(np.float64(1e-9), "fp8", half)) > 0
    assert float(scale_of(np.float64(4.48), "fp8", half)) == np.float16(0.01)


@pytest.mark.engines
@pytest.mark.parametrize("form", FORMS)
def test_fp16_graph_passes_the_tensorrt_parser_and_is_half_as_large(tiny, form, tmp_path):
    trt = pytest.importorskip("tensorrt_rtx")
    unet = adapted_unet(tiny)
    choice = choose_layers(unet, form)
    run = RandomCalibration(calls=1)
    manifest = ExportManifest.model_construct(height=32, width=32)
    ranges = measure_ranges(
        unet, form, choice, lambda twin: run.run(TorchUNet(twin), manifest, tmp_path, quiet)
    )
    export = unet_export(unet.half(), tokens=4, latent_size=(16, 16), fixed_size=False)
    plan = QuantizationPlan(form, ranges)
    spec = write_module(replace(export, quantization=plan), tmp_path)
    path = tmp_path / spec.files[0].path
    logger = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(logger).create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(path)), [
        str(parser.get_error(i)) for i in range(parser.num_errors)
    ]
    kinds = [network.get_layer(i).type for i in range(network.num_layers)]
    assert kinds.count(trt.LayerType.DEQUANTIZE) > len(choice.quantized)
    held = onnx.load(path).graph.initializer
    codes = sum(np.prod(i.dims) for i in held if i.data_type == CODE_TYPES[form] and i.dims)
    weights = sum(unet.get_submodule(n).weight.numel() for n in choice.quantized)
    assert codes == weights
    half = sum(np.prod(i.dims) for i in held if i.data_type == onnx.TensorProto.FLOAT16)
    everything = sum(p.numel() for p in unet.parameters())
    assert half < everything - weights + 0.2 * weights  # the rest, scales and factors


@pytest.mark.engines
def test_export_records_what_was_quantised(tiny_entry, tmp_path):
    options = ExportOptions(tiny_entry, precision="int8", calibration=RandomCalibration(calls=1))
    manifest = run_export(options, tmp_path / "out", quiet)
    assert read_manifest(tmp_path / "out" / EXPORT_MANIFEST, ExportManifest) == manifest
    record = manifest.quantization
    assert record is not None
    assert (manifest.precision, manifest.weight_storage) == ("int8", "fp16")
    assert record.tool.startswith("nvidia-modelopt ")
    assert record.calibration_rows == 3
    assert len(record.layers) > 20
    assert "image branch" in record.excluded
    assert manifest.modules["unet"].dtype_of(contract.SAMPLE) == "float32"
    assert manifest.modules["unet"].dtype_of(contract.IMAGE_TOKENS) == "float16"


def test_missing_modelopt_is_said_before_anything_is_written(tiny_entry, tmp_path, monkeypatch):
    for name in [n for n in sys.modules if n.split(".")[0] == "modelopt"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "modelopt", None)
    options = ExportOptions(tiny_entry, precision="fp8", calibration=RandomCalibration())
    with pytest.raises(MissingDependency, match="modelopt") as caught:
        run_export(options, tmp_path / "out", quiet)
    assert "fastface-trt[quantize]" in caught.value.mend
    assert list(tmp_path.iterdir()) == []


def test_calibration_is_asked_for(tiny_entry):
    with pytest.raises(InvalidRequest, match="calibrate"):
        ExportOptions(tiny_entry, precision="fp8")


def test_ranges_that_are_not_finite_are_explained(tiny):
    unet = adapted_unet(tiny)
    choice = choose_layers(unet, "fp8")

    def run(twin):
        oracle = TorchUNet(twin)
        inputs = random_inputs(oracle.spec, 0)
        inputs[contract.SAMPLE][:] = np.inf
        oracle(**inputs)

    with pytest.raises(WeightsError, match="finite"):
        measure_ranges(unet, "fp8", choice, run)


def test_a_layer_that_is_not_in_the_graph_is_an_error(quantized):
    import onnx_ir as ir

    model = ir.from_proto(onnx.load(quantized.path))
    ranges = {"nowhere": next(iter(quantized.plan.ranges.values()))}
    with pytest.raises(LookupError, match="nowhere"):
        quantize_graph(model, QuantizationPlan(quantized.form, ranges))
