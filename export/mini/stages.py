"""The three diffusion stages: base UNet, face adapter, few-step distillation."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from .adapter import Adapter
from .diffusion import Denoiser, Latents, TextTable, drop, sample_timesteps, scene_index
from .loop import Schedule, train
from .sources import Sources
from .unet import FEW_STEPS, build_unet

BASE = Schedule(steps=1200, learning_rate=1.5e-3, warmup=60, ema=0.995)
ADAPTER = Schedule(steps=800, learning_rate=1.5e-3, warmup=50, ema=0.99)
FEW_STEP = Schedule(steps=300, learning_rate=3e-4, warmup=50, ema=0.99)
BATCH = 32


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


def distil(
    unet: UNet2DConditionModel,
    adapter: Adapter,
    latents: Latents,
    text: TextTable,
    sources: Sources,
    work: Path,
    seed: int,
    substeps: int = 4,
) -> UNet2DConditionModel:
    """Train the UNet to take in one of four steps what its copy takes in several.

    The student sees noisy training pictures at the four timesteps (pure noise at the first) and
    must land, with one DDIM step, where the teacher lands with `substeps`.  The frozen adapter is
    switched on in two thirds of the batches, so that it fits the student as it fits the teacher.
    """
    torch.manual_seed(seed + 2)
    teacher = copy.deepcopy(unet)
    teacher_denoiser, denoiser = Denoiser(teacher), Denoiser(unet)
    unet.requires_grad_(True)
    for processor in adapter.ip_adapter:
        processor.requires_grad_(False)
    adapter.requires_grad_(False)
    teacher_processors = list(teacher.attn_processors.values())
    noise = denoiser.noise

    def attend(tokens: Tensor | None) -> None:
        adapter.attend_to(tokens, 0.9)
        for processor in teacher_processors:
            processor.tokens, processor.scale = tokens, 1.0

    def step_loss(step: int, rng: np.random.Generator) -> Tensor:
        rows = torch.from_numpy(rng.integers(len(latents.values), size=BATCH))
        labels = latents.labels[rows]
        states, pooled = text.pick(scene_index(labels[:, 1:]), rng)
        no_text = rng.random(BATCH) < 0.12
        states, pooled = drop(states, no_text), drop(pooled, no_text)
        if step % 3:
            identity, features = sources.pick(labels[:, 0], rng, rng.random(BATCH) < 0.06)
            with torch.no_grad():
                attend(adapter.image_proj(identity, features))
        else:
            attend(None)
        index = rng.integers(len(FEW_STEPS), size=BATCH)
        t = torch.tensor(FEW_STEPS)[torch.from_numpy(index)]
        fresh = torch.randn(BATCH, *latents.values.shape[1:])
        x = noise.add(latents.values[rows].float(), fresh, t)
        x = torch.where((t == FEW_STEPS[0]).view(-1, 1, 1, 1), fresh, x)
        goal, now = x, t
        with torch.no_grad():
            for part in range(substeps):
                after = t - (250 * (part + 1)) // substeps
                goal = noise.ddim(goal, teacher_denoiser(goal, now, states, pooled), now, after)
                now = after.clamp(min=0)
        landed = noise.ddim(x, denoiser(x, t, states, pooled), t, t - 250)
        signal, sigma = noise.levels(t)
        next_signal, next_sigma = noise.levels((t - 250).clamp(min=0))
        # One step moves x by this factor per unit of predicted picture: errors counted there.
        reach = next_signal - next_sigma / sigma * signal
        errors = ((landed - goal) / reach).square().mean(dim=(1, 2, 3))
        return errors.mean()

    train(unet, step_loss, FEW_STEP, work / "few_step.pt", seed + 2)
    adapter.attend_to(None)
    return unet
