"""Whole exports of the tiny checkpoint: parity with PyTorch, manifests, and what goes wrong."""

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch

from fastface_trt.checkpoints import HubItem
from fastface_trt.engines import contract
from fastface_trt.engines.backends import builder_for
from fastface_trt.engines.cache import EngineCache
from fastface_trt.engines.files import verify_files
from fastface_trt.engines.manifest import EXPORT_MANIFEST, ExportManifest, read_manifest
from fastface_trt.errors import InvalidRequest, WeightsError
from fastface_trt.export.adapters import attach_adapter, read_adapter
from fastface_trt.export.exporter import run_export
from fastface_trt.export.modules import vae_decoder_export
from fastface_trt.export.onnx_writer import write_module
from fastface_trt.export.options import ExportOptions
from fastface_trt.export.oracle import TorchUNet
from tests.helpers.tiny_sdxl import tiny_unet


def quiet(line):
    pass


@pytest.fixture(scope="module")
def oracle(tiny):
    unet = tiny_unet()
    attach_adapter(unet, read_adapter(tiny / "adapter.safetensors"), lora_scale=1.0)
    return TorchUNet(unet)


def open_module(folder, spec):
    return EngineCache().open(spec, folder, builder_for("onnxruntime"), quiet)


def unet_inputs(spec, requests, branches, height, width, seed=0, text=154):
    rng = np.random.default_rng(seed)
    sizes = {"batch": requests * branches, "requests": requests, "height": height, "width": width}
    sizes["text"] = text
    inputs = {
        t.name: rng.standard_normal(
            [sizes[d] if isinstance(d, str) else d for d in t.shape]
        ).astype(t.dtype)
        for t in spec.inputs
    }
    inputs[contract.TIMESTEP][:] = rng.integers(0, 1000, requests * branches)
    inputs[contract.TIME_IDS][:] = 96
    rows = np.zeros((requests, 3, 8), dtype=np.float32)
    rows[..., 0] = np.arange(requests)[:, None] % 3
    rows[..., 1:] = [1.5, 1.3, 0.65, 5.0, 0.7, 1.0, 10.0]
    inputs[contract.MANIPULATION] = rows
    return inputs


@pytest.mark.parametrize(
    ("requests", "branches", "height", "width", "text"),
    [
        (1, 1, 16, 16, 77),
        (1, 3, 8, 24, 77),
        (2, 3, 16, 16, 154),
        (3, 2, 16, 8, 231),
        (3, 1, 12, 12, 77),
    ],
)
def test_unet_equals_pytorch_for_every_batch_and_size(
    tiny_export, oracle, requests, branches, height, width, text
):
    folder, manifest = tiny_export
    inputs = unet_inputs(oracle.spec, requests, branches, height, width, requests, text)
    with open_module(folder, manifest.modules["unet"]) as engine:
        ours = engine(**inputs)[contract.NOISE_PREDICTION]
    expected = oracle(**inputs)[contract.NOISE_PREDICTION]
    assert np.linalg.norm(ours - expected) / np.linalg.norm(expected) < 1e-4


def test_four_requests_in_a_batch_equal_four_single_runs(tiny_export, oracle):
    folder, manifest = tiny_export
    inputs = unet_inputs(oracle.spec, 4, 3, 16, 16)
    with open_module(folder, manifest.modules["unet"]) as engine:
        together = engine(**inputs)[contract.NOISE_PREDICTION]
        for request in range(4):
            one = {
                name: array[request : request + 1]
                if name in (contract.MANIPULATION, contract.IP_ADAPTER_SCALE)
                else array[3 * request : 3 * request + 3]
                for name, array in inputs.items()
            }
            single = engine(**one)[contract.NOISE_PREDICTION]
            difference = together[3 * request : 3 * request + 3] - single
            assert np.linalg.norm(difference) / np.linalg.norm(single) < 1e-4


