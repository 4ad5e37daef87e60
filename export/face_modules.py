"""The modules that turn a face into image tokens: the image encoder and the adapter's projection.

What the image encoder gives goes into the projection by name, so an adapter that wants more of a
picture, or nothing, changes neither the runtime nor the other modules.

PuLID looks at a face with the vision tower of EVA02-CLIP-L/14 at 336 pixels: a vision transformer
with rotary positions on patches, normalised attention output, and a gated MLP with a norm inside
(Sun et al. 2023, Fang et al. 2023). Parameter names are those of the published checkpoint's
`visual` part.

Shape legend: B rows, T image tokens, C text width, S positions (the class token first), K width,
H heads, D head size, F hidden width of the MLP, P width of the picture's embedding, E
face-embedding size.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from fastface_trt.engines import contract
from fastface_trt.engines.manifest import Dimension
from fastface_trt.errors import WeightsError
from fastface_trt.export.adapters import Projection
from fastface_trt.export.file_kinds import identify
from fastface_trt.export.modules import EXAMPLE_REQUESTS, ModuleExport
from fastface_trt.export.precision import Model, boundary_dtype
from fastface_trt.export.weight_files import State, open_weights

HEAD_SIZE = 64
PRETRAINED_SIDE = 16
"""Patches along a side in pre-training, which positions are stretched to."""

ROTARY_BASE = 10000.0
NORM_EPSILON = 1e-6
LEVELS = (4, 8, 12, 16, 20)
"""Blocks whose input PuLID takes; the published tower has 24."""

_EXAMPLE_POSITIONS = 17


def image_encoder_export(encoder: Model | EvaVisionTower) -> ModuleExport:
    """The CLIP image encoder whose penultimate hidden states feed the projection, or PuLID's."""
    config = encoder.config
    positions = (config.image_size // config.patch_size) ** 2 + 1
    example = torch.zeros(EXAMPLE_REQUESTS, 3, config.image_size, config.image_size)
    shapes: dict[str, tuple[Dimension, ...]] = {
        "pixel_values": ("batch", 3, config.image_size, config.image_size)
    }
    if isinstance(encoder, EvaVisionTower):
        module: nn.Module = EvaTowerModule(encoder)
        shapes["clip_embeds"] = ("batch", encoder.head.out_features)
        shapes["clip_hidden_states"] = ("batch", len(LEVELS), positions, config.hidden_size)
    else:
        module = ImageEncoderModule(encoder)
        shapes["clip_embeds"] = ("batch", positions, config.hidden_size)
    return ModuleExport(
        "image_encoder",
        module,
        {"pixel_values": example.to(boundary_dtype(_dtype(encoder)))},
        tuple(shapes)[1:],
        shapes,
    )


def face_projection_export(projection: Projection, positions: int | str) -> ModuleExport:
    """The adapter's projection; `positions` is the image encoder's sequence length S.

    An adapter without an image encoder has no input of that length.
    """
    dtype = boundary_dtype(_dtype(projection))
    shapes: dict[str, tuple[Dimension, ...]] = {
        name: ("batch", *shape) for name, shape in projection.input_shapes(positions).items()
    }
    sizes = {"batch": EXAMPLE_REQUESTS, positions: _EXAMPLE_POSITIONS}
    inputs = {
        name: torch.zeros([sizes[d] if isinstance(d, str) else d for d in shape], dtype=dtype)
        for name, shape in shapes.items()
    }
    shapes[contract.IMAGE_TOKENS] = ("batch", projection.tokens, projection.width)
    return ModuleExport(
        "face_projection",
        FaceProjectionModule(projection),
        inputs,
        (contract.IMAGE_TOKENS,),
        shapes,
    )


class ImageEncoderModule(nn.Module):
    """pixel_values [B,3,S,S], CLIP-normalised, to the penultimate hidden states [B,S,K]."""

    def __init__(self, encoder: Model) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Hidden states before the last layer, as FaceID-Plus-v2 was trained on."""
        dtype = self.encoder.dtype
        output = self.encoder(pixel_values.to(dtype), output_hidden_states=True)
        return output.hidden_states[-2].to(boundary_dtype(dtype))


class EvaTowerModule(nn.Module):
    """pixel_values [B,3,S,S] to the embedding [B,P] of length 1 and hidden states [B,5,S,K]."""

    def __init__(self, tower: EvaVisionTower) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """What PuLID's id encoder takes of a picture."""
        dtype = _dtype(self.tower)
        embeds, hidden_states = self.tower(pixel_values.to(dtype))
        unit = embeds.float() / torch.linalg.vector_norm(embeds.float(), dim=-1, keepdim=True)
        return unit.to(boundary_dtype(dtype)), hidden_states.to(boundary_dtype(dtype))


class FaceProjectionModule(nn.Module):
    """face_embeds [B,E], and what the adapter takes of a picture, to image tokens [B,T,C]."""

    def __init__(self, projection: nn.Module) -> None:
        super().__init__()
        self.projection = projection

    def forward(
        self,
        face_embeds: Tensor,
        clip_embeds: Tensor | None = None,
        clip_hidden_states: Tensor | None = None,
    ) -> Tensor:
        """The adapter's tokens; see `fastface_trt.export.adapters`."""
        dtype = _dtype(self.projection)
        given = (face_embeds, clip_embeds, clip_hidden_states)
        tokens = self.projection(*(tensor.to(dtype) for tensor in given if tensor is not None))
        return tokens.to(boundary_dtype(dtype))


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def load_eva_tower(path: Path, dtype: torch.dtype) -> EvaVisionTower:
    """The vision tower of an EVA02-CLIP checkpoint file, whole or its `visual` part alone.

    Raises `WeightsError` when the file is another model.
    """
    return _eva_tower(path, open_weights(path).read()).to(dtype).eval()


def check_eva_tower(path: Path) -> None:
    """Raise what `load_eva_tower` raises, from the file's header alone."""
    with torch.device("meta"):
        _eva_tower(path, open_weights(path).on_meta())


def _eva_tower(path: Path, tensors: State) -> EvaVisionTower:
    visual = {
        key.removeprefix("visual."): tensor.float()
        for key, tensor in tensors.items()
        if key.startswith("visual.")
    }
    state = visual or {key: tensor.float() for key, tensor in tensors.items()}
    try:
        tower = EvaVisionTower.from_state_dict(state)
    except (KeyError, RuntimeError, ValueError) as error:
        raise WeightsError(
            f"{path.name} is {identify(open_weights(path))} and not the vision tower of "
            f"EVA02-CLIP: {' '.join(str(error).split())[:200]}.",
            "PuLID needs EVA02_CLIP_L_336_psz14_s6B.pt or a file of the same layout.",
        ) from error
    if len(tower.blocks) <= LEVELS[-1]:
        raise WeightsError(
            f"The vision tower of {path.name} has {len(tower.blocks)} blocks; PuLID looks at the "
            f"input of block {LEVELS[-1]}.",
            "PuLID needs EVA02_CLIP_L_336_psz14_s6B.pt or a file of the same layout.",
        )
    return tower


class EvaVisionTower(nn.Module):
    """pixel_values [B,3,h,w] to the picture's embedding and the hidden states that PuLID takes."""

    def __init__(
        self,
        *,
        image_size: int = 336,
        patch: int = 14,
        width: int = 1024,
        hidden: int = 2730,
        depth: int = 24,
        output: int = 768,
        head_size: int = HEAD_SIZE,
    ) -> None:
        super().__init__()
        side = image_size // patch
        self.config = SimpleNamespace(image_size=image_size, patch_size=patch, hidden_size=width)
        self.patch_embed = _PatchEmbedding(width, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, side**2 + 1, width))
        self.blocks = nn.ModuleList(_Block(width, hidden, head_size) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=NORM_EPSILON)
        self.head = nn.Linear(width, output)
        # The class token stands nowhere: angle 0.
        angles_SD = functional.pad(rotary_angles(side, head_size), (0, 0, 1, 0))
        self.register_buffer("cos_SD", angles_SD.cos(), persistent=False)
        self.register_buffer("sin_SD", angles_SD.sin(), persistent=False)

    @classmethod
    def from_state_dict(cls, state: State) -> EvaVisionTower:
        """Build and load from a checkpoint's `visual` part; sizes are read off its tensors."""
        width, _, patch, _ = state["patch_embed.proj.weight"].shape
        side = int((state["pos_embed"].shape[1] - 1) ** 0.5)
        head_size = state["rope.freqs_cos"].shape[1] if "rope.freqs_cos" in state else HEAD_SIZE
        module = cls(
            image_size=side * patch,
            patch=patch,
            width=width,
            hidden=state["blocks.0.mlp.w1.weight"].shape[0],
            depth=len({key.split(".")[1] for key in state if key.startswith("blocks.")}),
            output=state["head.weight"].shape[0],
            head_size=head_size,
        )
        # The file repeats the rotary tables in every block.
        module.load_state_dict({k: v for k, v in state.items() if ".freqs_" not in k})
        return module

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """clip_embeds [B,P], not normalised, and clip_hidden_states [B,5,S,K]."""
        patches = self.patch_embed(pixel_values)
        start = self.cls_token.expand(patches.shape[0], -1, -1)
        x_BSK = torch.cat((start, patches), dim=1) + self.pos_embed
        cos_SD, sin_SD = (getattr(self, name).to(x_BSK.dtype) for name in ("cos_SD", "sin_SD"))
        hidden_states = []
        for index, block in enumerate(self.blocks):
            if index in LEVELS:
                hidden_states.append(x_BSK)
            x_BSK = block(x_BSK, cos_SD, sin_SD)
        return self.head(self.norm(x_BSK)[:, 0]), torch.stack(hidden_states, dim=1)


