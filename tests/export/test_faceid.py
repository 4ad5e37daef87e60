"""FaceID without a picture: its file, its projection, its export, and whole pictures with it.

Shape legend: B rows, T image tokens, C text width, E face-embedding size.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fastface_trt import FastFace
from fastface_trt.checkpoints import ADAPTERS, HubItem
from fastface_trt.engines import contract
from fastface_trt.engines.manifest import ExportManifest
from fastface_trt.errors import InvalidRequest, WeightsError
from fastface_trt.export.adapters import attach_adapter, load_projection, read_adapter
from fastface_trt.export.exporter import run_export
from fastface_trt.export.locations import parse_adapter
from fastface_trt.export.options import ExportOptions
from fastface_trt.export.oracle import TorchUNet
from tests.export.test_exporter import open_module, quiet, unet_inputs
from tests.helpers import face_models
from tests.helpers.tiny_sdxl import adapter_tensors, tiny_faceid_projection, tiny_unet

TOKENS = 4


@pytest.fixture(scope="module")
def adapter_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("faceid") / "faceid.safetensors"
    save_file(adapter_tensors(tiny_unet(), projection=tiny_faceid_projection(3)), path)
    return path


@pytest.fixture(scope="module")
def exported(tiny_entry, adapter_file, export_with_shared_modules, tmp_path_factory):
    """An export whose UNet is that of the tiny export: the two adapters differ in image_proj."""
    folder = tmp_path_factory.mktemp("export") / "faceid"
    entry = replace(tiny_entry, adapter=HubItem(str(adapter_file)))
    return folder, export_with_shared_modules(ExportOptions(entry), folder)


def reference_tokens_BTC(state, embeddings_BE):
    """norm(W₂ gelu(W₁ e)) in float64, written from the file's keys."""
    state = {k: v.double().numpy() for k, v in state.items()}
    from math import erf

    gelu = np.vectorize(lambda x: 0.5 * x * (1 + erf(x / 2**0.5)))
    hidden = gelu(embeddings_BE @ state["proj.0.weight"].T + state["proj.0.bias"])
    flat = hidden @ state["proj.2.weight"].T + state["proj.2.bias"]
    x_BTC = flat.reshape(len(flat), TOKENS, -1)
    centred = x_BTC - x_BTC.mean(-1, keepdims=True)
    unit = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return unit * state["norm.weight"] + state["norm.bias"]


def test_projection_of_the_export_equals_the_reference(exported, adapter_file):
    folder, manifest = exported
    state = {
        key.removeprefix("image_proj."): tensor
        for key, tensor in load_file(adapter_file).items()
        if key.startswith("image_proj.")
    }
    embeddings = np.random.default_rng(0).standard_normal((3, 512))
    with open_module(folder, manifest.modules["face_projection"]) as engine:
        ours = engine(face_embeds=embeddings.astype(np.float32))["image_tokens"]
    np.testing.assert_allclose(ours, reference_tokens_BTC(state, embeddings), atol=2e-5)


def test_projection_equals_diffusers(adapter_file):
    from diffusers import UNet2DConditionModel

    adapter = read_adapter(adapter_file)
    assert adapter.kind == "faceid"
    state = {k: v.clone() for k, v in adapter.image_proj.items()}
    converted = UNet2DConditionModel._convert_ip_adapter_image_proj_to_diffusers(tiny_unet(), state)
    faces = torch.randn(2, 512)
    with torch.no_grad():
        torch.testing.assert_close(load_projection(adapter)(faces), converted(faces))


def test_unet_equals_the_oracle_with_every_manipulation(exported, adapter_file):
    folder, manifest = exported
    unet = tiny_unet()
    attach_adapter(unet, read_adapter(adapter_file), lora_scale=1.0)
    oracle = TorchUNet(unet)
    inputs = unet_inputs(oracle.spec, requests=3, branches=2, height=8, width=16)
    with open_module(folder, manifest.modules["unet"]) as engine:
        ours = engine(**inputs)[contract.NOISE_PREDICTION]
    expected = oracle(**inputs)[contract.NOISE_PREDICTION]
    assert np.linalg.norm(ours - expected) / np.linalg.norm(expected) < 1e-4


def test_manifest_says_the_kind_and_has_no_image_encoder(exported):
    _, manifest = exported
    assert manifest.adapter_kind == "faceid"
    assert manifest.image_token_count == TOKENS
    assert "image_encoder" not in manifest.modules
    assert manifest.image_encoder_size is None
    assert {"adapter", "checkpoint"} == {source.role for source in manifest.sources}
    older = manifest.model_dump(mode="json")
    del older["adapter_kind"]
    assert ExportManifest.model_validate(older).adapter_kind == "faceid-plus-v2"


def face(*, at=(160, 160), colour=30):
    canvas = np.full((320, 320, 3), colour, np.uint8)
    face_models.draw(canvas, at, 24, half=60)
    return canvas


def test_pictures_follow_the_face_and_repeat(exported):
    with FastFace.load(exported[0]) as fastface:
        fastface.warm_up()

        def pixels(picture, preset):
            (image,) = fastface("photo; person", picture, preset=preset, seed=2).images
            return np.asarray(image).astype(np.int16)

        first = pixels(face(), "am2+dcg")
        np.testing.assert_array_equal(first, pixels(face(), "am2+dcg"))
        assert np.abs(first - pixels(face(), "plain")).max() > 1
        # The same embedding in another picture is the same face: there is no picture in the way.
        analysed = fastface.analyze(face())
        other_crop = replace(analysed, crop_bgr=255 - analysed.crop_bgr)
        np.testing.assert_array_equal(first, pixels(other_crop, "am2+dcg"))
        turned = replace(analysed, embedding=-analysed.embedding)
        assert np.abs(first - pixels(turned, "am2+dcg")).max() > 1


def test_no_face_is_the_zero_embedding(exported, adapter_file):
    from fastface_trt.runtime.conditioning import Conditioner

    folder, _ = exported
    with FastFace.load(folder) as fastface:
        ours = Conditioner(fastface._modules).image_tokens(None)
    projection = load_projection(read_adapter(adapter_file))
    with torch.no_grad():
        np.testing.assert_allclose(ours, projection(torch.zeros(1, 512))[0], atol=1e-5)


def test_an_image_encoder_is_refused(tiny_entry, tiny, adapter_file, tmp_path):
    entry = replace(tiny_entry, adapter=HubItem(str(adapter_file)))
    options = ExportOptions(entry, image_encoder=HubItem(str(tiny / "image_encoder")))
    with pytest.raises(InvalidRequest, match="looks at no picture"):
        run_export(options, tmp_path / "out", quiet)
    assert not (tmp_path / "out").exists()


def test_other_ip_adapters_are_refused(adapter_file, tmp_path):
    tensors = load_file(adapter_file)
    # Plain IP-Adapter projects a CLIP embedding with one layer, its "full" variant has a fourth.
    for name in ("image_proj.norm.weight", "image_proj.norm.bias"):
        tensors[name.replace("norm", "proj.3")] = tensors.pop(name)
    save_file(tensors, tmp_path / "full.safetensors")
    with pytest.raises(WeightsError, match="neither"):
        read_adapter(tmp_path / "full.safetensors")


def test_names_of_published_adapters(tmp_path, monkeypatch):
    for name, item in ADAPTERS.items():
        assert parse_adapter(name) == item
        assert len(item.revision) == 40
    assert parse_adapter("owner/name/file.bin").path == "file.bin"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "faceid").write_bytes(b"")
    assert parse_adapter("faceid") == HubItem("faceid")