def test_text_encoders_equal_transformers(tiny_export, tiny):
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    folder, manifest = tiny_export
    ids = np.full((2, 77), 49407, dtype=np.int64)
    ids[0, :4], ids[1, :6] = [49406, 5, 6, 7], [49406, 9, 8, 7, 6, 5]
    for name, cls in (
        ("text_encoder", CLIPTextModel),
        ("text_encoder_2", CLIPTextModelWithProjection),
    ):
        encoder = cls.from_pretrained(tiny / "checkpoint" / name).eval()
        with torch.no_grad():
            output = encoder(torch.from_numpy(ids), output_hidden_states=True)
        with open_module(folder, manifest.modules[name]) as engine:
            ours = engine(input_ids=ids)
        np.testing.assert_allclose(ours["hidden_states"], output.hidden_states[-2], atol=1e-4)
        if name == "text_encoder_2":
            np.testing.assert_allclose(ours["text_embeds"], output.text_embeds, atol=1e-4)


def test_image_side_and_vae_equal_pytorch(tiny_export, tiny):
    from diffusers import AutoencoderKL
    from transformers import CLIPVisionModelWithProjection

    from fastface_trt.export.adapters import load_projection

    folder, manifest = tiny_export
    rng = np.random.default_rng(0)
    pixels = rng.standard_normal((2, 3, 32, 32)).astype(np.float32)
    encoder = CLIPVisionModelWithProjection.from_pretrained(tiny / "image_encoder").eval()
    projection = load_projection(read_adapter(tiny / "adapter.safetensors"))
    vae = AutoencoderKL.from_pretrained(tiny / "checkpoint" / "vae").eval()
    faces = rng.standard_normal((2, 512)).astype(np.float32)
    latents = rng.standard_normal((2, 4, 16, 8)).astype(np.float32)
    with torch.no_grad():
        hidden = encoder(torch.from_numpy(pixels), output_hidden_states=True).hidden_states[-2]
        tokens = projection(torch.from_numpy(faces), hidden)
        decoded = vae.decode(torch.from_numpy(latents) / vae.config.scaling_factor).sample
    with open_module(folder, manifest.modules["image_encoder"]) as engine:
        ours = engine(pixel_values=pixels)["clip_embeds"]
    np.testing.assert_allclose(ours, hidden, atol=1e-4)
    with open_module(folder, manifest.modules["face_projection"]) as engine:
        ours = engine(face_embeds=faces, clip_embeds=hidden.numpy())["image_tokens"]
    np.testing.assert_allclose(ours, tokens, atol=1e-4)
    with open_module(folder, manifest.modules["vae_decoder"]) as engine:
        ours = engine(latents=latents)
    np.testing.assert_allclose(ours["picture"], (decoded / 2 + 0.5).clamp(0, 1), atol=1e-4)
    on_the_host = np.rint(ours["picture"] * 255).astype(np.uint8).transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(ours["pixels"], on_the_host)


def test_manifest_describes_the_folder(tiny_export):
    folder, manifest = tiny_export
    assert read_manifest(folder / EXPORT_MANIFEST, ExportManifest) == manifest
    verify_files(folder, manifest.files())
    on_disk = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert on_disk == {f.path for f in manifest.files()} | {EXPORT_MANIFEST}
    assert {s.role for s in manifest.sources} >= {"checkpoint", "adapter", "image_encoder"}
    assert [(lora.role, lora.scale) for lora in manifest.loras] == [("faceid", 1.0)]
    assert manifest.vae_scale_factor == 2
    for module in manifest.modules.values():
        graph = onnx.load(folder / module.files[0].path).graph
        for values, specs in ((graph.input, module.inputs), (graph.output, module.outputs)):
            assert [v.name for v in values] == [s.name for s in specs]
            for value, spec in zip(values, specs, strict=True):
                dims = value.type.tensor_type.shape.dim
                assert tuple(d.dim_param or d.dim_value for d in dims) == spec.shape


def test_manipulation_is_one_node_per_decoupled_block(tiny_export):
    folder, manifest = tiny_export
    model = onnx.load(folder / manifest.modules["unet"].files[0].path)
    nodes = [n for n in model.graph.node if n.op_type == contract.FUNCTION_NAME]
    blocks = [n for n in tiny_unet().attn_processors if n.endswith("attn2.processor")]
    assert len(nodes) == len(blocks)
    assert {f.name for f in model.functions} >= {"DecoupledAttention", "Quantile", "Softmask"}


def test_no_path_of_the_exporting_machine_is_in_the_files(tiny_export):
    folder, manifest = tiny_export
    for module in manifest.modules.values():
        content = (folder / module.files[0].path).read_bytes()
        assert b"site-packages" not in content
        assert str(folder.parent).encode() not in content


