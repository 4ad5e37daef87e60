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

from fastface_trt.engines import contract
from fastface_trt.engines.manifest import EXPORT_MANIFEST, ExportManifest, read_manifest
from fastface_trt.engines.onnx.file import MODULE_KEY
from fastface_trt.errors import InvalidRequest, MissingDependency, WeightsError, install_hint
from fastface_trt.export.adapters import attach_adapter, read_adapter
from fastface_trt.export.exporter import run_export
from fastface_trt.export.modules import unet_export, vae_decoder_export
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
from fastface_trt.export.quantization.modules import quantize_vae
from fastface_trt.export.quantization.ranges import choose_layers, measure_ranges
from tests.helpers.tiny_sdxl import tiny_unet

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
    sizes = {"batch": 3, "requests": 1, "height": 16, "width": 16, "text": 77}
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
        self.choice = choose_layers(self.unet, form, attention=form == "fp8")
        calls = [random_inputs(TorchUNet(self.unet).spec, seed) for seed in range(3)]
        self.input_amax = self._watch(calls)
        twins = []

        def run(twin):
            twins.append(twin)
            for call in calls:
                TorchUNet(twin)(**call)

        ranges, attention = measure_ranges(self.unet, form, self.choice, run)
        self.simulation = TorchUNet(twins[0])
        self.plan = QuantizationPlan(form, ranges, attention)
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


def test_attention_quantises_what_enters_its_two_products(quantized):
    if quantized.form == "int8":
        assert quantized.choice.attention == ()
        return
    _, made, held = quantized.layers()
    nodes = quantized.model.graph.node
    found = 0
    for softmax in [node for node in nodes if node.op_type == "Softmax"]:
        name = next(p.value for p in softmax.metadata_props if p.key == MODULE_KEY)
        range_ = quantized.plan.attention[name.removeprefix("unet.")]
        scores = made[softmax.input[0]]
        codes = [n for n in nodes if softmax.output[0] in n.input]
        assert [n.op_type for n in codes] == ["QuantizeLinear"]
        (dequantize,) = [n for n in nodes if codes[0].output[0] in n.input]
        (product,) = [n for n in nodes if dequantize.output[0] in n.input]
        assert (scores.op_type, product.op_type) == ("MatMul", "MatMul")
        inputs = [*scores.input, *product.input]
        amaxes = (range_.q_amax, range_.k_amax, 1.0, range_.v_amax)
        for value, amax, before in zip(
            inputs, amaxes, ("Mul", "Transpose", "Softmax", "Transpose"), strict=True
        ):
            quantize = made[made[value].input[0]]
            assert (made[value].op_type, quantize.op_type) == ("DequantizeLinear", "QuantizeLinear")
            assert made[quantize.input[0]].op_type == before
            scale = float(numpy_helper.to_array(held[quantize.input[1]]))
            assert scale == pytest.approx(amax / 448, rel=1e-4)
            assert held[quantize.input[2]].data_type == CODE_TYPES["fp8"]
        found += 1
    assert found == len(quantized.choice.attention) == len(quantized.unet.attn_processors)


def test_attention_ranges_are_the_largest_magnitudes(quantized, monkeypatch):
    """Of q, k and v as attention gets them, seen by a wrapper of our own."""
    if quantized.form == "int8":
        pytest.skip("fp8 alone quantises attention")
    seen = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def watch(q, k, v):
        scaled = q / q.shape[-1] ** 0.5
        seen.append([float(x.abs().max()) for x in (scaled, k, v)])
        return attend(q, k, v)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watch)
    unet = TorchUNet(quantized.unet)
    for seed in range(3):
        unet(**random_inputs(unet.spec, seed))
    ranges = quantized.plan.attention.values()
    measured = sorted((r.q_amax, r.k_amax, r.v_amax) for r in ranges)
    calls = np.asarray(seen).reshape(3, len(measured), 3).max(0)
    np.testing.assert_allclose(measured, sorted(map(tuple, calls)), rtol=0.1)


def fp8_softmax_attention(q, k, v, **rest):
    """softmax(Q Kᵀ / √D) V with the softmax rounded to E4M3 at the scale 1/448."""
    shares = torch.softmax(q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5, dim=-1)
    return (shares * 448).to(torch.float8_e4m3fn).to(q.dtype) / 448 @ v


def test_numbers_are_those_of_modelopts_simulation(quantized, monkeypatch):
    from modelopt.torch.quantization.plugins.diffusion import diffusers as simulated

    if quantized.form == "fp8":  # ModelOpt leaves the softmax to its exporter
        name = "original_scaled_dot_product_attention"
        monkeypatch.setattr(simulated, name, fp8_softmax_attention)
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
    choice = choose_layers(unet, form, attention=form == "fp8")
    run = RandomCalibration(calls=1)
    manifest = ExportManifest.model_construct(height=32, width=32)
    ranges, attention = measure_ranges(
        unet, form, choice, lambda twin: run.run(TorchUNet(twin), manifest, tmp_path, quiet)
    )
    export = unet_export(unet.half(), tokens=4, latent_size=(16, 16), fixed_size=False)
    plan = QuantizationPlan(form, ranges, attention)
    spec = write_module(replace(export, quantization=plan), tmp_path)
    path = tmp_path / spec.files[0].path
    logger = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(logger).create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(path)), [
        str(parser.get_error(i)) for i in range(parser.num_errors)
    ]
    kinds = [network.get_layer(i).type for i in range(network.num_layers)]
    assert kinds.count(trt.LayerType.DEQUANTIZE) > len(choice.quantized) + 4 * len(choice.attention)
    held = onnx.load(path).graph.initializer
    codes = sum(np.prod(i.dims) for i in held if i.data_type == CODE_TYPES[form] and i.dims)
    weights = sum(unet.get_submodule(n).weight.numel() for n in choice.quantized)
    assert codes == weights
    half = sum(np.prod(i.dims) for i in held if i.data_type == onnx.TensorProto.FLOAT16)
    everything = sum(p.numel() for p in unet.parameters())
    assert half < everything - weights + 0.2 * weights  # the rest, scales and factors


