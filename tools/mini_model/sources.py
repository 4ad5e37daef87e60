"""Source faces as the adapter sees them: embeddings and image features, computed once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import CLIPVisionModelWithProjection

from .data import Portraits
from .files import load_state, save_state
from .image_encoder import SIZE, preprocess
from .recognition import Recogniser, embed
from .vae import to_tensor


@dataclass(frozen=True)
class Sources:
    """What the adapter knows about source pictures.

    Attributes:
        embeddings: recogniser outputs [m, 512], normalised; `count` rows per identity, in order.
        features: penultimate states of the image encoder [m, s, f].
        blank: the same of an all-zero input [1, s, f].
        count: sources per identity.
    """

    embeddings: Tensor
    features: Tensor
    blank: Tensor
    count: int

    def pick(
        self, identities: Tensor, rng: np.random.Generator, dropped: npt.NDArray[np.bool_]
    ) -> tuple[Tensor, Tensor]:
        """Return embeddings [n, 512] and features [n, s, f] of a random source per identity.

        Dropped rows get what the pipeline's unconditional branch gets: a zero embedding, and the
        features of an all-zero picture.
        """
        chosen = torch.from_numpy(rng.integers(self.count, size=len(identities)))
        rows = identities * self.count + chosen
        gone = torch.from_numpy(dropped)
        features = self.features[rows].float()
        features[gone] = self.blank.float()
        embeddings = self.embeddings[rows].float()
        embeddings[gone] = 0
        return embeddings, features


@torch.no_grad()
def encode_features(tower: CLIPVisionModelWithProjection, pixels: Tensor) -> Tensor:
    """Return the penultimate hidden states [n, s, f] of inputs [n, 3, 64, 64]."""
    parts = [
        tower(pixels[start : start + 128], output_hidden_states=True).hidden_states[-2]
        for start in range(0, len(pixels), 128)
    ]
    return torch.cat(parts)


def prepare_sources(
    portraits: Portraits,
    people: int,
    recogniser: Recogniser,
    tower: CLIPVisionModelWithProjection,
    path: Path,
) -> Sources:
    """Encode the source crops of the first people once, or read what an earlier run encoded."""
    count = int(np.bincount(portraits.source_labels).max())
    first = not dist.is_initialized() or dist.get_rank() == 0
    if first and not path.exists():
        crops = to_tensor(np.array(portraits.sources[: people * count]))
        state = {
            "embeddings": embed(recogniser, crops),
            "features": encode_features(tower, preprocess(crops)).half(),
            "blank": encode_features(tower, torch.zeros(1, 3, SIZE, SIZE)),
        }
        save_state(path, state)
    if dist.is_initialized():
        dist.barrier()
    state = load_state(path)
    return Sources(state["embeddings"], state["features"], state["blank"], count)
