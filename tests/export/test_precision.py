"""Half-precision modules: types at their boundaries, float32 inside, and their error."""

from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, shape_inference
from torch import nn

from fastface_trt.engines import contract
from fastface_trt.engines.backends import builder_for
from fastface_trt.engines.cache import EngineCache
from fastface_trt.errors import BuildFailed, InvalidRequest
from fastface_trt.export.adapters import load_projection, read_adapter
from fastface_trt.export.face_modules import face_projection_export, image_encoder_export
from fastface_trt.export.modules import (
    UNetModule,
    text_encoder_export,
    unet_export,
    vae_decoder_export,
)
from fastface_trt.export.onnx_writer import write_module
from fastface_trt.export.options import ExportOptions
from fastface_trt.export.oracle import TorchUNet
from fastface_trt.export.precision import (
    Float32GroupNorm,
    compute_dtype,
    keep_group_norms_in_float32,
    stored_type,
)
from fastface_trt.verify.modules import run_reference
from tests.export.test_quantization import adapted_unet, random_inputs

FEATURES = {torch.float16: "float16", torch.bfloat16: "float32"}


def parse(path):
    trt = pytest.importorskip("tensorrt_rtx")
    logger = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(logger).create_network(0)
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse_from_file(str(path))
    assert parsed, [str(parser.get_error(i)) for i in range(parser.num_errors)]


def half_modules(tiny, dtype):
    """The small modules in `dtype`: what they take and give is checked on each."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModelWithProjection, CLIPVisionModelWithProjection

    text = CLIPTextModelWithProjection.from_pretrained(
        tiny / "checkpoint" / "text_encoder_2", dtype=dtype
    )
    yield text_encoder_export("text_encoder_2", text)
    image = CLIPVisionModelWithProjection.from_pretrained(tiny / "image_encoder", dtype=dtype)
    yield image_encoder_export(image)
    projection = load_projection(read_adapter(tiny / "adapter.safetensors")).to(dtype)
    yield face_projection_export(projection, "positions")
    vae = AutoencoderKL.from_pretrained(tiny / "checkpoint" / "vae", torch_dtype=dtype)
    yield vae_decoder_export(vae, latent_size=(8, 8), scale_factor=2, fixed_size=False)


@pytest.fixture(
    scope="module",
    params=[torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.engines)],
    ids=str,
)
def half_unet(request, tiny, tmp_path_factory):
    """A tiny UNet exported in half precision: torch type, folder, specification."""
    if request.param == torch.float16:
        return torch.float16, *request.getfixturevalue("tiny_fp16_unet")
    folder = tmp_path_factory.mktemp("half")
    unet = nn.Module.to(adapted_unet(tiny), request.param)
    export = unet_export(unet, tokens=4, latent_size=(16, 16), fixed_size=False)
    return request.param, folder, write_module(export, folder)


def test_latents_are_float32_and_features_fit_the_next_module(half_unet, tiny, tmp_path):
    dtype, folder, spec = half_unet
    assert spec.dtype_of(contract.SAMPLE) == spec.dtype_of(contract.NOISE_PREDICTION) == "float32"
    taken = {n: spec.dtype_of(n) for n in (contract.TEXT, contract.POOLED_TEXT)}
    assert set(taken.values()) == {FEATURES[dtype]}
    parse(folder / spec.files[0].path)
    given = {}
    for export in half_modules(tiny, dtype):
        module = write_module(export, tmp_path)
        parse(tmp_path / module.files[0].path)
        given |= {t.name: t.dtype for t in (*module.inputs, *module.outputs)}
    assert given["hidden_states"] == given["text_embeds"] == FEATURES[dtype]
    assert given["image_tokens"] == spec.dtype_of(contract.IMAGE_TOKENS) == FEATURES[dtype]
    assert given["clip_embeds"] == given["pixel_values"] == FEATURES[dtype]
    assert given["latents"] == given["picture"] == "float32"
    assert given["pixels"] == "uint8"


def test_pixels_of_a_half_precision_decoder_are_rounded_in_float32(tiny, tmp_path):
    """Half of float16's values in [0, 1] are coarser than a step of 1/255 rounds at."""
    *_, export = half_modules(tiny, torch.float16)
    module = write_module(export, tmp_path)
    rng = np.random.default_rng(4)
    latents = rng.standard_normal((2, 4, 8, 12)).astype(np.float32)
    ours = run_reference(module, tmp_path, {"latents": latents})
    assert ours["picture"].min() < 0.1
    assert ours["picture"].max() > 0.9
    on_the_host = np.rint(ours["picture"] * 255).astype(np.uint8).transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(ours["pixels"], on_the_host)


