"""The autoencoder: diffusers' AutoencoderKL with factor 4, so that 96 pixels make 24 latents."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional

from fastface_trt.mini.scene import PICTURE_SIZE

from .data import Bytes, Portraits
from .loop import Schedule, train

SCHEDULE = Schedule(steps=2000, learning_rate=1.5e-3, warmup=60, ema=0.995)
BATCH = 12
NOISE = 0.05
#: Training sees patches: the network is convolutional, and more steps teach more than more pixels.
CROP = 48


def build_vae() -> AutoencoderKL:
    """Return an untrained autoencoder."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 64),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=96,
        mid_block_add_attention=False,
        force_upcast=False,
    )


def to_tensor(pictures: Bytes) -> Tensor:
    """Turn uint8 [n, h, w, 3] into float32 [n, 3, h, w] in [-1, 1], channels last in memory."""
    values = torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2)
    return values.float().div_(127.5).sub_(1).contiguous(memory_format=torch.channels_last)


def _loss(vae: AutoencoderKL, picture: Tensor, progress: float) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        posterior = vae.encode(picture).latent_dist
        # Noise of a fixed size, not of a learned one: learned noise starts at deviation 1, drowns
        # the signal, and a short training never gets out of that.
        decoded = vae.decode(posterior.mean + NOISE * torch.randn_like(posterior.mean)).sample
    decoded = decoded.float()
    error = functional.l1_loss(decoded, picture) + 0.5 * functional.mse_loss(decoded, picture)
    # Errors of neighbouring differences keep eyes and contours sharp, but reward a flat grey
    # picture as long as colours are not learned; so they come in slowly.
    for axis in (2, 3):
        step = functional.l1_loss(decoded.diff(dim=axis), picture.diff(dim=axis))
        error = error + 0.6 * min(1.0, progress / 0.3) * step
    spread = posterior.mean.float().square().mean()
    declared = (posterior.logvar.float() - 2 * math.log(NOISE)).square().mean()
    return error + 1e-3 * spread + 1e-3 * declared


def train_vae(portraits: Portraits, work: Path, seed: int) -> AutoencoderKL:
    """Train the autoencoder and set its scaling factor so that latents have deviation 1."""
    torch.manual_seed(seed)
    vae = build_vae().to(memory_format=torch.channels_last)
    count = len(portraits.pictures)

    def step_loss(step: int, rng: np.random.Generator) -> Tensor:
        rows = np.sort(rng.integers(count, size=BATCH))
        x, y = rng.integers(PICTURE_SIZE - CROP + 1, size=2)
        patches = portraits.pictures[rows, y : y + CROP, x : x + CROP]
        return _loss(vae, to_tensor(patches), step / SCHEDULE.steps)

    train(vae, step_loss, SCHEDULE, work / "vae.pt", seed)
    rows = np.random.default_rng(seed).integers(count, size=512)
    latents = encode(vae, portraits.pictures[np.sort(rows)])
    vae.register_to_config(scaling_factor=round(float(1 / latents.std()), 5))
    return vae


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: Bytes, batch: int = 64) -> Tensor:
    """Encode uint8 [n, 96, 96, 3] to unscaled mean latents float32 [n, 4, 24, 24]."""
    parts = []
    for start in range(0, len(pictures), batch):
        with torch.autocast("cpu", torch.bfloat16):
            coded = vae.encode(to_tensor(pictures[start : start + batch])).latent_dist.mean
        parts.append(coded.float())
    return torch.cat(parts)


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor, batch: int = 64) -> Bytes:
    """Decode scaled latents [n, 4, h, w] to uint8 pictures [n, 4h, 4w, 3]."""
    parts = []
    for start in range(0, len(latents), batch):
        with torch.autocast("cpu", torch.bfloat16):
            some = latents[start : start + batch] / vae.config.scaling_factor
            parts.append(vae.decode(some.to(memory_format=torch.channels_last)).sample.float())
    values = torch.cat(parts).add(1).mul(127.5).round().clamp(0, 255)
    return values.permute(0, 2, 3, 1).to(torch.uint8).numpy()
