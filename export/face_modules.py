"""The modules that turn a face into image tokens: the image encoder and the adapter's projection.

What the image encoder gives goes into the projection by name, so an adapter that wants more of a
picture, or nothing, changes neither the runtime nor the other modules.

Shape legend: B rows, T image tokens, C text width, S CLIP positions, K CLIP width, P width of the
picture's embedding, E face-embedding size.
"""

import torch
from torch import Tensor, nn

from fastface_trt.engines import contract
from fastface_trt.engines.manifest import Dimension
from fastface_trt.export.adapter import Projection
from fastface_trt.export.eva_clip import LEVELS, EvaVisionTower
from fastface_trt.export.model import Model
from fastface_trt.export.modules import EXAMPLE_REQUESTS, ModuleExport
from fastface_trt.export.precision import boundary_dtype

_EXAMPLE_POSITIONS = 17


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
        """The adapter's tokens; see `fastface_trt.export.projection` and `export.pulid`."""
        dtype = _dtype(self.projection)
        given = (face_embeds, clip_embeds, clip_hidden_states)
        tokens = self.projection(*(tensor.to(dtype) for tensor in given if tensor is not None))
        return tokens.to(boundary_dtype(dtype))


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


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
