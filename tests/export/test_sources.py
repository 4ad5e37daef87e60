"""Sources: what a location means, and the distillation LoRA in the layout that it ships in."""

import pytest
import torch
from safetensors.torch import save_file

from fastface_trt.checkpoints import CHECKPOINTS, HubItem, find_checkpoint
from fastface_trt.errors import UnknownName, WeightsError
from fastface_trt.export.locations import locate, parse_item
from fastface_trt.export.sources import CheckpointSource, fuse_distillation_lora
from tests.helpers.tiny_sdxl import tiny_unet


def test_parse_item(tmp_path):
    assert parse_item("owner/name") == HubItem("owner/name")
    assert parse_item("owner/name@abc") == HubItem("owner/name@abc")
    assert parse_item("owner/name/sub/file.bin@abc") == HubItem("owner/name", "abc", "sub/file.bin")
    assert parse_item(str(tmp_path)) == HubItem(str(tmp_path))


def test_local_files_are_hashed(tmp_path):
    import hashlib

    (tmp_path / "a.bin").write_bytes(b"abc")
    located = locate(HubItem(str(tmp_path / "a.bin"), licence="MIT"), "adapter")
    assert located.source.sha256 == hashlib.sha256(b"abc").hexdigest()
    assert located.source.licence == "MIT"
    assert str(tmp_path) not in located.source.model_dump_json()


def test_hub_snapshot_is_found_in_the_cache_offline(tmp_path, monkeypatch):
    """A cached snapshot is used without a connection, and its commit is recorded."""
    import huggingface_hub.constants as constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--owner--name" / "snapshots" / commit
    (snapshot / "sub").mkdir(parents=True)
    (snapshot / "sub" / "config.json").write_text("{}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda *a, **k: _download(tmp_path, *a, **k),
    )
    located = locate(HubItem("owner/name", commit, "sub"), "image_encoder")
    assert located.path == snapshot / "sub"
    assert located.source.revision == commit


def _download(cache, *arguments, **options):
    from huggingface_hub import _snapshot_download

    return _snapshot_download.snapshot_download(*arguments, cache_dir=str(cache), **options)


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_distillation_lora_is_fused_with_scale_and_alpha(tmp_path, layout):
    before, after = tiny_unet(), tiny_unet()
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    weight = before.get_submodule(name).weight
    down, up = torch.randn(2, weight.shape[1]) * 0.1, torch.randn(weight.shape[0], 2) * 0.1
    if layout == "kohya":
        key = "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q"
        state = {
            f"{key}.lora_down.weight": down,
            f"{key}.lora_up.weight": up,
            f"{key}.alpha": torch.tensor(1.0),
        }
        factor = 0.5  # alpha / rank
    else:
        state = {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
        factor = 1.0
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "lora.safetensors")
    fuse_distillation_lora(after, HubItem(str(tmp_path / "lora.safetensors")), 0.8)
    fused = after.get_submodule(name).weight
    torch.testing.assert_close(fused, weight + 0.8 * factor * up @ down)
    assert not any("lora" in n for n, _ in after.named_modules())


def test_a_lora_that_is_not_one_is_explained(tmp_path):
    (tmp_path / "lora.safetensors").write_bytes(b"no")
    with pytest.raises(WeightsError, match="LoRA"):
        fuse_distillation_lora(tiny_unet(), HubItem(str(tmp_path / "lora.safetensors")), 1.0)


def test_single_file_holds_the_same_weights(tiny, tmp_path):
    from tests.helpers.ldm_layout import write_single_file

    write_single_file(tiny / "checkpoint", tmp_path / "one.safetensors")
    folder = HubItem(str(tiny / "checkpoint"))
    ours = CheckpointSource(HubItem(str(tmp_path / "one.safetensors")), torch.float32, folder)
    theirs = CheckpointSource(folder, torch.float32, folder)
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        single, several = ours.component(name).state_dict(), theirs.component(name).state_dict()
        assert single.keys() == several.keys()
        assert all(torch.equal(single[key], several[key]) for key in several)
        bones = ours.skeleton(name).state_dict()
        assert {k: v.shape for k, v in bones.items()} == {k: v.shape for k, v in several.items()}
    assert ours.tokenizer("tokenizer_2") == theirs.tokenizer("tokenizer_2")


def test_registry():
    for name in CHECKPOINTS:
        checkpoint = find_checkpoint(name)
        assert checkpoint.name == name
        assert checkpoint.steps in checkpoint.allowed_steps
        assert checkpoint.base.revision or name == "mini"
    with pytest.raises(UnknownName, match="hyper"):
        find_checkpoint("hiper")