@pytest.mark.engines
def test_export_records_what_was_quantised(tiny_entry, tmp_path):
    options = ExportOptions(
        tiny_entry,
        precision="int8",
        quantize_vae="int8",
        calibration=RandomCalibration(calls=1),
    )
    manifest = run_export(options, tmp_path / "out", quiet)
    assert read_manifest(tmp_path / "out" / EXPORT_MANIFEST, ExportManifest) == manifest
    record = manifest.quantization
    assert record is not None
    assert (manifest.precision, manifest.weight_storage) == ("int8", "fp16")
    assert record.tool.startswith("nvidia-modelopt ")
    assert record.calibration_rows == 3
    assert len(record.layers) > 20
    assert "image branch" in record.excluded
    vae = manifest.vae_quantization
    assert vae is not None
    assert (vae.format, vae.calibration_rows, vae.attention) == ("int8", 3, ())
    assert "last convolution" in vae.excluded
    assert manifest.modules["unet"].dtype_of(contract.SAMPLE) == "float32"
    assert manifest.modules["unet"].dtype_of(contract.IMAGE_TOKENS) == "float16"


@pytest.mark.parametrize("form", FORMS)
def test_a_vae_in_8_bits(tiny, form, tmp_path):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(tiny / "checkpoint" / "vae").eval()
    generator = np.random.default_rng(0)
    latents = [generator.standard_normal((4, 8, 8)).astype(np.float32) for _ in range(3)]
    options = ExportOptions.__new__(ExportOptions)
    object.__setattr__(options, "quantize_vae", form)
    object.__setattr__(options, "calibration", RandomCalibration())
    plan, record = quantize_vae(vae, options, latents)
    assert record.calibration_rows == 3
    assert record.layers == tuple(plan.ranges)
    excluded = {name for names in record.excluded.values() for name in names}
    assert {"decoder.conv_in", "decoder.conv_out", "post_quant_conv"} <= excluded
    decoder = {
        name
        for name, module in vae.named_modules()
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear)
        and name.startswith(("decoder.", "post_quant_conv"))
    }
    assert {*record.layers, *excluded} == decoder
    assert not excluded & {*record.layers}
    seen, handles = {}, []
    for name in record.layers:

        def watch(module, inputs, name=name):
            seen[name] = max(seen.get(name, 0), float(inputs[0].abs().max()))

        handles.append(vae.get_submodule(name).register_forward_pre_hook(watch))
    with torch.no_grad():
        for one in latents:
            vae.decode(torch.from_numpy(one)[None] / vae.config.scaling_factor)
    for handle in handles:
        handle.remove()
    for name, amax in seen.items():
        assert plan.ranges[name].input_amax == pytest.approx(amax, rel=1e-4)
    export = vae_decoder_export(vae, latent_size=(8, 8), scale_factor=2, fixed_size=False)
    with torch.no_grad():
        plain = export.module(torch.from_numpy(np.stack(latents)))
    spec = write_module(replace(export, quantization=plan), tmp_path)
    path = tmp_path / spec.files[0].path
    nodes = onnx.load(path).graph.node
    codes = [n for n in nodes if n.op_type == "QuantizeLinear"]
    assert 0 < len(codes) <= len(record.layers)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    ours = session.run([spec.outputs[0].name], {"latents": np.stack(latents)})[0]
    plain = (plain[0] if isinstance(plain, tuple) else plain).numpy()
    error = np.linalg.norm(ours - plain) / np.linalg.norm(plain)
    assert 1e-4 < error < 5e-2


@pytest.mark.parametrize(
    ("values", "hint"),
    [
        ({"precision": "fp16", "quantize_attention": True}, "--precision fp8"),
        (
            {"precision": "fp8", "quantize_attention": True, "attention_operator": "onnx"},
            "--attention-operator",
        ),
        ({"precision": "bf16", "quantize_vae": "int8"}, "--quantize-vae"),
        ({"precision": "fp16", "tiny_vae": True, "quantize_vae": "int8"}, "--quantize-vae"),
        ({"precision": "fp32", "quantize_vae": "int8", "calibration": None}, "calibration"),
    ],
)
def test_quantisation_that_cannot_be_is_refused(tiny_entry, values, hint):
    with pytest.raises(InvalidRequest) as caught:
        ExportOptions(tiny_entry, **({"calibration": RandomCalibration()} | values))
    assert hint in caught.value.hint


def test_missing_modelopt_is_said_before_anything_is_written(tiny_entry, tmp_path, monkeypatch):
    for name in [n for n in sys.modules if n.split(".")[0] == "modelopt"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "modelopt", None)
    options = ExportOptions(tiny_entry, precision="fp8", calibration=RandomCalibration())
    with pytest.raises(MissingDependency, match="modelopt") as caught:
        run_export(options, tmp_path / "out", quiet)
    assert install_hint("quantize") in caught.value.hint
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
