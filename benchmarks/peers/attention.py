"""Decoupled attention as a PyTorch program has it: one branch of Python per kind, nothing unused.

The export's own eager arithmetic computes every kind and chooses, since its parameters are inputs;
timing that as the peer would flatter this project. The mathematics is that of section 3 of the
method: Eq. 1 and 6 to 10 and appendix E.

Shape legend: B rows (the branches of one request), H heads, N query positions, L text positions,
T image tokens, D head size, C = H·D channels.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as functional
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn

from fastface_trt.engines.contract import MANIPULATION_COLUMNS, PARTS
from fastface_trt.runtime.manipulation import AttentionManipulation

Numbers = Mapping[str, Tensor]


def _range_normalised(x_BHNT: Tensor) -> Tensor:
    low, high = x_BHNT.amin((0, 1, 2)), x_BHNT.amax((0, 1, 2))
    return (x_BHNT - low) / (high - low)


def _adain(x: Tensor, reference: Tensor, weight: Tensor) -> Tensor:
    """Eq. 10 over the last axis."""
    mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
    own_mean, own_std = reference.mean(-1, keepdim=True), reference.std(-1, keepdim=True)
    return weight * x + (1 - weight) * ((x - mean) * own_std / (std + 1e-6) + own_mean)


def quantile(x_BHNT: Tensor, level: Tensor) -> Tensor:
    """The quantile over positions with linear interpolation; `torch.quantile` has no ONNX form."""
    if not torch.compiler.is_exporting():
        return torch.quantile(x_BHNT, level, dim=2, keepdim=True)
    ordered = x_BHNT.sort(dim=2).values
    place = level * (x_BHNT.shape[2] - 1)
    below = place.floor()
    index = below.long().reshape(1)
    lower = ordered.index_select(2, index)
    upper = ordered.index_select(2, (index + 1).clamp(max=x_BHNT.shape[2] - 1))
    return lower + (upper - lower) * (place - below)


def softmask(a_BHNT: Tensor, numbers: Numbers, *, invert: bool) -> Tensor:
    """AM2; `invert` turns the first token over, as FaceID-Plus-v2 needs it."""
    entering = torch.cat((1 - a_BHNT[..., :1], a_BHNT[..., 1:]), dim=-1) if invert else a_BHNT
    threshold = quantile(entering, numbers["quantile"]).clamp_min(1e-6)
    shifted = numbers["sharpness"] * (_range_normalised(entering) - threshold)
    mask = numbers["scale"] * _range_normalised(torch.sigmoid(shifted))
    mask = mask.clamp(max=10)
    if invert:
        first = mask[..., :1]
        mask = torch.cat((first.amax(2, keepdim=True) - first, mask[..., 1:]), dim=-1)
    return _adain(mask, a_BHNT, numbers["adain_weight"])


class SelfAttention(AttnProcessor2_0):
    """diffusers' own processor, which need not warn about what only the others take."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *,
        image_tokens: Tensor | None = None,
        numbers: Tensor | None = None,
    ) -> Tensor:
        """Attention of hidden_states [B,N,C] over themselves."""
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)


class ImageAttention(nn.Module):
    """Text attention and λ · f(A) V' of one block, with the weights of an adapter.

    `kind`, `invert` and `ip_scale` are set by `configure`, as an adapter's scale is; `numbers` are
    the other parameters of the step, [parts, columns].
    """

    def __init__(self, part: int, to_k_ip: nn.Linear, to_v_ip: nn.Linear) -> None:
        super().__init__()
        self.part = part
        self.to_k_ip, self.to_v_ip = to_k_ip, to_v_ip
        self.kind = "off"
        self.invert = True
        self.ip_scale = 1.0

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *,
        image_tokens: Tensor,
        numbers: Tensor,
    ) -> Tensor:
        """hidden_states [B,N,C], text [B,L,·], image tokens [B,T,·]."""

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        q_BHND = heads(attn.to_q(hidden_states))
        text = functional.scaled_dot_product_attention(
            q_BHND, heads(attn.to_k(encoder_hidden_states)), heads(attn.to_v(encoder_hidden_states))
        )
        k_BHTD, v_BHTD = heads(self.to_k_ip(image_tokens)), heads(self.to_v_ip(image_tokens))
        image = self._image(q_BHND, k_BHTD, v_BHTD, numbers)
        return attn.to_out[0]((text + self.ip_scale * image).transpose(1, 2).flatten(2))

    def _image(self, q_BHND: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, numbers: Tensor) -> Tensor:
        if self.kind == "off":
            return functional.scaled_dot_product_attention(q_BHND, k_BHTD, v_BHTD)
        row = dict(zip(MANIPULATION_COLUMNS, numbers[self.part].unbind(), strict=True))
        logits = q_BHND @ k_BHTD.transpose(-2, -1) * q_BHND.shape[-1] ** -0.5
        a_BHNT = logits.softmax(-1)
        if self.kind == "scale_power":
            return (row["scale"] * a_BHNT.pow(row["power"])).clamp(max=10) @ v_BHTD
        hidden = softmask(a_BHNT, row, invert=self.invert) @ v_BHTD
        return _adain(hidden, a_BHNT @ v_BHTD, row["adain_weight"])


def attach(unet: Any) -> None:
    """Put these processors, with the adapter's weights, in place of the export's."""
    processors: dict[str, Any] = {}
    for name, processor in unet.attn_processors.items():
        decoupled = hasattr(processor, "to_k_ip")
        processors[name] = (
            ImageAttention(processor.part, processor.to_k_ip, processor.to_v_ip)
            if decoupled
            else SelfAttention()
        )
    unet.set_attn_processor(processors)


def configure(unet: Any, manipulation: AttentionManipulation, ip_scales: Any) -> None:
    """Set kind and λ of every block by its part of the UNet, for FaceID-Plus-v2."""
    manipulation = manipulation.for_adapter("faceid-plus-v2")
    for processor in unet.attn_processors.values():
        if isinstance(processor, ImageAttention):
            part = getattr(manipulation, PARTS[processor.part])
            processor.kind, processor.invert = part.kind, part.invert_first_token
            processor.ip_scale = float(ip_scales[processor.part])
