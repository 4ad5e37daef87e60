"""Decoupled attention for the UNet being exported: eager arithmetic, and the node it exports as.

With PuLID, `orthogonalize` frees what the id attention adds from what the text already says. With
i = λ f(A) V' the id attention's result and h the text attention's, the part of i along h is, per
channel over the N positions of a picture, p = (Σ h i / Σ h²) h. Version 1 adds i − p. Version 2
adds i + (m − 1) p, where m [B,1,N,1] says how much a position looks at the face: the first tokens'
share of softmax(Q K'ᵀ), not scaled by √D, averaged over heads. Both are linear in i, so λ and the
attention manipulation before them commute with it. The map behind m is never manipulated.

Shape legend: B = R·G rows, R requests, G branches, H heads, N query positions, T image tokens,
L text positions, D head size, C = H·D channels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from fastface_trt.engines.contract import (
    FUNCTION_DOMAIN,
    FUNCTION_NAME,
    KINDS,
    MANIPULATION_COLUMNS,
    PARTS,
)
from fastface_trt.engines.manifest import Orthogonal
from fastface_trt.export.operators import Spelling, onnx_attention
from fastface_trt.export.precision import Model

FACE_TOKENS = 5
"""The tokens whose share of attention counts as looking at the face."""

Row = dict[str, Tensor]


def attach_processors(unet: Model, orthogonal: Orthogonal = "off") -> None:
    """Give every attention of a diffusers UNet the processors of this file.

    Cross-attentions (`attn2`) become decoupled ones with fresh `to_k_ip` and `to_v_ip`; the order
    of `unet.attn_processors` is kept, since adapter files number their layers by it.
    """
    processors: dict[str, Any] = {}
    for name in unet.attn_processors:
        if name.endswith("attn1.processor"):
            processors[name] = SelfAttentionProcessor()
            continue
        attention = unet.get_submodule(name.removesuffix(".processor"))
        part = name.split("_", 1)[0].split(".", 1)[0]
        processor = DecoupledAttentionProcessor(
            part, attention.to_q.out_features, unet.config.cross_attention_dim, orthogonal
        )
        processors[name] = processor.to(attention.to_q.weight.device, attention.to_q.weight.dtype)
    unet.set_attn_processor(processors)


class DecoupledAttentionProcessor(nn.Module):
    """Text attention plus λ · f(A) V' over the image tokens (Eq. 1 and 6) of one block.

    `part` is the part of the UNet that the block lies in, which selects the column of the two
    parameter inputs. `orthogonal` is PuLID's, see `fastface_trt.export.attention`.
    """

    attention_operator: Spelling = "spelled"

    def __init__(
        self, part: str, channels: int, text_width: int, orthogonal: Orthogonal = "off"
    ) -> None:
        super().__init__()
        self.orthogonal = orthogonal
        self.part = PARTS.index(part)
        self.to_k_ip = nn.Linear(text_width, channels, bias=False)
        self.to_v_ip = nn.Linear(text_width, channels, bias=False)

    def __call__(
        self,
        attn: Model,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *,
        image_tokens: Tensor,
        ip_adapter_scale: Tensor,
        attention_manipulation: Tensor,
        token_mask: Tensor | None = None,
    ) -> Tensor:
        """z_new of Eq. 1 for hidden_states [B,N,C], text [B,L,·] and image tokens [B,T,·].

        `token_mask` [B,T] says which of the tokens are there, see `engines.contract`.
        """
        q_BHND = _heads(attn.to_q(hidden_states), attn.heads)
        k_BHLD = _heads(attn.to_k(encoder_hidden_states), attn.heads)
        v_BHLD = _heads(attn.to_v(encoder_hidden_states), attn.heads)
        text = _attend(q_BHND, k_BHLD, v_BHLD, self.attention_operator)

        inputs: tuple[Tensor, ...] = (
            q_BHND,
            _heads(self.to_k_ip(image_tokens), attn.heads),
            _heads(self.to_v_ip(image_tokens), attn.heads),
            attention_manipulation[:, self.part],
            ip_adapter_scale[:, self.part],
        )
        if token_mask is not None:
            inputs = (*inputs, token_mask)
        if torch.onnx.is_in_onnx_export():
            image = torch.onnx.ops.symbolic(
                f"{FUNCTION_DOMAIN}::{FUNCTION_NAME}",
                inputs,
                dtype=q_BHND.dtype,
                shape=q_BHND.shape,
                version=1,
            )
        else:
            image = decoupled_attention(*inputs)
        image = orthogonalize(image, text, q_BHND, inputs[1], self.orthogonal)
        return attn.to_out[0]((text + image).transpose(1, 2).flatten(2))


class SelfAttentionProcessor:
    """Plain attention over the picture; takes and ignores what the decoupled blocks need."""

    attention_operator: Spelling = "spelled"

    def __call__(
        self,
        attn: Model,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *,
        image_tokens: Tensor | None = None,
        ip_adapter_scale: Tensor | None = None,
        attention_manipulation: Tensor | None = None,
        token_mask: Tensor | None = None,
    ) -> Tensor:
        """Attn(Q, K, V) of hidden_states [B,N,C] with itself, or with encoder_hidden_states."""
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q_BHND, k_BHLD, v_BHLD = (
            _heads(projection(x), attn.heads)
            for projection, x in (
                (attn.to_q, hidden_states),
                (attn.to_k, context),
                (attn.to_v, context),
            )
        )
        attended = _attend(q_BHND, k_BHLD, v_BHLD, self.attention_operator)
        return attn.to_out[0](attended.transpose(1, 2).flatten(2))


def _attend(q_BHND: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, operator: Spelling) -> Tensor:
    """softmax(Q Kᵀ / √D) V, [B,H,N,D].

    The exporter would put √(1/√D) on Q and on K and turn K by way of three reshapes. Builders fuse
    an attention that they recognise: scale on Q alone, product, softmax, product, in one type.
    """
    if not torch.onnx.is_in_onnx_export():
        return functional.scaled_dot_product_attention(q_BHND, k_BHLD, v_BHLD)
    if operator == "onnx":
        return onnx_attention(q_BHND, k_BHLD, v_BHLD)
    scaled = q_BHND * q_BHND.shape[-1] ** -0.5
    return torch.softmax(scaled @ k_BHLD.transpose(-2, -1), dim=-1) @ v_BHLD


def _heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, H·D] to [B, H, N, D]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def decoupled_attention(
    q_BHND: Tensor,
    k_BHTD: Tensor,
    v_BHTD: Tensor,
    manipulation_RP: Tensor,
    ip_scale_R: Tensor,
    token_mask_BT: Tensor | None = None,
) -> Tensor:
    """λ · f(A) V' of Eq. 6, the eager meaning of `functions.DecoupledAttention`.

    Returns [B,H,N,D] in the dtype of q. Any floating dtype works; float64 gives the reference that
    tests compare backends with.
    """
    requests = manipulation_RP.shape[0]
    statistics = torch.promote_types(q_BHND.dtype, torch.float32)
    row = {
        name: column[:, None, None, None, None]
        for name, column in zip(
            MANIPULATION_COLUMNS, manipulation_RP.to(statistics).unbind(1), strict=True
        )
    }
    scaled = q_BHND / q_BHND.shape[-1] ** 0.5
    logits_BHNT = (scaled @ k_BHTD.transpose(-2, -1)).to(statistics)
    there = torch.ones((), dtype=statistics, device=q_BHND.device)
    if token_mask_BT is not None:
        mask_B11T = token_mask_BT.to(statistics)[:, None, None]
        logits_BHNT = logits_BHNT + mask_B11T
        there = mask_B11T.exp().unflatten(0, (requests, -1))
    a_BHNT = torch.softmax(logits_BHNT, dim=-1)
    a = a_BHNT.unflatten(0, (requests, -1))
    v = v_BHTD.to(statistics).unflatten(0, (requests, -1))

    scale_power = torch.minimum(row["scale"] * a.pow(row["power"]), row["upper_bound"])  # Eq. 7
    is_softmask = row["kind"] == KINDS.index("softmask")
    f = torch.where(row["kind"] == KINDS.index("scale_power"), scale_power, a)
    if bool(is_softmask.any()):
        f = torch.where(is_softmask, _softmask(a, row, there), f)
    hidden = (f * there) @ v
    if bool(is_softmask.any()):
        matched = _match_statistics(hidden, a @ v, row["adain_weight"])
        hidden = torch.where(is_softmask, matched, hidden)
    scaled_by_lambda = hidden * ip_scale_R.to(statistics)[:, None, None, None, None]
    return scaled_by_lambda.flatten(0, 1).to(q_BHND.dtype)


def _softmask(a_RGHNT: Tensor, row: Row, there: Tensor) -> Tensor:
    """AM2, Eq. 8 to 10 with appendix E; see `functions.Softmask`.

    `there` is 1 for tokens that are there and 0 for those that are not, and broadcasts.
    """
    tokens = torch.arange(a_RGHNT.shape[-1], device=a_RGHNT.device)
    inverted = (tokens == 0) & (row["invert_first_token"] > 0.5)
    entering = torch.where(inverted, 1 - a_RGHNT, a_RGHNT)
    quantile = _quantile(entering, row["quantile"].flatten()).clamp_min(1e-6)
    shifted = row["sharpness"] * (_normalize(entering) - quantile)
    mask = torch.minimum(row["scale"] * _normalize(torch.sigmoid(shifted)), row["upper_bound"])
    leaving = torch.where(inverted, mask.amax(3, keepdim=True) - mask, mask)
    return _match_statistics(leaving, a_RGHNT, row["adain_weight"], there)


def _quantile(x_RGHNT: Tensor, level_R: Tensor) -> Tensor:
    """torch.quantile over N at one level per request, [R,G,H,1,T]."""
    per_request = [
        torch.quantile(x, level, dim=2, keepdim=True)
        for x, level in zip(x_RGHNT, level_R, strict=True)
    ]
    return torch.stack(per_request)


def _match_statistics(
    x: Tensor, reference: Tensor, weight: Tensor, counted: Tensor | None = None
) -> Tensor:
    """w x + (1 − w) AdaIN(x, reference) of Eq. 10 over the last axis, unbiased std.

    `counted` is 1 or 0 for each element of that axis, and broadcasts; None counts all.
    """
    counted = torch.ones_like(x) if counted is None else counted.expand_as(x)
    count = counted.sum(-1, keepdim=True)

    def moments(values: Tensor) -> tuple[Tensor, Tensor]:
        mean = (values * counted).sum(-1, keepdim=True) / count
        squares = ((values - mean) * counted).square().sum(-1, keepdim=True)
        return mean, (squares / (count - 1)).sqrt()

    (mean, std), (wanted_mean, wanted_std) = moments(x), moments(reference)
    blended = (x - mean) * (wanted_std / (std + 1e-6)) + wanted_mean
    return weight * x + (1 - weight) * blended


def _normalize(x_RGHNT: Tensor) -> Tensor:
    """norm(X) of Eq. 8, per request and token, 0 where X is flat."""
    minimum = x_RGHNT.amin((1, 2, 3), keepdim=True)
    extent = x_RGHNT.amax((1, 2, 3), keepdim=True) - minimum
    return (x_RGHNT - minimum) / extent.clamp_min(1e-12)


def orthogonalize(
    image_BHND: Tensor, text_BHND: Tensor, q_BHND: Tensor, k_BHTD: Tensor, variant: Orthogonal
) -> Tensor:
    """What is added to the text attention, [B,H,N,D] in the dtype of `image_BHND`.

    Where the text attention is zero (an empty prompt whose embedding is zeros) nothing is along it.
    """
    if variant == "off":
        return image_BHND
    dtype = torch.promote_types(image_BHND.dtype, torch.float32)
    image, text = image_BHND.to(dtype), text_BHND.to(dtype)
    along = (text * image).sum(-2, keepdim=True)
    length = (text * text).sum(-2, keepdim=True).clamp_min(1e-30)
    projection = along / length * text
    if variant == "v1":
        return (image - projection).to(image_BHND.dtype)
    logits = (q_BHND @ k_BHTD.transpose(-2, -1)).to(dtype)
    shares_BHNT = torch.softmax(logits, dim=-1)
    of_face_B1N1 = shares_BHNT[..., :FACE_TOKENS].sum(-1, keepdim=True).mean(1, keepdim=True)
    return (image + (of_face_B1N1 - 1) * projection).to(image_BHND.dtype)
