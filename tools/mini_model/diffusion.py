"""Pre-computed training data of the diffusion stages, and their common loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from fastface_trt.mini.prompts import (
    ACTION_NAMES,
    PLACE_NAMES,
    all_scenes,
    canonical_prompt,
    varied_prompt,
)

from .data import Portraits
from .files import load_state, save_state
from .text import Reader, load_tokenizers, tokenize
from .unet import FEW_STEPS, Noise, time_ids
from .vae import encode

WORDINGS = 4
#: Pictures that are encoded; more than a training of an hour on two cores gets to see.
LATENT_COUNT = 30_000
CHUNK = 1_500


@dataclass(frozen=True)
class TextTable:
    """Encoded wordings of every scene: states [scenes, wordings, 77, 96], pooled [.., .., 64]."""

    states: Tensor
    pooled: Tensor

    def pick(self, scenes: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Return one random wording's states [n, 77, w] and pooled [n, p] per scene [n]."""
        wording = torch.from_numpy(rng.integers(self.states.shape[1], size=len(scenes)))
        return self.states[scenes, wording].float(), self.pooled[scenes, wording].float()


def scene_index(labels: Tensor) -> Tensor:
    """Map (style, place, action) labels [n, 3] to the row of `all_scenes` [n]."""
    places, actions = len(PLACE_NAMES), len(ACTION_NAMES)
    return (labels[:, 0] * places + labels[:, 1]) * actions + labels[:, 2]


@torch.no_grad()
def encode_scenes(
    reader: Reader, tokenize_both: Callable[[list[str]], tuple[Tensor, Tensor]], seed: int
) -> TextTable:
    """Encode the canonical and some varied wordings of every scene."""
    rng = np.random.default_rng([seed, 17])
    states, pooled = [], []
    for scene in all_scenes():
        prompts = [canonical_prompt(scene)]
        prompts += [varied_prompt(scene, rng) for _ in range(WORDINGS - 1)]
        encoded = reader.encode(*tokenize_both(prompts))
        states.append(encoded[0].half())
        pooled.append(encoded[1].half())
    return TextTable(torch.stack(states), torch.stack(pooled))


def load_text(checkpoint: Path, path: Path, seed: int) -> TextTable:
    """Encode all scenes with a checkpoint's text encoders, or read what an earlier run encoded."""
    state = load_state(path)
    if state is not None:
        return TextTable(state["states"], state["pooled"])
    tokenizers = load_tokenizers(checkpoint)
    reader = Reader(tokenizers)
    reader.first = CLIPTextModel.from_pretrained(checkpoint / "text_encoder")
    reader.second = CLIPTextModelWithProjection.from_pretrained(checkpoint / "text_encoder_2")

    def both(prompts: list[str]) -> tuple[Tensor, Tensor]:
        return tokenize(tokenizers[0], prompts), tokenize(tokenizers[1], prompts)

    table = encode_scenes(reader.float().eval(), both, seed)
    if not dist.is_initialized() or dist.get_rank() == 0:
        save_state(path, {"states": table.states, "pooled": table.pooled})
    return table


@dataclass(frozen=True)
class Latents:
    """Scaled latents [n, 4, 24, 24] with their labels [n, 4] (identity, style, place, action)."""

    values: Tensor
    labels: Tensor


def prepare_latents(portraits: Portraits, checkpoint: Path, folder: Path) -> Latents:
    """Encode the pictures of the first people once, or read what an earlier run encoded.

    Where several processes train together, each encodes its share.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    starts = range(0, min(LATENT_COUNT, len(portraits.pictures)), CHUNK)
    for index, start in enumerate(starts):
        path = folder / f"latents_{start}.pt"
        if index % world != rank or path.exists():
            continue
        vae = AutoencoderKL.from_pretrained(checkpoint / "vae").float().eval()
        vae = vae.to(memory_format=torch.channels_last)
        coded = encode(vae, portraits.pictures[start : start + CHUNK])
        save_state(path, (coded * vae.config.scaling_factor).half())
    if dist.is_initialized():
        dist.barrier()
    values = torch.cat([load_state(folder / f"latents_{start}.pt") for start in starts])
    return Latents(values, torch.from_numpy(np.array(portraits.labels[: len(values)])))


def sample_timesteps(rng: np.random.Generator, count: int) -> Tensor:
    """Return timesteps [n]: half anywhere, half where the few-step schedule will evaluate."""
    anywhere = rng.integers(1000, size=count)
    few = np.array(FEW_STEPS)[rng.integers(len(FEW_STEPS), size=count)]
    return torch.from_numpy(np.where(rng.random(count) < 0.5, anywhere, few))


class Denoiser:
    """The UNet with everything that stays the same from call to call."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self.unet = unet
        self.noise = Noise()

    def __call__(self, x: Tensor, t: Tensor, states: Tensor, pooled: Tensor) -> Tensor:
        """Return epsilon [n, 4, h, w] in float32."""
        eps: Tensor = self.unet(
            x.contiguous(memory_format=torch.channels_last),
            t,
            states,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids(len(x))},
        ).sample
        return eps.float()

    def loss(self, clean: Tensor, t: Tensor, states: Tensor, pooled: Tensor) -> Tensor:
        """Return the weighted epsilon loss of one batch."""
        noise = torch.randn_like(clean)
        eps = self(self.noise.add(clean, noise, t), t, states, pooled)
        errors = (eps - noise).square().mean(dim=(1, 2, 3))
        return (errors * self.noise.weight(t)).mean()

    @torch.no_grad()
    def sample(self, x: Tensor, states: Tensor, pooled: Tensor, steps: int = 4) -> Tensor:
        """Run DDIM with trailing timesteps from noise [n, 4, h, w]; no guidance."""
        times = [round(1000 - index * 1000 / steps) - 1 for index in range(steps)]
        for _index, time in enumerate(times):
            t = torch.full((len(x),), time)
            previous = t - 1000 // steps
            x = self.noise.ddim(x, self(x, t, states, pooled), t, previous)
        return x


def drop(values: Tensor, dropped: npt.NDArray[np.bool_]) -> Tensor:
    """Return `values` [n, ...] with the dropped rows set to zero."""
    keep = torch.from_numpy(~dropped).float()
    return values * keep.view(-1, *([1] * (values.ndim - 1)))
