"""The CUDA form computes what the export computes: every rewrite, with and without image tokens.

Not run on a GPU: operators that only the CUDA provider has are spelled out in plain ONNX.
"""

import json
from collections import Counter

import numpy as np
import onnx
import pytest

from fastface_trt.engines.contract import KERNEL_DOMAIN
from fastface_trt.engines.onnx.forms import cuda_form
from fastface_trt.export.probe import TOLERANCES
from fastface_trt.mini.folders import EXPORT
from tests.conftest import GOLDEN
from tests.engines.onnx.spelled_out import inputs_for, relative_error, session, spelled_out

TOKENS = 4
REQUESTS = [(("off",), 1), (("scale_power",), 3), (("scale_power", "softmask", "off"), 2)]
FP32 = 1e-5


WIDE_UNET = {
    "sample_size": 8,
    "block_out_channels": (320, 320),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 32,
    "attention_head_dim": (5, 5),
    "transformer_layers_per_block": (1, 1),
    "cross_attention_dim": 40,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 24 + 6 * 8,
}


def randomize(module):
    """Every bias and norm is different from what it is made as, so that none can be left out."""
    import torch

    generator = torch.Generator().manual_seed(5)
    for name, weight in module.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim == 1:
            weight.data = 0.3 * noise + (1.0 if name.endswith("weight") else 0.0)
        else:
            weight.data = noise / weight[0].numel() ** 0.5


@pytest.fixture(
    scope="module", params=["fp32", pytest.param("fp16", marks=pytest.mark.engines)], ids=str
)
def wide_unet(request, tmp_path_factory):
    """Precision and graph of a UNet with widths that the kernels are compiled for."""
    import torch
    from diffusers import UNet2DConditionModel

    from fastface_trt.export.attention import attach_processors
    from fastface_trt.export.modules import unet_export
    from fastface_trt.export.onnx_writer import write_module

    unet = UNet2DConditionModel(**WIDE_UNET)
    attach_processors(unet)
    randomize(unet)
    unet.to(torch.float32 if request.param == "fp32" else torch.float16)
    folder = tmp_path_factory.mktemp(request.param)
    export = unet_export(unet, tokens=4, latent_size=(8, 8), fixed_size=False)
    return request.param, folder / write_module(export, folder).files[0].path


@pytest.fixture(scope="module")
def wide_vae(tmp_path_factory):
    """The graph of a VAE decoder with an attention of one head of 512."""
    from diffusers import AutoencoderKL

    from fastface_trt.export.modules import vae_decoder_export
    from fastface_trt.export.onnx_writer import write_module

    vae = AutoencoderKL(
        block_out_channels=(64, 512),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=32,
        latent_channels=4,
    )
    randomize(vae)
    folder = tmp_path_factory.mktemp("vae")
    export = vae_decoder_export(vae, latent_size=(4, 6), scale_factor=2, fixed_size=False)
    return folder / write_module(export, folder).files[0].path


@pytest.fixture(scope="module")
def golden_unet(tmp_path_factory):
    """The golden UNet's graph and its size."""
    from fastface_trt.export.adapters import attach_adapter, read_adapter
    from fastface_trt.export.modules import unet_export
    from fastface_trt.export.onnx_writer import write_module
    from fastface_trt.export.sources import load_unet_folder

    model = GOLDEN / "pipeline" / "model"
    adapter = read_adapter(next(model.glob("*.safetensors")))
    unet = load_unet_folder(model / "unet")
    attach_adapter(unet, adapter, lora_scale=1.0)
    size = json.loads((model / "unet" / "config.json").read_text())["sample_size"]
    folder = tmp_path_factory.mktemp("golden")
    export = unet_export(unet, tokens=adapter.tokens, latent_size=(size, size), fixed_size=False)
    return folder / write_module(export, folder).files[0].path, size


def check_unet(path, form, tolerance, size, requests=REQUESTS):
    """A form against the export, both without ONNX Runtime's own optimisations."""
    functions = onnx.load(path, load_external_data=False).functions
    uses_kernels = KERNEL_DOMAIN.encode() in form.model
    exported = session(path.read_bytes(), path.parent)
    model = spelled_out(form.model, functions if uses_kernels else ())
    rewritten = session(model, path.parent)
    for kinds, branches in requests:
        feed = inputs_for(exported, kinds, branches, size)
        error = relative_error(rewritten.run(None, feed)[0], exported.run(None, feed)[0])
        assert error < tolerance, (kinds, error)


def nodes_of(form):
    """Node types of a form's main graph, and their number."""
    return Counter(node.op_type for node in onnx.load_from_string(form.model).graph.node)


