"""The three diffusion stages: base UNet, face adapter, few-step UNet."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from .adapter import Adapter
from .diffusion import Denoiser, Latents, TextTable, drop, sample_timesteps, scene_index
from .loop import Schedule, train
from .sources import Sources
from .unet import FEW_STEPS, LATENT_SIZE, build_unet

BASE = Schedule(steps=1600, learning_rate=1.5e-3, warmup=60, ema=0.995)
ADAPTER = Schedule(steps=600, learning_rate=1.5e-3, warmup=50, ema=0.99)
FEW_STEP = Schedule(steps=2000, learning_rate=1e-3, warmup=30, ema=0.99)
BATCH = 16


def train_base(latents: Latents, text: TextTable, work: Path, seed: int) -> UNet2DConditionModel:
    """Train the text-to-picture UNet."""
    torch.manual_seed(seed)
    unet = build_unet()
    denoiser = Denoiser(unet)

    def step_loss(step: int, rng: np.random.Generator) -> Tensor:
        rows = torch.from_numpy(rng.integers(len(latents.values), size=BATCH))
        states, pooled = text.pick(scene_index(latents.labels[rows, 1:]), rng)
        dropped = rng.random(BATCH) < 0.12
        t = sample_timesteps(rng, BATCH)
        clean = latents.values[rows].float()
        return denoiser.loss(clean, t, drop(states, dropped), drop(pooled, dropped))

    train(unet, step_loss, BASE, work / "base.pt", seed)
    return unet


def train_adapter(
    unet: UNet2DConditionModel,
    latents: Latents,
    text: TextTable,
    sources: Sources,
    work: Path,
    seed: int,
) -> Adapter:
    """Train the adapter on the frozen UNet: source face to any picture of the same person."""
    torch.manual_seed(seed + 1)
    unet.requires_grad_(False)
    adapter = Adapter(unet, sources.features.shape[-1])
    denoiser = Denoiser(unet)

    def step_loss(step: int, rng: np.random.Generator) -> Tensor:
        rows = torch.from_numpy(rng.integers(len(latents.values), size=BATCH))
        labels = latents.labels[rows]
        states, pooled = text.pick(scene_index(labels[:, 1:]), rng)
        draw = rng.random(BATCH)
        no_text, no_face = draw < 0.12, (draw > 0.08) & (draw < 0.16)
        identity, features = sources.pick(labels[:, 0], rng, no_face)
        # Users turn the scale down from 1; the adapter must hold there, too.
        adapter.attend_to(adapter.image_proj(identity, features), float(rng.uniform(0.7, 1.0)))
        t = sample_timesteps(rng, BATCH)
        clean = latents.values[rows].float()
        return denoiser.loss(clean, t, drop(states, no_text), drop(pooled, no_text))

    train(adapter, step_loss, ADAPTER, work / "adapter.pt", seed + 1)
    adapter.attend_to(None)
    return adapter


def head_weight() -> Tensor:
    """Return loss weights [24, 24] of mean 1: the head, which tells people apart, counts more."""
    axis = (torch.arange(LATENT_SIZE) + 0.5) / LATENT_SIZE
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    inside = ((x - 0.5) / 0.27).square() + ((y - 0.47) / 0.34).square() < 1
    weight = 1 + 3 * inside.float()
    return weight / weight.mean()


def train_few_step(
    unet: UNet2DConditionModel,
    adapter: Adapter,
    latents: Latents,
    text: TextTable,
    sources: Sources,
    work: Path,
    seed: int,
) -> UNet2DConditionModel:
    """Turn the base UNet into a four-step UNet, with the adapter in the loop.

    The whole capacity goes to the four timesteps of the schedule.  The teacher is the data and
    not the base UNet: pictures of the same prompt and person differ little, so the average over
    them is a good first step, and an hour of training leaves a teacher that knows less than the
    data.  At the first timestep the input is pure noise, as it is when pictures are made, and the
    error is that of the predicted picture.  The adapter moves along: it was trained on all
    timesteps, and the frozen base left it little room to draw a face that is not the average.
    """
    torch.manual_seed(seed + 2)
    unet.requires_grad_(True)
    adapter.requires_grad_(True)
    both = nn.ModuleDict({"unet": unet, "adapter": adapter})
    denoiser = Denoiser(unet)
    noise = denoiser.noise
    where = head_weight()

    def step_loss(step: int, rng: np.random.Generator) -> Tensor:
        rows = torch.from_numpy(rng.integers(len(latents.values), size=BATCH))
        labels = latents.labels[rows]
        states, pooled = text.pick(scene_index(labels[:, 1:]), rng)
        no_text = rng.random(BATCH) < 0.1
        states, pooled = drop(states, no_text), drop(pooled, no_text)
        if step % 8:
            identity, features = sources.pick(labels[:, 0], rng, rng.random(BATCH) < 0.05)
            tokens = adapter.image_proj(identity, features)
            adapter.attend_to(tokens, float(rng.uniform(0.7, 1.0)))
        else:
            adapter.attend_to(None)
        t = torch.from_numpy(rng.choice(FEW_STEPS, size=BATCH))
        clean = latents.values[rows].float()
        fresh = torch.randn_like(clean)
        first = (t == FEW_STEPS[0]).view(-1, 1, 1, 1)
        x = torch.where(first, fresh, noise.add(clean, fresh, t))
        signal, sigma = noise.levels(t)
        wanted = (x - signal * clean) / sigma
        errors = (denoiser(x, t, states, pooled) - wanted).square() * where
        return (errors.mean(dim=(1, 2, 3)) * noise.weight(t)).mean()

    train(both, step_loss, FEW_STEP, work / "few_step.pt", seed + 2)
    adapter.attend_to(None)
    return unet
