"""The decoder's second training: whole pictures, against the encoder that is settled by then.

The first training sees patches and moves encoder and decoder together. Everything else is trained
on that encoder's latents, so it must not change any more; the decoder still may, and the pictures
that people look at gain from it: normalisation over a whole picture differs from that over patches.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional

from .data import Portraits
from .diffusion import Latents
from .loop import Schedule, train
from .vae import to_tensor

SCHEDULE = Schedule(steps=3600, learning_rate=1e-3, warmup=50, ema=0.995)
BATCH = 8
#: Deviation of the noise on the latents: the UNet's latents are not exact either.
NOISE = 0.05


def refine_decoder(
    vae: AutoencoderKL, portraits: Portraits, latents: Latents, path: Path, seed: int
) -> AutoencoderKL:
    """Train decoder and post-quantisation of `vae` in place; encoder and latents stay.

    Args:
        vae: float32, as the first training left it.
        portraits: the pictures that `latents` were made of, in the same order.
        latents: scaled latents [n, 4, 24, 24].
        path: the stage's checkpoint file.
        seed: of the stage.

    Returns:
        The autoencoder, in eval mode.
    """
    torch.manual_seed(seed)
    vae = vae.float().to(memory_format=torch.channels_last)
    vae.requires_grad_(False)
    for part in (vae.decoder, vae.post_quant_conv):
        part.requires_grad_(True)
    scale = vae.config.scaling_factor

    def step_loss(step: int, rng: np.random.Generator) -> Tensor:
        rows = np.sort(rng.integers(len(latents.values), size=BATCH))
        picture = to_tensor(portraits.pictures[rows])
        noisy = latents.values[torch.from_numpy(rows)].float()
        noisy = noisy + NOISE * torch.randn_like(noisy)
        noisy = (noisy / scale).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            decoded = vae.decode(noisy).sample
        decoded = decoded.float()
        error = functional.l1_loss(decoded, picture) + 0.5 * functional.mse_loss(decoded, picture)
        for axis in (2, 3):
            error = error + functional.l1_loss(decoded.diff(dim=axis), picture.diff(dim=axis))
        return error

    train(vae, step_loss, SCHEDULE, path, seed)
    return vae