@pytest.mark.parametrize("manipulation", ["operator", "branches"])
def test_the_mini_unet(manipulation):
    path = EXPORT / "unet" / "model.onnx"
    form = cuda_form(path, TOKENS, manipulation)
    had = Counter(node.op_type for node in onnx.load(path).graph.node)
    has = nodes_of(form)
    assert form.counts["attention"] == has["MultiHeadAttention"] == had["Softmax"]
    assert form.counts["decoupled_attention"] == had["DecoupledAttention"]
    assert form.counts["group_norm"] == has["GroupNorm"] == had["InstanceNormalization"]
    assert form.counts["convolution"] == has["NhwcConv"] == had["Conv"]
    assert form.counts["skip_layer_norm"] == has["SkipLayerNormalization"] == 14
    # Its widths are not those that these kernels are compiled for.
    assert form.counts["split_gelu"] == form.counts["bias_add"] == 0
    check_unet(path, form, FP32, (24, 32))


def test_the_mini_vae_keeps_the_norms_that_the_kernel_refuses():
    path = EXPORT / "vae_decoder" / "model.onnx"
    form = cuda_form(path, None, "operator")
    assert nodes_of(form)["InstanceNormalization"] == 4  # groups of three channels
    assert form.counts["group_norm"] == 13
    check_vae(path, form, (8, 6))


def check_vae(path, form, size):
    feed = {"latents": np.random.default_rng(3).standard_normal((2, 4, *size)).astype(np.float32)}
    exported, rewritten = session(path.read_bytes()), session(spelled_out(form.model))
    assert relative_error(rewritten.run(None, feed)[0], exported.run(None, feed)[0]) < FP32


@pytest.mark.engines  # its export is the slow part
@pytest.mark.parametrize("manipulation", ["operator", "branches"])
def test_the_golden_unet(golden_unet, manipulation):
    path, size = golden_unet
    form = cuda_form(path, TOKENS, manipulation)
    assert form.counts["decoupled_attention"] > 0
    check_unet(path, form, FP32, (size, size))


@pytest.mark.parametrize("manipulation", ["operator", "branches"])
def test_a_unet_as_wide_as_the_kernels_want(wide_unet, manipulation):
    precision, path = wide_unet
    form = cuda_form(path, TOKENS, manipulation)
    had = Counter(node.op_type for node in onnx.load(path).graph.node)
    blocks = had["Gelu"]
    assert form.counts == {
        "attention": 2 * blocks,
        "decoupled_attention": blocks,
        "group_norm": had["InstanceNormalization"],
        "convolution": had["Conv"],
        "split_gelu": blocks,
        "skip_layer_norm": 2 * blocks,
        "bias_add": 2 * blocks,
    }
    has = nodes_of(form)
    assert has["InstanceNormalization"] == has["Conv"] == has["Gelu"] == has["Softmax"] == 0
    assert transposes(form) == (1, 1)
    check_unet(path, form, FP32 if precision == "fp32" else TOLERANCES["fp16"], (8, 8))


def transposes(form):
    """Transposes of the graph's inputs (through casts), and of its outputs; there are no others.

    Those of weights do not count: ONNX Runtime folds them.
    """
    model = onnx.load_from_string(form.model)
    made = {name: node for node in model.graph.node for name in node.output}
    weights = {one.name for one in model.graph.initializer}
    inputs, outputs = (
        {one.name for one in side} for side in (model.graph.input, model.graph.output)
    )

    def origin(name):
        node = made.get(name)
        return origin(node.input[0]) if node and node.op_type in ("Cast", "Div") else name

    found = [node for node in model.graph.node if node.op_type == "Transpose"]
    found = [node for node in found if origin(node.input[0]) not in weights]
    entering = [node for node in found if origin(node.input[0]) in inputs]
    leaving = [node for node in found if node.output[0] in outputs]
    left = [node for node in found if node not in entering and node not in leaving]
    assert not left, left
    return len(entering), len(leaving)


def test_a_vae_as_wide_as_the_real_one(wide_vae):
    """A head of 512 is beyond the kernels without a map: two products, still no transpose."""
    form = cuda_form(wide_vae, None, "operator")
    has = nodes_of(form)
    assert form.counts["attention"] == has["FusedMatMul"] == has["Softmax"] == 1
    assert has["InstanceNormalization"] == has["Conv"] == 0
    assert transposes(form) == (1, 1)
    check_vae(wide_vae, form, (6, 4))


def test_a_tensor_that_is_an_output_keeps_what_makes_it(tmp_path):
    """`verify --layers` makes inner tensors outputs: all of them must still be there."""
    model = onnx.load(EXPORT / "unet" / "model.onnx")
    kinds = ("Softmax", "InstanceNormalization", "Sigmoid", "LayerNormalization", "Split", "Gelu")
    shown = [next(n for n in model.graph.node if n.op_type == kind).output[0] for kind in kinds]
    for name in shown:
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, 1, None))
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    form = cuda_form(path, TOKENS, "operator")
    exported = session(path.read_bytes())
    rewritten = session(spelled_out(form.model, model.functions))
    feed = inputs_for(exported, ("scale_power",), 2)
    for name, one, other in zip(
        ["noise", *shown], rewritten.run(None, feed), exported.run(None, feed), strict=True
    ):
        assert relative_error(one, other) < FP32, name


def test_what_has_nothing_to_rewrite_has_no_form():
    assert cuda_form(EXPORT / "guidance_step" / "model.onnx", None, "operator") is None