class _PatchEmbedding(nn.Module):
    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch, stride=patch)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.proj(pixels).flatten(2).transpose(1, 2)


class _Block(nn.Module):
    def __init__(self, width: int, hidden: int, head_size: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPSILON)
        self.attn = _Attention(width, head_size)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPSILON)
        self.mlp = _GatedMlp(width, hidden)

    def forward(self, x_BSK: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
        x_BSK = x_BSK + self.attn(self.norm1(x_BSK), cos_SD, sin_SD)
        return x_BSK + self.mlp(self.norm2(x_BSK))


class _Attention(nn.Module):
    """Self-attention whose queries and keys are turned by their patch's place."""

    def __init__(self, width: int, head_size: int) -> None:
        super().__init__()
        self.head_size = head_size
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.inner_attn_ln = nn.LayerNorm(width, eps=NORM_EPSILON)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BSK: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
        """Attended positions [B,S,K]; cos and sin hold the class token's (no turn) too."""
        q, k, v = (
            x.unflatten(-1, (-1, self.head_size)).transpose(1, 2)
            for x in (
                self.q_proj(x_BSK) + self.q_bias,
                self.k_proj(x_BSK),
                self.v_proj(x_BSK) + self.v_bias,
            )
        )
        attended = functional.scaled_dot_product_attention(
            _turned(q, cos_SD, sin_SD), _turned(k, cos_SD, sin_SD), v
        )
        return self.proj(self.inner_attn_ln(attended.transpose(1, 2).flatten(2)))


def _turned(x_BHSD: Tensor, cos_SD: Tensor, sin_SD: Tensor) -> Tensor:
    """Each pair of neighbouring channels, turned by its angle."""
    first, second = x_BHSD.unflatten(-1, (-1, 2)).unbind(-1)
    quarter_turn = torch.stack((-second, first), dim=-1).flatten(-2)
    return x_BHSD * cos_SD + quarter_turn * sin_SD


class _GatedMlp(nn.Module):
    """w₃ norm(silu(w₁ x) · w₂ x)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, hidden)
        self.w2 = nn.Linear(width, hidden)
        self.ffn_ln = nn.LayerNorm(hidden, eps=NORM_EPSILON)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x_BSK: Tensor) -> Tensor:
        """The MLP's output [B,S,K]."""
        return self.w3(self.ffn_ln(functional.silu(self.w1(x_BSK)) * self.w2(x_BSK)))


def rotary_angles(side: int, head_size: int) -> Tensor:
    """Angles [side², D]: half of a head turns with the row, half with the column of a patch."""
    quarter = head_size // 4
    frequencies = ROTARY_BASE ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    places = torch.arange(side, dtype=torch.float64) * (PRETRAINED_SIDE / side)
    along = torch.outer(places, frequencies).repeat_interleave(2, dim=-1)
    rows = along[:, None].expand(side, side, -1)
    columns = along[None].expand(side, side, -1)
    return torch.cat((rows, columns), dim=-1).flatten(0, 1)
