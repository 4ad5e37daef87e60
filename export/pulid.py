"""The id encoders of PuLID for SDXL: an embedding and a picture's features in, id tokens out.

Version 1.1 (`IDFormer`) lets learned queries read the features, version 1 (`IDEncoder`) is made of
MLPs alone. Parameter names are those of the published files' `id_adapter` part, so it loads as it
is; the arithmetic is that of PuLID's public code (Guo et al. 2024).

Shape legend: B rows, E face-embedding size (512), P width of the picture's embedding (768), V = 5
levels of the vision tower, S positions of a level, K its width (1024), I id tokens (5), Q queries
(32), T tokens with the zero ones, W inner width, C text width of the UNet.
"""

from collections.abc import Sequence
from typing import ClassVar, cast

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from fastface_trt.engines.manifest import Dimension
from fastface_trt.export.projection import PerceiverAttention, feed_forward

EMBEDDING = 512
LEVELS = 5
ID_TOKENS = 5

State = dict[str, Tensor]


def _mapping(sizes: Sequence[int]) -> nn.Sequential:
    """Three linear layers, the first two normalised and leaky: every MLP of PuLID."""
    return nn.Sequential(
        nn.Linear(sizes[0], sizes[1]),
        nn.LayerNorm(sizes[1]),
        nn.LeakyReLU(),
        nn.Linear(sizes[1], sizes[2]),
        nn.LayerNorm(sizes[2]),
        nn.LeakyReLU(),
        nn.Linear(sizes[2], sizes[3]),
    )


def _mapping_sizes(state: State, name: str) -> tuple[int, ...]:
    first, second, third = (state[f"{name}.{layer}.weight"].shape for layer in (0, 3, 6))
    return first[1], first[0], second[0], third[0]


class _IdEncoder(nn.Module):
    """What both versions share: their inputs, and the zero tokens behind the others.

    A zero token has a key and a value of zero, so it takes attention away from the face: with more
    of them a picture is easier to edit and less alike.
    """

    def __init__(self, *, tokens: int, width: int, identity: int, zero_tokens: int) -> None:
        super().__init__()
        self.tokens = tokens + zero_tokens
        self.width = width
        self.zero_tokens = zero_tokens
        self._identity = identity

    def input_shapes(self, positions: Dimension) -> dict[str, tuple[Dimension, ...]]:
        """Shapes of the inputs by name, without rows, for so many positions of the tower."""
        mapping = cast(nn.Sequential, self.get_submodule("mapping_0"))
        features = cast(nn.Linear, mapping[0]).in_features
        return {
            "face_embeds": (EMBEDDING,),
            "clip_embeds": (self._identity - EMBEDDING,),
            "clip_hidden_states": (LEVELS, positions, features),
        }

    def _with_zero_tokens(self, tokens_BTC: Tensor) -> Tensor:
        return functional.pad(tokens_BTC, (0, 0, 0, self.zero_tokens))


