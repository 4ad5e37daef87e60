"""Pre-computed training data of the diffusion stages, and their common loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...mini.prompts import (
    ACTION_NAMES,
    PLACE_NAMES,
    STYLE_NAMES,
    Scene,
    all_scenes,
    canonical_prompt,
    varied_prompt,
)
from .text import Reader, load_tokenizers, tokenize

WORDINGS = 4


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


def scenes_of(labels: Tensor) -> list[Scene]:
    """Return the scenes named by (style, place, action) labels [n, 3]."""
    rows = labels.tolist()
    return [Scene(STYLE_NAMES[s], PLACE_NAMES[p], ACTION_NAMES[a]) for s, p, a in rows]
