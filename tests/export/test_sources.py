"""Sources: what a location means, and that every layout of a checkpoint has the same weights."""

import pytest
import torch

from fastface_trt.checkpoints import CHECKPOINTS, HubItem, find_checkpoint
from fastface_trt.errors import UnknownName
from fastface_trt.export.sources import (
    CheckpointSource,
    locate,
    parse_item,
)


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