class IDFormer(_IdEncoder):
    """PuLID 1.1: queries and id tokens attend to one level of the tower after the other."""

    default_zero_tokens: ClassVar[int] = 20
    """Of PuLID's demonstration of this version."""

    def __init__(
        self,
        *,
        queries: int = 32,
        width: int = 1024,
        inner: int = 1024,
        hidden: int = 4096,
        depth: int = 10,
        output: int = 2048,
        identity: Sequence[int] = (1280, 1024, 1024, 1024 * ID_TOKENS),
        features: Sequence[int] = (1024, 1024, 1024, 1024),
        zero_tokens: int = 0,
    ) -> None:
        super().__init__(
            tokens=queries, width=output, identity=identity[0], zero_tokens=zero_tokens
        )
        self.latents = nn.Parameter(torch.randn(1, queries, width) * width**-0.5)
        self.proj_out = nn.Parameter(torch.randn(width, output) * width**-0.5)
        self.layers = nn.ModuleList(
            nn.ModuleList((PerceiverAttention(width, inner), feed_forward(width, hidden)))
            for _ in range(depth)
        )
        for level in range(LEVELS):
            self.add_module(f"mapping_{level}", _mapping(features))
        self.id_embedding_mapping = _mapping(identity)

    @classmethod
    def from_state_dict(cls, state: State, zero_tokens: int | None = None) -> "IDFormer":
        """Build and load from a file's `id_adapter` part; sizes are read off its tensors."""
        module = cls(
            queries=state["latents"].shape[1],
            width=state["latents"].shape[2],
            inner=state["layers.0.0.to_q.weight"].shape[0],
            hidden=state["layers.0.1.1.weight"].shape[0],
            depth=len({key.split(".")[1] for key in state if key.startswith("layers.")}),
            output=state["proj_out"].shape[1],
            identity=_mapping_sizes(state, "id_embedding_mapping"),
            features=_mapping_sizes(state, "mapping_0"),
            zero_tokens=cls.default_zero_tokens if zero_tokens is None else zero_tokens,
        )
        module.load_state_dict(state)
        return module

    def forward(
        self, face_embeds: Tensor, clip_embeds: Tensor, clip_hidden_states: Tensor
    ) -> Tensor:
        """Id tokens [B,T,C] from [B,E] of ArcFace's own length, [B,P] of length 1, [B,V,S,K]."""
        identity = self.id_embedding_mapping(torch.cat((face_embeds, clip_embeds), dim=-1))
        identity_BIW = identity.unflatten(-1, (-1, self.latents.shape[-1]))
        queries_BQW = self.latents.expand(identity_BIW.shape[0], -1, -1)
        tokens = torch.cat((queries_BQW, identity_BIW), dim=1)
        per_level = len(self.layers) // LEVELS
        for index, layer in enumerate(self.layers):
            level = index // per_level
            if index % per_level == 0:
                features_BSW = self.get_submodule(f"mapping_{level}")(clip_hidden_states[:, level])
                context = torch.cat((identity_BIW, features_BSW), dim=1)
            attention, forward = cast(nn.ModuleList, layer)
            tokens = attention(context, tokens) + tokens
            tokens = forward(tokens) + tokens
        return self._with_zero_tokens(tokens[:, : self.latents.shape[1]] @ self.proj_out)


class IDEncoder(_IdEncoder):
    """PuLID 1: five tokens of the embeddings, and one of each level of the tower."""

    default_zero_tokens: ClassVar[int] = 8
    """Of PuLID's demonstration of this version, in its mode for fidelity."""

    def __init__(
        self,
        *,
        output: int = 2048,
        identity: Sequence[int] = (1280, 1024, 1024, 2048 * ID_TOKENS),
        features: Sequence[int] = (1024, 1024, 1024, 2048),
        zero_tokens: int = 0,
    ) -> None:
        super().__init__(
            tokens=identity[3] // output + LEVELS,
            width=output,
            identity=identity[0],
            zero_tokens=zero_tokens,
        )
        self.body = _mapping(identity)
        for level in range(LEVELS):
            self.add_module(f"mapping_{level}", _mapping(features))
            self.add_module(f"mapping_patch_{level}", _mapping(features))

    @classmethod
    def from_state_dict(cls, state: State, zero_tokens: int | None = None) -> "IDEncoder":
        """Build and load from a file's `id_adapter` part; sizes are read off its tensors."""
        features = _mapping_sizes(state, "mapping_0")
        module = cls(
            output=features[3],
            identity=_mapping_sizes(state, "body"),
            features=features,
            zero_tokens=cls.default_zero_tokens if zero_tokens is None else zero_tokens,
        )
        module.load_state_dict(state)
        return module

    def forward(
        self, face_embeds: Tensor, clip_embeds: Tensor, clip_hidden_states: Tensor
    ) -> Tensor:
        """Id tokens [B,T,C]; inputs as of `IDFormer.forward`."""
        identity = self.body(torch.cat((face_embeds, clip_embeds), dim=-1))
        tokens = [identity.unflatten(-1, (-1, self.width))]
        for level in range(LEVELS):
            states_BSK = clip_hidden_states[:, level]
            of_picture = self.get_submodule(f"mapping_{level}")(states_BSK[:, :1])
            of_patches = self.get_submodule(f"mapping_patch_{level}")(states_BSK[:, 1:])
            tokens.append(of_picture + of_patches.mean(dim=1, keepdim=True))
        return self._with_zero_tokens(torch.cat(tokens, dim=1))
