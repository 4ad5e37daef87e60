"""PuLID exported and run: every module against PyTorch, whole requests against the oracle."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fastface_trt import FastFace
from fastface_trt.checkpoints import HubItem
from fastface_trt.engines import contract
from fastface_trt.errors import InvalidRequest, WeightsError
from fastface_trt.evaluation.attention import collect_attention
from fastface_trt.export.adapters import attach_adapter, load_projection, read_adapter
from fastface_trt.export.exporter import run_export
from fastface_trt.export.face_modules import EvaTowerModule, load_eva_tower
from fastface_trt.export.options import ExportOptions
from fastface_trt.export.oracle import TorchUNet
from fastface_trt.runtime.sampling import denoise
from tests.export.test_exporter import open_module, quiet, unet_inputs
from tests.helpers import face_models
from tests.helpers.tiny_pulid import QUERIES, write_tiny_pulid
from tests.helpers.tiny_sdxl import tiny_unet

pytestmark = pytest.mark.engines

ZERO_TOKENS = 3
TOKENS = QUERIES + ZERO_TOKENS


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A shallow tower whose levels are its first five: a deep one takes long to trace."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastface_trt.export.face_modules.LEVELS", (1, 2, 3, 4, 5))
        yield write_tiny_pulid(tmp_path_factory.mktemp("pulid"), depth=6)


def pulid_options(entry, files, **options):
    entry = replace(entry, adapter=HubItem(str(files / "pulid.safetensors")))
    return ExportOptions(entry, image_encoder=HubItem(str(files / "eva.pt")), **options)


@pytest.fixture(scope="module")
def exported(tiny_entry, files, export_with_shared_modules, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "pulid"
    options = pulid_options(tiny_entry, files, zero_tokens=ZERO_TOKENS)
    shared = ("text_encoder", "text_encoder_2", "vae_decoder")
    return folder, export_with_shared_modules(options, folder, shared)


@pytest.fixture(scope="module")
def oracle(files):
    unet = tiny_unet()
    adapter = read_adapter(files / "pulid.safetensors")
    attach_adapter(unet, adapter, lora_scale=1.0, orthogonal="v2")
    return TorchUNet(unet, TOKENS)


@pytest.fixture(scope="module")
def fastface(exported):
    with FastFace.load(exported[0]) as loaded:
        yield loaded


def relative(ours, expected):
    return np.linalg.norm(ours - expected) / np.linalg.norm(expected)


def test_face_modules_equal_pytorch(exported, files):
    folder, manifest = exported
    rng = np.random.default_rng(0)
    pixels = rng.standard_normal((3, 3, 32, 32)).astype(np.float32)
    faces = rng.standard_normal((3, 512)).astype(np.float32)
    tower = EvaTowerModule(load_eva_tower(files / "eva.pt", torch.float32))
    projection = load_projection(read_adapter(files / "pulid.safetensors"), ZERO_TOKENS)
    with torch.no_grad():
        embeds, hidden = tower(torch.from_numpy(pixels))
        tokens = projection(torch.from_numpy(faces), embeds, hidden).numpy()
    with open_module(folder, manifest.modules["image_encoder"]) as engine:
        features = engine(pixel_values=pixels)
    np.testing.assert_allclose(features["clip_embeds"], embeds, atol=1e-4)
    np.testing.assert_allclose(features["clip_hidden_states"], hidden, atol=5e-4)
    with open_module(folder, manifest.modules["face_projection"]) as engine:
        ours = engine(face_embeds=faces, **features)["image_tokens"]
    np.testing.assert_allclose(ours, tokens, atol=1e-3)
    assert not ours[:, QUERIES:].any()


@pytest.mark.parametrize(("requests", "branches"), [(1, 3), (3, 2)])
def test_unet_equals_the_oracle_with_every_manipulation(exported, oracle, requests, branches):
    folder, manifest = exported
    inputs = unet_inputs(oracle.spec, requests, branches, 8, 16, seed=requests)
    with open_module(folder, manifest.modules["unet"]) as engine:
        ours = engine(**inputs)[contract.NOISE_PREDICTION]
    assert relative(ours, oracle(**inputs)[contract.NOISE_PREDICTION]) < 1e-4


def test_manifest_says_what_was_exported(exported):
    _, manifest = exported
    assert manifest.adapter_kind == "pulid"
    assert (manifest.orthogonal, manifest.zero_tokens) == ("v2", ZERO_TOKENS)
    assert manifest.image_token_count == TOKENS
    assert manifest.loras == ()
    assert manifest.face_parser is None
    assert {"adapter", "image_encoder"} < {source.role for source in manifest.sources}


def face():
    canvas = np.random.default_rng(0).integers(20, 60, (320, 320, 3), dtype=np.uint8)
    face_models.draw(canvas, (160, 160), 24, half=60)
    return canvas


@pytest.mark.parametrize("preset", ["plain", "am1+dcg", "am2+dcg"])
def test_requests_equal_the_oracle(fastface, oracle, preset):
    """Empty negative prompts are zeros here, so the branches without text are among them."""
    request = fastface.request("photo; person", preset=preset, seed=1).for_adapter("pulid")
    stages = fastface.stages
    tokens = stages.image_tokens(fastface.analyze(face()))
    ours, expected = (
        denoise(unet, [stages.sample(request, tokens)], guidance=stages.guidance)[0]
        for unet in (fastface._modules["unet"], oracle)
    )
    assert relative(np.asarray(ours), np.asarray(expected)) < 2e-3


def test_tokens_are_of_the_portrait_and_the_long_embedding(fastface, files):
    analysed = fastface.analyze(face())
    assert analysed.portrait_bgr.shape == (512, 512, 3)
    longer = replace(analysed, embedding_norm=3 * analysed.embedding_norm)
    darker = replace(analysed, portrait_bgr=analysed.portrait_bgr // 2)
    other_crop = replace(analysed, crop_bgr=255 - analysed.crop_bgr)
    tokens = fastface.stages.image_tokens
    plain = tokens(analysed)
    assert relative(tokens(longer), plain) > 1e-3
    assert relative(tokens(darker), plain) > 1e-3
    np.testing.assert_array_equal(tokens(other_crop), plain)
    nothing = load_projection(read_adapter(files / "pulid.safetensors"), ZERO_TOKENS)
    with torch.no_grad():
        zeros = [torch.zeros(1, *s) for s in ((512,), (24,), (5, 17, 16))]
        np.testing.assert_allclose(tokens(None), nothing(*zeros)[0], atol=1e-4)


def test_a_picture_says_that_there_is_no_parser(fastface):
    result = fastface("photo; person", face(), preset="am2+dcg", seed=3)
    assert any("--face-parser" in line for line in result.warnings)
    assert result.parameters[0]["manipulation"]["down"]["invert_first_token"] is False


def test_attention_maps_are_of_an_export_with_any_adapter(exported):
    run = collect_attention(face(), "photo; person", export=exported[0], steps=[0])
    assert run.maps[0].before.shape[-1] == TOKENS


def test_a_face_of_another_adapter_is_refused(fastface):
    analysed = replace(fastface.analyze(face()), portrait_bgr=None)
    with pytest.raises(InvalidRequest, match="another adapter"):
        fastface("photo; person", analysed)


def test_a_face_parser_travels_with_the_export(
    tiny_entry, files, exported, fastface, export_with_shared_modules, tmp_path
):
    """The other modules are those of `exported`; the parser alone changes the tokens."""
    from tests.runtime.test_portrait import write_parser

    parser = write_parser(tmp_path / "parser.onnx")
    options = pulid_options(tiny_entry, files, zero_tokens=ZERO_TOKENS, face_parser=parser)
    out = tmp_path / "out"
    manifest = export_with_shared_modules(options, out, tuple(exported[1].modules), exported)
    assert (out / manifest.face_parser).read_bytes() == parser.read_bytes()
    assert manifest.face_parser in {f.path for f in manifest.files()}
    with FastFace.load(out) as parsing:
        result = parsing("photo; person", face(), seed=3)
        assert result.warnings == []
        tokens = parsing.stages.image_tokens(parsing.analyze(face()))
    plain = fastface.stages.image_tokens(fastface.analyze(face()))
    assert relative(tokens, plain) > 1e-3


def test_options_of_pulid_need_pulid(tiny_entry, files, tmp_path):
    for options in ({"zero_tokens": 3}, {"orthogonal": "v1"}):
        with pytest.raises(InvalidRequest, match="zero tokens"):
            run_export(ExportOptions(tiny_entry, **options), tmp_path / "out", quiet)
    with pytest.raises(InvalidRequest, match="parses no faces"):
        run_export(ExportOptions(tiny_entry, face_parser=files / "eva.pt"), tmp_path / "out", quiet)
    with pytest.raises(WeightsError, match="face parser"):
        run_export(
            pulid_options(tiny_entry, files, face_parser=tmp_path / "none.onnx"),
            tmp_path / "out",
            quiet,
        )
    with pytest.raises(InvalidRequest, match="zero tokens"):
        ExportOptions(tiny_entry, zero_tokens=-1)
    assert not (tmp_path / "out").exists()
