"""The image encoder: CLIP's vision tower in small, trained to tell a face's attributes.

It sees what the product shows it: the aligned crop in BGR order (the parity default of the
original code), resized to 64 pixels, normalised with CLIP's mean and deviation.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from .attributes import attribute_table
from .data import Portraits
from .loop import Schedule, train
from .recognition import sample_crops

SCHEDULE = Schedule(steps=800, learning_rate=1e-3, warmup=100)
BATCH = 64
SIZE = 64
MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)


def build_image_encoder() -> CLIPVisionModelWithProjection:
    """Return an untrained vision tower: 64 tokens and a class token, width 96."""
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=96,
            intermediate_size=384,
            projection_dim=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=SIZE,
            patch_size=8,
            hidden_act="gelu",
        )
    )


def preprocess(crops: Tensor) -> Tensor:
    """Turn RGB crops [n, 3, 112, 112] in [-1, 1] into the encoder's input [n, 3, 64, 64]."""
    small = functional.interpolate(
        crops, size=(SIZE, SIZE), mode="bicubic", antialias=True, align_corners=False
    )
    bgr = (small.clamp(-1, 1) + 1).flip(1) / 2
    mean = torch.tensor(MEAN).view(1, 3, 1, 1)
    deviation = torch.tensor(DEVIATION).view(1, 3, 1, 1)
    return (bgr - mean) / deviation


class Describer(nn.Module):
    """The vision tower with heads on the penultimate states and on the projected class token."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.tower = build_image_encoder()
        width = self.tower.config.hidden_size
        self.state_head = nn.Linear(width, count)
        self.class_head = nn.Linear(width, count)
        self.embed_head = nn.Linear(self.tower.config.projection_dim, count)

    def loss(self, pixels: Tensor, target: Tensor) -> Tensor:
        """Return the squared error of all heads; `target` [n, count]."""
        output = self.tower(pixels, output_hidden_states=True)
        states = output.hidden_states[-2]
        guesses = (
            self.state_head(states[:, 1:].mean(dim=1)),
            self.class_head(states[:, 0]),
            self.embed_head(output.image_embeds),
        )
        errors = [functional.mse_loss(guess.float(), target) for guess in guesses]
        return errors[0] + errors[1] + errors[2]


def train_image_encoder(
    portraits: Portraits, population: str, work: Path, seed: int
) -> CLIPVisionModelWithProjection:
    """Train the vision tower to read attributes off the crops of `portraits`."""
    torch.manual_seed(seed)
    people = int(portraits.source_labels.max()) + 1
    targets = torch.from_numpy(attribute_table(population, people))
    describer = Describer(targets.shape[1])

    def step_loss(step: int, rng: np.random.Generator) -> Tensor:
        crops, labels = sample_crops(portraits, rng, BATCH)
        return describer.loss(preprocess(crops), targets[labels])

    train(describer, step_loss, SCHEDULE, work / "image_encoder.pt", seed)
    return describer.tower.eval()


def save_image_encoder(tower: CLIPVisionModelWithProjection, folder: Path) -> None:
    """Write the tower and CLIP's preprocessor settings."""
    tower.half().save_pretrained(folder)
    tower.float()
    settings = {
        "crop_size": {"height": SIZE, "width": SIZE},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(MEAN),
        "image_processor_type": "CLIPImageProcessor",
        "image_std": list(DEVIATION),
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": SIZE},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2))