def test_fp16_storage_halves_files_and_keeps_float32(tiny, tmp_path):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(tiny / "checkpoint" / "vae").eval()
    export = vae_decoder_export(vae, latent_size=(8, 8), scale_factor=2, fixed_size=False)
    full = write_module(export, tmp_path / "full")
    stored = write_module(export, tmp_path / "stored", fp16_storage=True)
    assert stored.inputs == full.inputs
    weights = sum(p.numel() for p in vae.decoder.parameters() if p.numel() >= 256)
    assert full.files[0].bytes - stored.files[0].bytes > 1.5 * weights
    latents = np.random.default_rng(0).standard_normal((1, 4, 8, 8)).astype(np.float32)
    with open_module(tmp_path / "full", full) as a, open_module(tmp_path / "stored", stored) as b:
        difference = np.abs(a(latents=latents)["picture"] - b(latents=latents)["picture"])
    assert difference.max() < 5e-3


def test_fp16_unet_passes_the_tensorrt_parser(tiny_fp16_unet):
    """The trap: a Concat of fp16 text and fp32 time embedding that ONNX's checker lets through."""
    trt = pytest.importorskip("tensorrt_rtx")
    folder, spec = tiny_fp16_unet
    assert spec.dtype_of(contract.SAMPLE) == spec.dtype_of(contract.NOISE_PREDICTION) == "float32"
    assert spec.dtype_of(contract.TEXT) == spec.dtype_of(contract.IMAGE_TOKENS) == "float16"
    logger = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(logger).create_network(0)
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse_from_file(str(folder / spec.files[0].path))
    assert parsed, [str(parser.get_error(i)) for i in range(parser.num_errors)]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("unet/config.json", "unet"),
        ("text_encoder/model.safetensors", "text_encoder"),
        ("tokenizer_2", "tokenizer_2"),
    ],
)
def test_damaged_checkpoints_are_explained(tiny, tiny_entry, tmp_path, damage, message):
    import shutil

    copy = tmp_path / "checkpoint"
    shutil.copytree(tiny / "checkpoint", copy)
    victim = copy / damage
    if victim.is_dir():
        shutil.rmtree(victim)
    else:
        victim.write_bytes(victim.read_bytes()[:50])
    entry = replace(tiny_entry, base=HubItem(str(copy)))
    monkey = pytest.MonkeyPatch()
    monkey.setattr("fastface_trt.export.exporter._write", lambda name, make, *rest: make())
    with monkey.context(), pytest.raises(WeightsError, match=message):
        run_export(ExportOptions(entry), tmp_path / "out", quiet)
    monkey.undo()
    assert not (tmp_path / "out").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


def test_absent_checkpoint_is_explained(tiny_entry, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for location in (str(tmp_path / "nowhere"), "nobody/nothing"):
        entry = replace(tiny_entry, base=HubItem(location))
        with pytest.raises(WeightsError) as caught:
            run_export(ExportOptions(entry), tmp_path / "out", quiet)
        assert caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_options_are_checked_before_loading(tiny_entry):
    with pytest.raises(InvalidRequest, match="5 steps"):
        ExportOptions(tiny_entry, steps=5)
    with pytest.raises(InvalidRequest, match="takes no weights"):
        ExportOptions(tiny_entry, random_weights=True, base=HubItem("x"))
    with pytest.raises(InvalidRequest, match="multiples of 8"):
        ExportOptions(tiny_entry, height=36).latent_size(2, 3)


def test_preprocessor_normalisation_is_read(tiny, tiny_entry, tmp_path):
    import shutil

    from fastface_trt.export.weights import CLIP_MEAN, CheckpointWeights

    assert CheckpointWeights(ExportOptions(tiny_entry)).image_normalisation()[0] == CLIP_MEAN
    shutil.copytree(tiny / "image_encoder", tmp_path / "encoder")
    values = {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]}
    (tmp_path / "encoder" / "preprocessor_config.json").write_text(json.dumps(values))
    options = ExportOptions(tiny_entry, image_encoder=HubItem(str(tmp_path / "encoder")))
    assert CheckpointWeights(options).image_normalisation() == ((0.1, 0.2, 0.3), (1, 2, 3))
