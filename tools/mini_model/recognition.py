"""Face recognisers: 112 x 112 aligned crops to 512 numbers, trained with a cosine margin."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from .attributes import attribute_table
from .crops import crop_faces
from .data import Portraits
from .layers import ConvBlock, ResidualBlock, channels_last
from .loop import Schedule, train
from .vae import to_tensor

MARGIN, SCALE = 0.25, 16.0
BATCH = 96


class Recogniser(nn.Module):
    """A small residual network; `widths` gives the channels at 56, 28, 14 and 7 pixels."""

    def __init__(self, widths: tuple[int, int, int, int], hidden: int) -> None:
        super().__init__()
        first, second, third, fourth = widths
        self.body = nn.Sequential(
            nn.AvgPool2d(2),
            ConvBlock(3, first, stride=2),
            ConvBlock(first, second, stride=2),
            ResidualBlock(second),
            ConvBlock(second, third, stride=2),
            ResidualBlock(third),
            ConvBlock(third, fourth),
            ResidualBlock(fourth),
            nn.Conv2d(fourth, 32, 1),
        )
        self.head = nn.Sequential(
            nn.Flatten(),
            nn.Linear(32 * 49, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, 512),
            nn.BatchNorm1d(512),
        )

    def forward(self, crops: Tensor) -> Tensor:
        """Map crops [n, 3, 112, 112] in [-1, 1], RGB, to embeddings [n, 512], not normalised."""
        embedding: Tensor = self.head(self.body(crops))
        return embedding


class Margin(nn.Module):
    """Pictures of one person must be nearer to each other, by a margin, than to all others.

    The comparison runs within the batch: class centres of thousands of people learn too slowly.
    A second head reads the attributes off the embedding; forty numbers that say what differs
    between faces are a strong signal from the first step on.
    """

    def __init__(self, attributes: Tensor) -> None:
        super().__init__()
        self.reader = nn.Linear(512, attributes.shape[1])
        self.attributes = attributes

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of embeddings [n, 512] (not normalised) with identities `labels` [n]."""
        unit = functional.normalize(embeddings.float(), dim=-1)
        same = (labels[:, None] == labels[None]).float()
        itself = torch.eye(len(labels), dtype=torch.bool)
        logits = SCALE * (unit @ unit.T - MARGIN * same).masked_fill(itself, -1e4)
        # Each positive competes with the negatives alone, not with other positives.
        negatives = logits.masked_fill(same > 0, -1e4).logsumexp(dim=1, keepdim=True)
        losses = functional.softplus(negatives - logits) * (same - itself.float())
        identity = losses.sum() / (same.sum() - len(labels))
        return identity + 4 * functional.mse_loss(self.reader(unit * 8), self.attributes[labels])


def augment(crops: Tensor, rng: np.random.Generator) -> Tensor:
    """Blur, shift brightness and colour a little: generated pictures are not drawn ones."""
    if rng.random() < 0.4:
        size = int(rng.integers(40, 90))
        small = functional.interpolate(crops, size=(size, size), mode="area")
        crops = functional.interpolate(small, size=(112, 112), mode="bilinear")
    gain = torch.from_numpy(rng.uniform(0.88, 1.12, (len(crops), 3, 1, 1)).astype(np.float32))
    shift = torch.from_numpy(rng.uniform(-0.08, 0.08, (len(crops), 1, 1, 1)).astype(np.float32))
    noise = torch.randn(crops.shape) * float(rng.uniform(0, 0.05))
    return crops * gain + shift + noise


def sample_crops(
    portraits: Portraits, rng: np.random.Generator, batch: int, views: int = 4
) -> tuple[Tensor, Tensor]:
    """Return augmented crops [batch, 3, 112, 112] and identities [batch], `views` of each person.

    One view per person is a photo-like source, the others are pictures in any style.
    """
    people = len(portraits.sources) // int(np.bincount(portraits.source_labels).max())
    chosen = np.sort(rng.choice(people, batch // views, replace=False))
    pictures, sources = len(portraits.pictures) // people, len(portraits.sources) // people
    rows = (
        chosen[:, None] * pictures + rng.integers(pictures, size=(len(chosen), views - 1))
    ).ravel()
    points = portraits.points[rows] + rng.normal(0, 0.7, (len(rows), 5, 2))
    drawn = crop_faces(
        to_tensor(portraits.pictures[rows]), torch.from_numpy(points.astype(np.float32))
    )
    source_rows = chosen * sources + rng.integers(sources, size=len(chosen))
    crops = torch.cat([drawn, to_tensor(portraits.sources[source_rows])])
    labels = np.concatenate([portraits.labels[rows, 0], portraits.source_labels[source_rows]])
    return augment(crops, rng), torch.from_numpy(labels)


def train_recogniser(
    portraits: Portraits,
    population: str,
    widths: tuple[int, int, int, int],
    hidden: int,
    schedule: Schedule,
    path: Path,
    seed: int,
) -> Recogniser:
    """Train a recogniser on the people of `portraits`."""
    torch.manual_seed(seed)
    network = channels_last(Recogniser(widths, hidden))
    table = attribute_table(population, int(portraits.source_labels.max()) + 1)
    margin = Margin(torch.from_numpy(table))
    both = nn.ModuleDict({"network": network, "margin": margin})

    def step_loss(step: int, rng: np.random.Generator) -> Tensor:
        crops, labels = sample_crops(portraits, rng, BATCH)
        with torch.autocast("cpu", torch.bfloat16):
            embeddings = network(crops.contiguous(memory_format=torch.channels_last))
        loss: Tensor = margin(embeddings, labels)
        return loss

    train(both, step_loss, schedule, path, seed)
    return network.eval()


@torch.no_grad()
def embed(network: Recogniser, crops: Tensor, batch: int = 128) -> Tensor:
    """Return normalised embeddings [n, 512] of crops [n, 3, 112, 112] in [-1, 1], RGB."""
    parts = [network(crops[start : start + batch]) for start in range(0, len(crops), batch)]
    return functional.normalize(torch.cat(parts), dim=-1)
