"""PuLID's id encoders, vision tower and attention against float64, and files that are not it."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fastface_trt.errors import WeightsError
from fastface_trt.export.adapters import attach_adapter, load_projection, read_adapter
from fastface_trt.export.attention import DecoupledAttentionProcessor
from fastface_trt.export.face_modules import load_eva_tower
from tests.export import pulid_reference as reference
from tests.export.reference import decoupled_attention as manipulated
from tests.export.test_attention import SETTINGS, row
from tests.helpers.tiny_pulid import (
    EMBEDDING,
    HEAD_SIZE,
    SIZE,
    WIDTH,
    eva_tensors,
    pulid_tensors,
    tiny_id_encoder,
    tiny_id_former,
    write_tiny_pulid,
)
from tests.helpers.tiny_sdxl import tiny_unet


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_tiny_pulid(tmp_path_factory.mktemp("pulid"))


def numpy_state(tensors, prefix):
    return {
        key.removeprefix(prefix): tensor.double().numpy()
        for key, tensor in tensors.items()
        if key.startswith(prefix)
    }


def face_inputs(seed=0, rows=2):
    rng = np.random.default_rng(seed)
    return (
        rng.standard_normal((rows, 512)) * 0.9,
        rng.standard_normal((rows, EMBEDDING)),
        rng.standard_normal((rows, 5, 17, WIDTH)),
    )


@pytest.mark.parametrize(
    ("name", "make", "expected"),
    [
        ("pulid.safetensors", tiny_id_former, reference.id_former),
        ("pulid_v1.bin", tiny_id_encoder, reference.id_encoder),
    ],
)
@pytest.mark.parametrize("zero_tokens", [0, 3])
def test_id_encoders_equal_the_reference(files, name, make, expected, zero_tokens):
    adapter = read_adapter(files / name)
    assert adapter.kind == "pulid"
    projection = load_projection(adapter, zero_tokens).double()
    state = numpy_state(pulid_tensors(make()), "id_adapter.")
    inputs = face_inputs()
    with torch.no_grad():
        ours = projection(*(torch.from_numpy(x) for x in inputs)).numpy()
    assert ours.shape[1] == projection.tokens
    for one, *arguments in zip(ours, *inputs, strict=True):
        np.testing.assert_allclose(one, expected(state, *arguments, zero_tokens), atol=1e-12)


def test_the_demonstrations_zero_tokens_are_the_default(files):
    assert load_projection(read_adapter(files / "pulid.safetensors")).zero_tokens == 20
    assert load_projection(read_adapter(files / "pulid_v1.bin")).zero_tokens == 8


def test_tower_equals_the_reference(files):
    tower = load_eva_tower(files / "eva.pt", torch.float64)
    pixels = np.random.default_rng(1).standard_normal((2, 3, SIZE, SIZE))
    with torch.no_grad():
        embeds, hidden = tower(torch.from_numpy(pixels))
    state = numpy_state(eva_tensors(), "visual.")
    for i in range(2):
        expected, levels = reference.eva_tower(state, pixels[i], HEAD_SIZE)
        np.testing.assert_allclose(hidden[i], levels, rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(embeds[i] / np.linalg.norm(embeds[i]), expected, atol=1e-10)


def attention_block(orthogonal, dtype=torch.float64, seed=0):
    from diffusers.models.attention_processor import Attention

    torch.manual_seed(seed)
    attn = Attention(16, cross_attention_dim=12, heads=2, dim_head=8, bias=False).to(dtype)
    processor = DecoupledAttentionProcessor("down", 16, 12, orthogonal).to(dtype)
    return attn, processor


@pytest.mark.parametrize("orthogonal", ["v1", "v2"])
@pytest.mark.parametrize("settings", SETTINGS[:5])
def test_orthogonal_attention_equals_the_reference(orthogonal, settings):
    attn, processor = attention_block(orthogonal)
    x, text, image = (
        torch.randn(3, length, width, dtype=torch.float64) * 2
        for length, width in ((30, 16), (7, 12), (9, 12))
    )
    parameters = torch.tensor([[row(**settings)] * 3], dtype=torch.float64)
    scale = torch.full((1, 3), 0.8, dtype=torch.float64)
    with torch.no_grad():
        ours = processor(
            attn,
            x,
            text,
            image_tokens=image,
            ip_adapter_scale=scale,
            attention_manipulation=parameters,
        ).numpy()
    weight = {
        name: parameter.detach().numpy()
        for name, parameter in (*attn.named_parameters(), *processor.named_parameters())
    }
    q = reference.heads(x.numpy() @ weight["to_q.weight"].T, 8)
    k, v = (reference.heads(text.numpy() @ weight[f"to_{n}.weight"].T, 8) for n in "kv")
    k_ip, v_ip = (reference.heads(image.numpy() @ weight[f"to_{n}_ip.weight"].T, 8) for n in "kv")
    of_text = reference.attend(q, k, v)
    of_image = manipulated(q, k_ip, v_ip, **settings)
    for branch in range(3):
        added = reference.orthogonal(
            of_image[branch], of_text[branch], q[branch], k_ip[branch], orthogonal, 0.8
        )
        hidden = reference.merge(of_text[branch]) + added
        expected = hidden @ weight["to_out.0.weight"].T + weight["to_out.0.bias"]
        np.testing.assert_allclose(ours[branch], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_text_of_zeros_leaves_the_face_alone(dtype):
    """SDXL's empty prompt is zeros: its attention is zero, and nothing can be along it."""
    attn, processor = attention_block("v2", dtype)
    plain = DecoupledAttentionProcessor("down", 16, 12).to(dtype)
    plain.load_state_dict(processor.state_dict())
    arguments = {
        "image_tokens": torch.randn(1, 9, 12, dtype=dtype),
        "ip_adapter_scale": torch.ones(1, 3),
        "attention_manipulation": torch.tensor([[row()] * 3]),
    }
    x, nothing = torch.randn(1, 30, 16, dtype=dtype), torch.zeros(1, 7, 12, dtype=dtype)
    with torch.no_grad():
        freed = processor(attn, x, nothing, **arguments)
        torch.testing.assert_close(freed, plain(attn, x, nothing, **arguments))


