"""The face projections of IP-Adapter FaceID and FaceID-Plus-v2: embeddings in, image tokens out.

Parameter names are those of the published adapter files, so a file's `image_proj` part loads as it
is. Shape legend: B rows, E face-embedding size (512), S CLIP positions, K CLIP width, T tokens,
C text width of the UNet, I inner width of the resampler.
"""

from typing import cast

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from fastface_trt.engines.manifest import Dimension

HEAD_SIZE = 64


class PerceiverAttention(nn.Module):
    """Tokens attend to the CLIP features and to themselves; the width of a head is 64."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.heads = max(1, inner // HEAD_SIZE)
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, inner * 2, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(self, features_BSC: Tensor, tokens_BTC: Tensor) -> Tensor:
        """Attended tokens [B,T,C]."""
        features = self.norm1(features_BSC)
        tokens = self.norm2(tokens_BTC)
        q_BTI = self.to_q(tokens)
        k_BSI, v_BSI = self.to_kv(torch.cat((features, tokens), dim=1)).chunk(2, dim=-1)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q_BTI, k_BSI, v_BSI))
        attended = functional.scaled_dot_product_attention(q, k, v)
        return self.to_out(attended.transpose(1, 2).flatten(2))


def feed_forward(width: int, inner: int) -> nn.Sequential:
    """The MLP of a resampler's layer, its norm first."""
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, inner, bias=False),
        nn.GELU(),
        nn.Linear(inner, width, bias=False),
    )


class PerceiverResampler(nn.Module):
    """Layers of attention and feed-forward that let the tokens read the CLIP features."""

    def __init__(
        self, width: int, inner: int, hidden: int, depth: int, features: int, output: int
    ) -> None:
        super().__init__()
        self.proj_in = nn.Linear(features, width)
        self.proj_out = nn.Linear(width, output)
        self.norm_out = nn.LayerNorm(output)
        self.layers = nn.ModuleList(
            nn.ModuleList((PerceiverAttention(width, inner), feed_forward(width, hidden)))
            for _ in range(depth)
        )

    def forward(self, tokens_BTC: Tensor, features_BSK: Tensor) -> Tensor:
        """Resampled tokens [B,T,C]."""
        features = self.proj_in(features_BSK)
        for layer in self.layers:
            attention, feed_forward = cast(nn.ModuleList, layer)
            tokens_BTC = attention(features, tokens_BTC) + tokens_BTC
            tokens_BTC = feed_forward(tokens_BTC) + tokens_BTC
        return self.norm_out(self.proj_out(tokens_BTC))


def _mlp_sizes(state: dict[str, Tensor]) -> dict[str, int]:
    """Sizes of the MLP that both adapters begin with."""
    width = state["norm.weight"].shape[0]
    return {
        "tokens": state["proj.2.weight"].shape[0] // width,
        "embedding": state["proj.0.weight"].shape[1],
        "mlp_hidden": state["proj.0.weight"].shape[0],
        "width": width,
    }


class FaceIdProjection(nn.Module):
    """FaceID: tokens = norm(MLP(embedding)), which are all that the UNet learns of a face."""

    def __init__(
        self, *, tokens: int = 4, embedding: int = 512, mlp_hidden: int = 1024, width: int = 2048
    ) -> None:
        super().__init__()
        self.tokens = tokens
        self.width = width
        self._embedding = embedding
        self.proj = nn.Sequential(
            nn.Linear(embedding, mlp_hidden), nn.GELU(), nn.Linear(mlp_hidden, width * tokens)
        )
        self.norm = nn.LayerNorm(width)

    def input_shapes(self, positions: Dimension) -> dict[str, tuple[Dimension, ...]]:
        """Shapes of the inputs by name, without rows."""
        return {"face_embeds": (self._embedding,)}

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor]) -> "FaceIdProjection":
        """Build and load from a file's `image_proj` part; sizes are read off its tensors."""
        module = cls(**_mlp_sizes(state))
        module.load_state_dict(state)
        return module

    def forward(self, face_embeds: Tensor) -> Tensor:
        """Image tokens [B,T,C] from face embeddings [B,E]."""
        return self.norm(self.proj(face_embeds).unflatten(-1, (self.tokens, -1)))


class FaceProjection(nn.Module):
    """tokens = MLP(embedding); out = tokens + shortcut_scale · resampler(tokens, CLIP features)."""

    def __init__(
        self,
        *,
        tokens: int = 4,
        embedding: int = 512,
        mlp_hidden: int = 1024,
        features: int = 1280,
        width: int = 2048,
        inner: int = 2048,
        hidden: int = 8192,
        depth: int = 4,
        shortcut_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.tokens = tokens
        self.width = width
        self._embedding = embedding
        self.shortcut_scale = shortcut_scale
        self.proj = nn.Sequential(
            nn.Linear(embedding, mlp_hidden), nn.GELU(), nn.Linear(mlp_hidden, width * tokens)
        )
        self.norm = nn.LayerNorm(width)
        self.perceiver_resampler = PerceiverResampler(width, inner, hidden, depth, features, width)

    def input_shapes(self, positions: Dimension) -> dict[str, tuple[Dimension, ...]]:
        """Shapes of the inputs by name, without rows, for so many CLIP positions."""
        features = self.perceiver_resampler.proj_in.in_features
        return {
            "face_embeds": (self._embedding,),
            "clip_embeds": (positions, features),
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor]) -> "FaceProjection":
        """Build and load from a file's `image_proj` part; sizes are read off its tensors."""
        resampler = "perceiver_resampler."
        depth = len({k.split(".")[2] for k in state if k.startswith(resampler + "layers.")})
        module = cls(
            **_mlp_sizes(state),
            features=state[resampler + "proj_in.weight"].shape[1],
            inner=state[resampler + "layers.0.0.to_q.weight"].shape[0],
            hidden=state[resampler + "layers.0.1.1.weight"].shape[0],
            depth=depth,
        )
        module.load_state_dict(state)
        return module

    def forward(self, face_embeds: Tensor, clip_embeds: Tensor) -> Tensor:
        """Image tokens [B,T,C] from face embeddings [B,E] and CLIP features [B,S,K]."""
        tokens_BTC = self.norm(self.proj(face_embeds).unflatten(-1, (self.tokens, -1)))
        return tokens_BTC + self.shortcut_scale * self.perceiver_resampler(tokens_BTC, clip_embeds)