def test_pixels_are_rounded_half_to_even(tmp_path):
    """In the graph as by numpy, at every middle between two bytes and on both sides of it."""

    class Decoder(nn.Module):
        dtype = torch.float32
        config = SimpleNamespace(scaling_factor=1.0, latent_channels=3)

        def decode(self, latents, return_dict):
            return (latents * 2 - 1,)

    middles = ((np.arange(256) + 0.5) / 255).astype(np.float32)
    values = np.stack([np.nextafter(middles, 0), middles, np.nextafter(middles, 2)])
    latents = np.broadcast_to(values.reshape(1, 1, 3, 256), (2, 3, 3, 256)).copy()
    latents[1, 0] = [[-5.0], [7.0], [0.5]]
    export = vae_decoder_export(Decoder(), latent_size=(3, 256), scale_factor=1, fixed_size=False)
    module = write_module(export, tmp_path)
    ours = run_reference(module, tmp_path, {"latents": latents})
    on_the_host = np.rint(ours["picture"] * np.float32(255)).astype(np.uint8)
    np.testing.assert_array_equal(ours["pixels"], on_the_host.transpose(0, 2, 3, 1))
    assert len(np.unique(ours["pixels"])) == 256
    assert ours["pixels"][1, :, 0, 0].tolist() == [0, 255, 128]


def test_group_norms_are_float32_in_the_graph(half_unet):
    _, folder, spec = half_unet
    model = shape_inference.infer_shapes(onnx.load(folder / spec.files[0].path))
    types = {v.name: v.type.tensor_type.elem_type for v in model.graph.value_info}
    norms = [
        n for n in model.graph.node if n.op_type in ("InstanceNormalization", "GroupNormalization")
    ]
    assert len(norms) > 10
    assert {types[n.input[0]] for n in norms} == {TensorProto.FLOAT}
    # The spec of LayerNormalization itself asks for float32 statistics with this attribute.
    for node in model.graph.node:
        if node.op_type == "LayerNormalization":
            stash = [a.i for a in node.attribute if a.name == "stash_type"]
            assert stash in ([1], [])  # 1 is the default


def test_bf16_graph_is_valid_onnx(half_unet):
    dtype, folder, spec = half_unet
    if dtype != torch.bfloat16:
        pytest.skip("the other precision")
    model = onnx.load(folder / spec.files[0].path)
    onnx.checker.check_model(model, full_check=True)
    opset = model.opset_import[0].version
    assert opset == onnx.defs.get_schema("Conv", opset).since_version == 22


def test_bf16_build_on_the_cpu_says_what_to_do(half_unet):
    dtype, folder, spec = half_unet
    if dtype != torch.bfloat16:
        pytest.skip("the other precision")
    with pytest.raises(BuildFailed) as caught:
        EngineCache().open(spec, folder, builder_for("onnxruntime"), lambda line: None)
    assert "bf16" in caught.value.hint
    assert "--precision fp16" in caught.value.hint


def test_fp16_is_close_to_float64(half_unet, tiny):
    """ONNX Runtime's CPU computes parts of a float16 graph in float32, so a GPU may be further."""
    dtype, folder, spec = half_unet
    if dtype != torch.float16:
        pytest.skip("the other precision")
    inputs = random_inputs(TorchUNet(adapted_unet(tiny)).spec, 3)
    inputs[contract.MANIPULATION][:] = [1, 1.5, 1.3, 0.65, 5, 0.7, 1, 10]
    exact = UNetModule(nn.Module.to(adapted_unet(tiny), torch.float64)).eval()
    with torch.no_grad():
        expected = exact(**{n: torch.from_numpy(a) for n, a in inputs.items()}).numpy()
    session = onnxruntime.InferenceSession(
        str(folder / spec.files[0].path), providers=["CPUExecutionProvider"]
    )
    ours = session.run(None, {t.name: inputs[t.name].astype(t.dtype) for t in spec.inputs})[0]
    assert np.linalg.norm(ours - expected) / np.linalg.norm(expected) < 3e-3


def test_group_norm_of_large_values_does_not_overflow():
    norm = nn.GroupNorm(2, 4)
    holder = nn.Sequential(norm).half()
    keep_group_norms_in_float32(holder)
    assert type(holder[0]) is Float32GroupNorm
    x = (torch.randn(2, 4, 32, 32) * 2000).half()
    expected = nn.functional.group_norm(x.double(), 2)
    torch.testing.assert_close(holder[0](x).double(), expected, atol=2e-3, rtol=2e-3)
    assert holder[0](x).dtype == torch.float16
    assert list(holder.state_dict()) == ["0.weight", "0.bias"]


def test_float32_modules_keep_their_norms():
    holder = nn.Sequential(nn.GroupNorm(2, 4))
    keep_group_norms_in_float32(holder)
    assert type(holder[0]) is nn.GroupNorm


def test_precisions_have_their_types(tiny_entry):
    assert compute_dtype("fp8") == compute_dtype("int8") == torch.float16
    assert stored_type("bf16") == "bf16"
    assert ExportOptions(tiny_entry, weight_storage="fp16").stored == "fp16"
    for precision in ("fp16", "bf16"):
        with pytest.raises(InvalidRequest, match="cannot store"):
            ExportOptions(
                tiny_entry,
                precision=precision,
                weight_storage="fp32" if precision == "fp16" else "fp16",
            )