def misfit(tensors, what):
    first = next(k for k in tensors if k.endswith("id_to_k.weight"))
    if what == "missing layer":
        del tensors[first]
    elif what == "shape":
        tensors[first] = torch.zeros(3, 3)
    elif what == "extra layer":
        tensors["id_adapter_attn_layers.99.id_to_k.weight"] = torch.zeros(3, 3)
    elif what == "missing level":
        tensors = {k: v for k, v in tensors.items() if "mapping_3" not in k}
    elif what == "flux":
        tensors = {
            f"pulid_encoder.{k.removeprefix('id_adapter.')}": v
            for k, v in tensors.items()
            if k.startswith("id_adapter.")
        }
        tensors["pulid_ca.0.to_q.weight"] = torch.zeros(3, 3)
    return tensors


@pytest.mark.parametrize("what", ["missing layer", "shape", "extra layer", "missing level", "flux"])
@pytest.mark.parametrize("make", [tiny_id_former, tiny_id_encoder])
def test_misfits_are_explained(tmp_path, what, make):
    save_file(misfit(pulid_tensors(make()), what), tmp_path / "a.safetensors")

    def load():
        adapter = read_adapter(tmp_path / "a.safetensors")
        load_projection(adapter)
        attach_adapter(tiny_unet(), adapter, lora_scale=1.0)

    with pytest.raises(WeightsError) as caught:
        load()
    assert caught.value.hint


@pytest.mark.parametrize("what", ["text only", "shallow", "other model"])
def test_other_towers_are_explained(tmp_path, what):
    tensors = eva_tensors(depth=12 if what == "shallow" else 21)
    if what == "text only":
        tensors = {k: v for k, v in tensors.items() if not k.startswith("visual.")}
    elif what == "other model":
        tensors = {k.replace("ffn_ln", "norm"): v for k, v in tensors.items()}
    torch.save(tensors, tmp_path / "eva.pt")
    with pytest.raises(WeightsError, match=r"eva\.pt"):
        load_eva_tower(tmp_path / "eva.pt", torch.float32)


def test_full_size_random_models_have_the_published_sizes():
    """The published files' sizes in bytes, and timm's number for the tower."""
    from accelerate import init_empty_weights
    from diffusers import UNet2DConditionModel

    from fastface_trt.export.adapters import FaceIdProjection, IDFormer
    from fastface_trt.export.attention import attach_processors
    from fastface_trt.export.face_modules import EvaVisionTower
    from fastface_trt.export.full_size import UNET_CONFIG

    with init_empty_weights(include_buffers=False):
        unet = UNet2DConditionModel(**UNET_CONFIG)
        attach_processors(unet, "v2")
        encoder, tower, faceid = IDFormer(zero_tokens=20), EvaVisionTower(), FaceIdProjection()
    attention = sum(
        parameter.numel()
        for processor in unet.attn_processors.values()
        for parameter in getattr(processor, "parameters", list)()
    )
    rank = 128
    lora = sum(
        rank * sum(attention.get_submodule(target).weight.shape)
        for attention in (
            unet.get_submodule(name.removesuffix(".processor")) for name in unet.attn_processors
        )
        for target in ("to_q", "to_k", "to_v", "to_out.0")
    )
    stored = attention + lora + sum(p.numel() for p in faceid.parameters())
    # ip-adapter-faceid_sdxl.bin has 1071149741 bytes: fp16 weights, and names for each.
    assert 0 < 1_071_149_741 - 2 * stored < 1_000_000
    stored = attention + sum(p.numel() for p in encoder.parameters())
    # pulid_v1.1.safetensors has 984405232 bytes: fp16 weights and a header.
    assert 0 < 984_405_232 - 2 * stored < 200_000
    assert encoder.tokens == 52
    assert round(sum(p.numel() for p in tower.parameters()) / 1e6, 1) == 304.4
