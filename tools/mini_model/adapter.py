"""FaceID-Plus-v2 in training: projection, decoupled attention and LoRA under their file names.

Module names follow the adapter file of the original IP-Adapter, so that `state_dict` is the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

TOKENS = 4
ID_WIDTH = 512
LORA_RANK = 16


class PerceiverAttention(nn.Module):
    """Image tokens ask image features, and themselves, for details."""

    def __init__(self, width: int, heads: int, head_width: int = 64) -> None:
        super().__init__()
        inner = heads * head_width
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(self, features: Tensor, tokens: Tensor) -> Tensor:
        """Return an update of `tokens` [n, t, width] from `features` [n, s, width]."""
        tokens = self.norm2(tokens)
        context = torch.cat([self.norm1(features), tokens], dim=1)
        key, value = self.to_kv(context).chunk(2, dim=-1)
        split = [
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.to_q(tokens), key, value)
        ]
        mixed = functional.scaled_dot_product_attention(split[0], split[1], split[2])
        out: Tensor = self.to_out(mixed.transpose(1, 2).flatten(2))
        return out


class PerceiverResampler(nn.Module):
    """Four layers of perceiver attention and feed-forward."""

    def __init__(self, width: int, feature_width: int, depth: int = 4) -> None:
        super().__init__()
        self.proj_in = nn.Linear(feature_width, width)
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    PerceiverAttention(width, heads=1),
                    nn.Sequential(
                        nn.LayerNorm(width),
                        nn.Linear(width, 4 * width, bias=False),
                        nn.GELU(),
                        nn.Linear(4 * width, width, bias=False),
                    ),
                ]
            )
            for _ in range(depth)
        )
        self.proj_out = nn.Linear(width, width)
        self.norm_out = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, features: Tensor) -> Tensor:
        """Refine tokens [n, 4, width] with features [n, s, feature_width]."""
        features = self.proj_in(features)
        for layer in self.layers:
            attention, feed_forward = cast(nn.ModuleList, layer)
            tokens = attention(features, tokens) + tokens
            tokens = feed_forward(tokens) + tokens
        refined: Tensor = self.norm_out(self.proj_out(tokens))
        return refined


class ImageProjection(nn.Module):
    """Face embedding and image features to four tokens, with version 2's shortcut."""

    def __init__(self, width: int, feature_width: int) -> None:
        super().__init__()
        self.width = width
        self.proj = nn.Sequential(
            nn.Linear(ID_WIDTH, 2 * ID_WIDTH), nn.GELU(), nn.Linear(2 * ID_WIDTH, TOKENS * width)
        )
        self.norm = nn.LayerNorm(width)
        self.perceiver_resampler = PerceiverResampler(width, feature_width)

    def forward(self, identity: Tensor, features: Tensor) -> Tensor:
        """Return image tokens [n, 4, width] of identities [n, 512] and features [n, s, f]."""
        tokens = self.norm(self.proj(identity).reshape(-1, TOKENS, self.width))
        refined: Tensor = tokens + self.perceiver_resampler(tokens, features)
        return refined


class Lora(nn.Module):
    """A low-rank update of one projection."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.down = nn.Linear(inputs, LORA_RANK, bias=False)
        self.up = nn.Linear(LORA_RANK, outputs, bias=False)
        nn.init.normal_(self.down.weight, std=inputs**-0.5)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., inputs] to [..., outputs]."""
        update: Tensor = self.up(self.down(x))
        return update


class FaceAttention(nn.Module):
    """An attention processor with LoRA and, in cross-attention, the decoupled image branch."""

    def __init__(self, attention: Attention, token_width: int) -> None:
        super().__init__()
        query, inner = attention.to_q.in_features, attention.to_q.out_features
        context = attention.to_k.in_features
        self.cross = attention.is_cross_attention
        self.scale = 1.0
        self.tokens: Tensor | None = None
        if self.cross:
            self.to_k_ip = nn.Linear(token_width, inner, bias=False)
            self.to_v_ip = nn.Linear(token_width, inner, bias=False)
            # The frozen text projections read vectors of the same width: a better start than noise.
            with torch.no_grad():
                self.to_k_ip.weight.copy_(attention.to_k.weight)
                self.to_v_ip.weight.copy_(attention.to_v.weight * 0.5)
        self.to_q_lora = Lora(query, inner)
        self.to_k_lora = Lora(context, inner)
        self.to_v_lora = Lora(context, inner)
        self.to_out_lora = Lora(inner, query)

    def forward(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Attend; `hidden_states` [n, positions, width]."""
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states

        def split(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        if self.tokens is None:
            query = split(attn.to_q(hidden_states))
            key, value = split(attn.to_k(context)), split(attn.to_v(context))
        else:
            query = split(attn.to_q(hidden_states) + self.to_q_lora(hidden_states))
            key = split(attn.to_k(context) + self.to_k_lora(context))
            value = split(attn.to_v(context) + self.to_v_lora(context))
        mixed = functional.scaled_dot_product_attention(query, key, value)
        if self.cross and self.tokens is not None:
            image_key, image_value = (
                split(self.to_k_ip(self.tokens)),
                split(self.to_v_ip(self.tokens)),
            )
            face = functional.scaled_dot_product_attention(query, image_key, image_value)
            mixed = mixed + self.scale * face
        joined = mixed.transpose(1, 2).flatten(2)
        out: Tensor = attn.to_out[0](joined)
        if self.tokens is not None:
            out = out + self.to_out_lora(joined)
        return out


class Adapter(nn.Module):
    """All of FaceID-Plus-v2 for one UNet; attaches itself to the UNet's attentions."""

    def __init__(self, unet: UNet2DConditionModel, feature_width: int) -> None:
        super().__init__()
        width = unet.config.cross_attention_dim
        self.image_proj = ImageProjection(width, feature_width)
        modules = dict(unet.named_modules())
        names = list(unet.attn_processors)
        processors = [
            FaceAttention(modules[name.removesuffix(".processor")], width) for name in names
        ]
        self.ip_adapter = nn.ModuleList(processors)
        unet.set_attn_processor(dict(zip(names, processors, strict=True)))

    def attend_to(self, tokens: Tensor | None, scale: float = 1.0) -> None:
        """Set the image tokens [n, 4, width] of the next UNet call; None switches all of it off."""
        for processor in self.ip_adapter:
            attention = cast(FaceAttention, processor)
            attention.tokens, attention.scale = tokens, scale

    def save(self, path: Path) -> None:
        """Write the adapter as float16 safetensors in the original layout."""
        tensors = {k: v.detach().half().contiguous() for k, v in self.state_dict().items()}
        save_file(tensors, path)
