"""PuLID for the tiny checkpoint: random adapters and a vision tower in the published layouts."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from fastface_trt.export.adapters import IDEncoder, IDFormer
from fastface_trt.export.attention import attach_processors
from fastface_trt.export.face_modules import EvaVisionTower, rotary_angles
from tests.helpers.tiny_sdxl import TEXT_WIDTHS, tiny_unet

SIZE, PATCH, WIDTH, EMBEDDING, HEAD_SIZE, DEPTH = 32, 8, 16, 24, 8, 21
QUERIES = 6
OUTPUT = sum(TEXT_WIDTHS)


def _random(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Every parameter random, so that none can be left out without being missed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_scale = name.endswith("weight") and parameter.ndim == 1
            parameter.copy_(1 + 0.1 * noise if is_scale else 0.2 * noise)
    return module


def tiny_id_former(seed: int = 0) -> IDFormer:
    features = (WIDTH, 12, 14, 32)
    return _random(
        IDFormer(
            queries=QUERIES,
            width=32,
            inner=128,
            hidden=48,
            depth=5,
            output=OUTPUT,
            identity=(512 + EMBEDDING, 12, 14, 32 * 5),
            features=features,
        ),
        seed,
    )


def tiny_id_encoder(seed: int = 0) -> IDEncoder:
    return _random(
        IDEncoder(
            output=OUTPUT,
            identity=(512 + EMBEDDING, 12, 14, OUTPUT * 5),
            features=(WIDTH, 12, 14, OUTPUT),
        ),
        seed,
    )


def pulid_tensors(encoder: torch.nn.Module, seed: int = 1) -> dict[str, torch.Tensor]:
    """A PuLID file for the tiny UNet; layers are numbered as in `unet.attn_processors`."""
    unet = tiny_unet()
    attach_processors(unet)
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"id_adapter.{k}": v.clone() for k, v in encoder.state_dict().items()}
    for index, (name, processor) in enumerate(unet.attn_processors.items()):
        if name.endswith("attn2.processor"):
            for ours, published in (("to_k_ip", "id_to_k"), ("to_v_ip", "id_to_v")):
                shape = getattr(processor, ours).weight.shape
                key = f"id_adapter_attn_layers.{index}.{published}.weight"
                tensors[key] = torch.randn(shape, generator=generator) * 0.3
    return tensors


def eva_tensors(depth: int = DEPTH, seed: int = 2) -> dict[str, torch.Tensor]:
    """An EVA02-CLIP checkpoint: the vision tower with its rotary tables, and some of the text's."""
    tower = EvaVisionTower(
        image_size=SIZE,
        patch=PATCH,
        width=WIDTH,
        hidden=20,
        depth=depth,
        output=EMBEDDING,
        head_size=HEAD_SIZE,
    )
    state = dict(_random(tower, seed).state_dict())
    angles = rotary_angles(SIZE // PATCH, HEAD_SIZE).float()
    for owner in ("", *(f"blocks.{i}.attn." for i in range(depth))):
        state[f"{owner}rope.freqs_cos"] = angles.cos()
        state[f"{owner}rope.freqs_sin"] = angles.sin()
    return {f"visual.{k}": v for k, v in state.items()} | {
        "logit_scale": torch.tensor(4.6),
        "text.positional_embedding": torch.zeros(77, 8),
    }


def write_tiny_pulid(root: Path, depth: int = DEPTH) -> Path:
    """Write `pulid.safetensors`, `pulid_v1.bin` and `eva.pt` below `root`."""
    save_file(pulid_tensors(tiny_id_former()), root / "pulid.safetensors")
    nested: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in pulid_tensors(tiny_id_encoder()).items():
        part, _, rest = key.partition(".")
        nested.setdefault(part, {})[rest] = tensor
    torch.save(nested, root / "pulid_v1.bin")
    torch.save(eva_tensors(depth), root / "eva.pt")
    return root
