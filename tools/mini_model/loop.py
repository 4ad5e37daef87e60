"""One resumable training loop for every stage."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from .files import load_state, save_state

LossFunction = Callable[[int, np.random.Generator], Tensor]


@dataclass(frozen=True)
class Schedule:
    """Length and learning rate of a stage."""

    steps: int
    learning_rate: float
    warmup: int = 100
    weight_decay: float = 0.01
    ema: float = 0.0
    save_seconds: float = 120.0

    def rate(self, step: int) -> float:
        """Return the learning rate: linear warm-up, then a cosine down to 2 %."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


class Average:
    """Exponential moving average of a network's parameters."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = [p.detach().clone() for p in network.parameters() if p.requires_grad]

    def update(self, network: nn.Module, step: int) -> None:
        """Move the average toward the network; early on it follows quickly."""
        decay = min(self.decay, (1 + step) / (10 + step))
        current = [p.detach() for p in network.parameters() if p.requires_grad]
        torch._foreach_lerp_(self.values, current, 1 - decay)

    @torch.no_grad()
    def copy_to(self, network: nn.Module) -> None:
        """Write the average into the network."""
        trained = [p for p in network.parameters() if p.requires_grad]
        for parameter, value in zip(trained, self.values, strict=True):
            parameter.copy_(value)


def train(
    network: nn.Module,
    loss_function: LossFunction,
    schedule: Schedule,
    path: Path,
    seed: int,
    on_save: Callable[[nn.Module], None] | None = None,
) -> nn.Module:
    """Train `network` in place; continue from `path` where an earlier run stopped.

    Args:
        network: whatever is trained; parameters without `requires_grad` stay as they are.
        loss_function: maps (step, random generator) to a scalar loss.  The generator depends on
            the seed and the step only, so a resumed run sees what an uninterrupted one would.
        schedule: steps, learning rate and averaging.
        path: checkpoint file; its folder is made where it is missing.
        seed: of the stage.
        on_save: called with a copy holding the averaged weights after every checkpoint.

    Returns:
        The network, with averaged weights where the schedule asks for them, in eval mode.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained,
        schedule.learning_rate,
        betas=(0.9, 0.99),
        weight_decay=schedule.weight_decay,
        # Not fused: that kernel walks raw memory, and gradients may be laid out unlike weights.
        foreach=True,
    )
    average = Average(network, schedule.ema) if schedule.ema else None
    start = 0
    state = load_state(path)
    if state is not None:
        start = state["step"]
        network.load_state_dict(state["network"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        if average is not None:
            average.values = state["average"]
    network.train()
    begun = saved = time.monotonic()
    mean_loss = 0.0
    for step in range(start, schedule.steps):
        torch.manual_seed((seed * 1_000_003 + step) * 64 + rank)
        rng = np.random.default_rng([seed, step, rank])
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        loss = loss_function(step, rng)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if dist.is_initialized():
            share_gradients(trained)
        norm = nn.utils.clip_grad_norm_(trained, 1.0)
        if torch.isfinite(norm):
            optimizer.step()
        if average is not None:
            average.update(network, step)
        value = float(loss.detach())
        mean_loss = value if step == start else mean_loss * 0.98 + value * 0.02
        if rank == 0 and (step % 100 == 0 or step + 1 == schedule.steps):
            pace = (step + 1 - start) / (time.monotonic() - begun)
            print(
                f"{path.stem} {step + 1}/{schedule.steps} loss {mean_loss:.5f} {pace:.2f} steps/s",
                flush=True,
            )
        due = time.monotonic() - saved > schedule.save_seconds or step + 1 == schedule.steps
        if rank == 0 and due:
            saved = time.monotonic()
            save_state(
                path,
                {
                    "step": step + 1,
                    "network": _trained_state(network),
                    "optimizer": optimizer.state_dict(),
                    "average": average.values if average is not None else [],
                },
            )
            if on_save is not None:
                shown = copy.deepcopy(network)
                if average is not None:
                    average.copy_to(shown)
                on_save(shown.eval())
    if average is not None:
        average.copy_to(network)
    return network.eval()


def share_gradients(parameters: list[nn.Parameter]) -> None:
    """Average the gradients over all processes, in one message."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def _trained_state(network: nn.Module) -> dict[str, Tensor]:
    """Return the trained parameters and all buffers; frozen parameters are known anyway."""
    frozen = {name for name, p in network.named_parameters() if not p.requires_grad}
    return {name: value for name, value in network.state_dict().items() if name not in frozen}
