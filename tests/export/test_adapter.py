"""Adapters: both file formats, the fused LoRA, the projection against diffusers, and misfits."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastface_trt.errors import WeightsError
from fastface_trt.export.adapters import attach_adapter, load_projection, read_adapter
from tests.helpers.tiny_sdxl import tiny_projection, tiny_unet


@pytest.fixture
def tensors(tiny):
    return load_file(tiny / "adapter.safetensors")


def test_bin_and_safetensors_are_the_same(tensors, tiny, tmp_path):
    nested = {"image_proj": {}, "ip_adapter": {}}
    for key, tensor in tensors.items():
        part, _, rest = key.partition(".")
        nested[part][rest] = tensor
    torch.save(nested, tmp_path / "adapter.bin")
    from_bin = read_adapter(tmp_path / "adapter.bin")
    from_safetensors = read_adapter(tiny / "adapter.safetensors")
    for part in ("image_proj", "ip_adapter"):
        ours, theirs = getattr(from_bin, part), getattr(from_safetensors, part)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def _as_trained(tensors):
    """As IP-Adapter's training script saves it: other names, and the frozen UNet beside them."""
    named = {"image_proj": "image_proj_model", "ip_adapter": "adapter_modules"}
    out = {f"{named[k.partition('.')[0]]}.{k.partition('.')[2]}": v for k, v in tensors.items()}
    return out | {"unet.conv_in.weight": torch.ones(3)}


@pytest.mark.parametrize(
    "wrap",
    [
        _as_trained,
        lambda t: {"state_dict": {f"model.{k}": v for k, v in t.items()}, "global_step": 5},
        lambda t: {"module": _as_trained(t), "optimizer": {"state": {0: {"step": t}}}},
        lambda t: {f"module.{k}": v for k, v in _as_trained(t).items()},
    ],
    ids=["accelerate", "lightning", "deepspeed", "distributed"],
)
def test_an_adapter_wrapped_as_a_training_checkpoint_is_read(tensors, tmp_path, wrap):
    torch.save(wrap(tensors), tmp_path / "pytorch_model.bin")
    adapter = read_adapter(tmp_path / "pytorch_model.bin")
    read = {f"image_proj.{k}": v for k, v in adapter.image_proj.items()}
    read |= {f"ip_adapter.{k}": v for k, v in adapter.ip_adapter.items()}
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[k], tensors[k]) for k in tensors)


def test_a_part_that_no_adapter_has_is_refused(tensors, tmp_path):
    save_file(tensors | {"time_embed.weight": torch.ones(2)}, tmp_path / "adapter.safetensors")
    with pytest.raises(WeightsError, match="it also has time_embed"):
        read_adapter(tmp_path / "adapter.safetensors")


def test_bin_is_not_unpickled(tmp_path):
    class Trap:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    torch.save({"image_proj": Trap()}, tmp_path / "trap.bin")
    with pytest.raises(WeightsError, match=r"trap\.bin"):
        read_adapter(tmp_path / "trap.bin")
    assert not (tmp_path / "ran").exists()


def test_lora_is_fused_with_its_scale(tiny):
    plain, fused = tiny_unet(), tiny_unet()
    adapter = read_adapter(tiny / "adapter.safetensors")
    attach_adapter(fused, adapter, lora_scale=0.5)
    for index, name in enumerate(plain.attn_processors):
        path = name.removesuffix(".processor")
        for source, target in (("to_q", "to_q"), ("to_out", "to_out.0")):
            down = adapter.ip_adapter[f"{index}.{source}_lora.down.weight"]
            up = adapter.ip_adapter[f"{index}.{source}_lora.up.weight"]
            before = plain.get_submodule(f"{path}.{target}").weight
            after = fused.get_submodule(f"{path}.{target}").weight
            torch.testing.assert_close(after, before + 0.5 * up @ down)


def test_projection_equals_diffusers(tiny):
    from diffusers import UNet2DConditionModel

    ours = tiny_projection(1)
    state = {k: v.clone() for k, v in ours.state_dict().items()}
    converted = UNet2DConditionModel._convert_ip_adapter_image_proj_to_diffusers(tiny_unet(), state)
    converted.shortcut, converted.shortcut_scale = True, 1.0
    faces, features = torch.randn(2, 512), torch.randn(2, 5, 16)
    converted.clip_embeds = features[:, None]
    with torch.no_grad():
        expected = converted(faces)
        torch.testing.assert_close(ours(faces, features), expected.view(2, 4, -1))
    assert torch.equal(
        load_projection(read_adapter(tiny / "adapter.safetensors")).norm.weight, ours.norm.weight
    )


@pytest.mark.parametrize("break_it", ["missing", "shape", "extra", "lora", "projection", "kind"])
def test_misfits_are_explained(tensors, tmp_path, break_it):
    first = "ip_adapter.1.to_k_ip.weight"
    if break_it == "missing":
        del tensors[first]
    elif break_it == "shape":
        tensors[first] = torch.zeros(3, 3)
    elif break_it == "extra":
        tensors["ip_adapter.99.to_k_ip.weight"] = torch.zeros(3, 3)
    elif break_it == "lora":
        tensors["ip_adapter.0.to_q_lora.up.weight"] = torch.zeros(5, 2)
    elif break_it == "projection":
        del tensors["image_proj.proj.2.bias"]
    else:
        others = ("image_proj.perceiver", "image_proj.norm")
        tensors = {k: v for k, v in tensors.items() if not k.startswith(others)}
    save_file(tensors, tmp_path / "a.safetensors")

    def load():
        adapter = read_adapter(tmp_path / "a.safetensors")
        load_projection(adapter)
        attach_adapter(tiny_unet(), adapter, lora_scale=1.0)

    with pytest.raises(WeightsError) as caught:
        load()
    assert caught.value.hint


@pytest.mark.parametrize("content", [b"", b"not weights", None])
def test_unreadable_files_are_explained(tmp_path, content):
    for name in ("a.safetensors", "a.bin"):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(WeightsError, match=r"a\."):
            read_adapter(tmp_path / name)


def test_truncated_adapter_is_explained(tiny, tmp_path):
    data = (tiny / "adapter.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(WeightsError, match="truncated"):
        read_adapter(tmp_path / "a.safetensors")
