"""The comparison on a GPU, run on the CPU: same code, same equality check, the mini model."""

import copy
import json

import pytest
import torch
from click.testing import CliRunner
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

from benchmarks.peers.__main__ import main as compare
from benchmarks.peers.__main__ import make_work
from benchmarks.peers.equality import HALF_TOLERANCE, difference
from benchmarks.peers.graph_weights import load_weights
from benchmarks.peers.models import TorchModels
from benchmarks.peers.pytorch import DiffusersAdapterPeer, DiffusersPeer, PyTorchPeer
from fastface_trt import FastFace
from fastface_trt.checkpoints import MINI
from fastface_trt.errors import EngineMismatch
from fastface_trt.export.full_size import randomize
from fastface_trt.export.modules import vae_decoder_export
from fastface_trt.export.onnx_writer import write_module
from fastface_trt.export.options import ExportOptions
from fastface_trt.export.weights import CheckpointWeights

BLOCKS = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}
ON_CPU = ("--gpu", "--mini", "--device", "cpu", "--backend", "onnxruntime", "--rounds", "1")


def test_peers_make_the_same_picture_and_are_written_with_the_machine(tmp_path, monkeypatch):
    processed, own_call = [], IPAdapterAttnProcessor2_0.__call__

    def counting(processor, *arguments, **named):
        processed.append(processor)
        return own_call(processor, *arguments, **named)

    monkeypatch.setattr(IPAdapterAttnProcessor2_0, "__call__", counting)
    out = tmp_path / "peers.json"
    own = ("--preset", "plain", "--preset", "am2+dcg", "--out", out, "--cache", tmp_path / "cache")
    peers = ("diffusers", "diffusers-ip-adapter", "fastface-trt-exact-fresh")
    named = [word for peer in peers for word in ("--peer", peer)]
    result = CliRunner().invoke(compare, [*ON_CPU, *map(str, own), *named])
    assert result.exit_code == 0, result.output
    written = json.loads(out.read_text())
    assert written["machine"]["cores"] >= 1
    assert written["request"]["steps"] == 4
    for preset, samples in (("plain", [4, 4, 4, 4]), ("am2+dcg", [12, 4, 4, 12])):
        results = written["presets"][preset]
        assert [one["name"] for one in results] == ["pytorch", *peers]
        assert [one["problem"] for one in results] == [None] * 4
        assert [one["unet_samples"] for one in results] == samples
        # diffusers' own processors compute what the loop's do, to the bit; ours is other code.
        assert results[-1]["difference"]["latents"] > 0
    assert processed
    assert {path.suffix for path in tmp_path.glob("peers.*")} == {".json", ".md", ".png"}


def test_without_a_gpu_it_stops_with_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "peers.json"
    result = CliRunner().invoke(compare, ["--gpu", "--out", str(out)])
    assert result.exit_code == 1
    assert "PyTorch sees no GPU here" in result.output
    assert "Traceback" not in result.output
    assert not out.exists()


def test_half_precision_models_make_nearly_the_same_picture():
    """The peers' loop in float16, as on a GPU, against float32."""
    with FastFace.load("mini") as fastface:
        work, scheduler = make_work(fastface, "am1+dcg"), dict(fastface.manifest.scheduler)
    half, single = (
        TorchModels(CheckpointWeights(ExportOptions(MINI, precision=precision)), scheduler)
        for precision in ("fp16", "fp32")
    )
    assert (half.dtype, single.dtype) == (torch.float16, torch.float32)
    for peer in (PyTorchPeer, DiffusersPeer, DiffusersAdapterPeer):
        apart = difference(peer(half).made(work), peer(single).made(work))
        assert apart.latents > 1e-5
        assert apart.problem("am1+dcg", HALF_TOLERANCE) is None
        assert "latents differ" in apart.problem("am1+dcg", 1e-6)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A small VAE, with attention as the full-size one has it, its random weights and its graph."""
    vae = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, **BLOCKS)
    randomize(vae, torch.float32, seed=3)
    folder = tmp_path_factory.mktemp("vae")
    export = vae_decoder_export(
        copy.deepcopy(vae), latent_size=(8, 8), scale_factor=2, fixed_size=False
    )
    return vae, folder / write_module(export, folder).files[0].path


def test_weights_of_a_graph_become_the_models(exported):
    """Convolutions, norms and the linear layers of an attention, however they were turned there."""
    vae, graph = exported
    filled = copy.deepcopy(vae)
    with torch.no_grad():
        for parameter in filled.parameters():
            parameter.fill_(7)
    decoding = {
        name: values
        for name, values in vae.state_dict().items()
        if not name.startswith(("encoder.", "quant_conv."))
    }
    assert load_weights(filled, graph) == len(decoding)
    for name, values in decoding.items():
        torch.testing.assert_close(filled.state_dict()[name], values, msg=name, rtol=0, atol=0)


def test_a_graph_of_another_model_is_refused(exported):
    other = torch.nn.Module()
    other.decoder = torch.nn.Module()
    other.decoder.conv_in = torch.nn.Conv2d(3, 5, 1)
    with pytest.raises(EngineMismatch, match="another model"):
        load_weights(other, exported[1])
