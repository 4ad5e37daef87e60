"""Full-size SDXL with random weights: the published shapes without a download, for latency work.

Shapes are those of SDXL base 1.0, its two text encoders, and the published adapters for SDXL with
their image encoders.
Weights and biases are normal with std 0.02 (so activations stay finite in fp16), norms scale by
about 1. Nothing is zero or exactly 1: an exporter drops what such numbers make needless, and a time
would be that of a smaller graph.
"""

from typing import Any

import torch
from torch import nn

from fastface_trt.engines.manifest import AdapterKind, Orthogonal
from fastface_trt.export.adapters import FaceIdProjection, FaceProjection, IDFormer, QueryResampler
from fastface_trt.export.attention import attach_processors
from fastface_trt.export.face_modules import EvaVisionTower
from fastface_trt.export.precision import Model
from fastface_trt.runtime.tokenizer import VOCABULARY

WEIGHT_STD = 0.02

UNET_CONFIG: dict[str, Any] = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
VAE_CONFIG: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
    "force_upcast": False,
}
_TEXT_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 77,
    "bos_token_id": VOCABULARY - 2,
    "eos_token_id": VOCABULARY - 1,
}
TEXT_ENCODER_CONFIG = _TEXT_COMMON | {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}
TEXT_ENCODER_2_CONFIG = _TEXT_COMMON | {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
IMAGE_ENCODER_CONFIG: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 224,
    "projection_dim": 1024,
    "hidden_act": "gelu",
}


def sdxl_config(component: str) -> dict[str, Any]:
    """SDXL's own configuration of a model or of the `scheduler`, for files that have none.

    As the published checkpoint states it: its VAE overflows in fp16, its text models have CLIP's
    vocabulary.
    """
    clip = {"vocab_size": 49408, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    noise = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    configs: dict[str, dict[str, Any]] = {
        "unet": UNET_CONFIG,
        "vae": VAE_CONFIG | {"force_upcast": True},
        "text_encoder": TEXT_ENCODER_CONFIG | clip,
        "text_encoder_2": TEXT_ENCODER_2_CONFIG | clip,
        "image_encoder": IMAGE_ENCODER_CONFIG,
        "scheduler": noise
        | {
            "_class_name": "EulerDiscreteScheduler",
            "num_train_timesteps": 1000,
            "prediction_type": "epsilon",
            "steps_offset": 1,
            "timestep_spacing": "leading",
        },
    }
    return dict(configs[component])


@torch.no_grad()
def randomize(module: nn.Module, dtype: torch.dtype, seed: int = 0) -> Model:
    """Give a module whose parameters are on the meta device random weights of `dtype`.

    The module is built under `accelerate.init_empty_weights`, so nothing is allocated twice.
    """
    generator = torch.Generator().manual_seed(seed)
    for owner in module.modules():
        is_norm = isinstance(owner, nn.LayerNorm | nn.GroupNorm)
        for name, parameter in list(owner.named_parameters(recurse=False)):
            value = torch.empty(parameter.shape, dtype=dtype)
            value.normal_(0, WEIGHT_STD, generator=generator)
            if is_norm and name == "weight":
                value.add_(1)
            setattr(owner, name, nn.Parameter(value, requires_grad=False))
    return module.eval()


def random_unet(dtype: torch.dtype, orthogonal: Orthogonal = "off") -> Model:
    """SDXL's UNet with decoupled attention attached, 2.57·10⁹ parameters and the adapter's."""
    from accelerate import init_empty_weights
    from diffusers import UNet2DConditionModel

    with init_empty_weights(include_buffers=False):
        unet = UNet2DConditionModel(**UNET_CONFIG)
        attach_processors(unet, orthogonal)
    return randomize(unet, dtype)


def random_projection(
    dtype: torch.dtype, kind: AdapterKind = "faceid-plus-v2", zero_tokens: int | None = None
) -> Model:
    """The projection of an adapter for SDXL, PuLID's of version 1.1."""
    from accelerate import init_empty_weights

    zeros = IDFormer.default_zero_tokens if zero_tokens is None else zero_tokens
    with init_empty_weights(include_buffers=False):
        projection: nn.Module
        if kind == "pulid":
            projection = IDFormer(zero_tokens=zeros)
        elif kind == "faceid-portrait-unnorm":
            projection = QueryResampler()
        elif kind == "faceid-portrait":
            projection = FaceIdProjection(tokens=16)
        else:
            projection = FaceIdProjection() if kind == "faceid" else FaceProjection()
    return randomize(projection, dtype)


def random_vae(dtype: torch.dtype) -> Model:
    """SDXL's AutoencoderKL."""
    from accelerate import init_empty_weights
    from diffusers import AutoencoderKL

    with init_empty_weights(include_buffers=False):
        vae = AutoencoderKL(**VAE_CONFIG)
    return randomize(vae, dtype)


def random_text_encoder(name: str, dtype: torch.dtype) -> Model:
    """CLIP ViT-L's text model (`text_encoder`) or OpenCLIP bigG's (`text_encoder_2`)."""
    from accelerate import init_empty_weights
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with init_empty_weights(include_buffers=False):
        if name == "text_encoder":
            encoder = CLIPTextModel(CLIPTextConfig(**TEXT_ENCODER_CONFIG))
        else:
            encoder = CLIPTextModelWithProjection(CLIPTextConfig(**TEXT_ENCODER_2_CONFIG))
    return randomize(encoder, dtype)


def random_eva_tower(dtype: torch.dtype) -> Model:
    """EVA02-CLIP-L/14's vision tower at 336 pixels."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        tower = EvaVisionTower()
    return randomize(tower, dtype).to(dtype)


def random_image_encoder(dtype: torch.dtype) -> Model:
    """OpenCLIP ViT-H/14's vision model."""
    from accelerate import init_empty_weights
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    with init_empty_weights(include_buffers=False):
        encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**IMAGE_ENCODER_CONFIG))
    return randomize(encoder, dtype)
