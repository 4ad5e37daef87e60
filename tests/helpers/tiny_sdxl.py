"""A tiny SDXL checkpoint with random weights, written in the layouts that the real ones have."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from fastface_trt.export.adapters import FaceIdProjection, FaceProjection
from fastface_trt.export.attention import attach_processors
from fastface_trt.runtime.tokenizer import PAD_TOKENS, VOCABULARY, write_byte_tokenizer

TEXT_WIDTHS = (16, 24)
POOLED = 24
TIME_WIDTH = 8
UNET = {
    "sample_size": 8,
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": (1, 2, 2),
    "transformer_layers_per_block": (1, 1, 1),
    "cross_attention_dim": sum(TEXT_WIDTHS),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": TIME_WIDTH,
    "projection_class_embeddings_input_dim": POOLED + 6 * TIME_WIDTH,
}
CLIP_WIDTH, CLIP_SIZE, CLIP_PATCH = 16, 32, 16
LORA_RANK = 2


def tiny_unet(seed: int = 0) -> torch.nn.Module:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    return UNet2DConditionModel(**UNET)


def tiny_projection(seed: int = 0) -> FaceProjection:
    torch.manual_seed(seed)
    return FaceProjection(
        mlp_hidden=1024,
        features=CLIP_WIDTH,
        width=sum(TEXT_WIDTHS),
        inner=64,
        hidden=160,
        depth=4,
    )


def tiny_faceid_projection(seed: int = 0) -> FaceIdProjection:
    torch.manual_seed(seed)
    return FaceIdProjection(width=sum(TEXT_WIDTHS))


def adapter_tensors(
    unet: torch.nn.Module, seed: int = 1, projection: torch.nn.Module | None = None
) -> dict[str, torch.Tensor]:
    """A FaceID-Plus-v2 adapter for `unet` in the published key layout, LoRA included.

    With a `projection` of its own it is an adapter of that projection's kind.
    """
    attach_processors(unet)
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.1

    projection = projection or tiny_projection(seed)
    tensors = {f"image_proj.{k}": v.clone() for k, v in projection.state_dict().items()}
    for index, name in enumerate(unet.attn_processors):
        attention = unet.get_submodule(name.removesuffix(".processor"))
        for source, target in (
            ("to_q", "to_q"),
            ("to_k", "to_k"),
            ("to_v", "to_v"),
            ("to_out", "to_out.0"),
        ):
            rows, columns = attention.get_submodule(target).weight.shape
            key = f"ip_adapter.{index}.{source}_lora"
            tensors[f"{key}.down.weight"] = random(LORA_RANK, columns)
            tensors[f"{key}.up.weight"] = random(rows, LORA_RANK)
        if name.endswith("attn2.processor"):
            for source in ("to_k_ip", "to_v_ip"):
                shape = getattr(attention.processor, source).weight.shape
                tensors[f"ip_adapter.{index}.{source}.weight"] = random(*shape)
    return tensors


def write_tiny_sdxl(root: Path) -> Path:
    """Write `checkpoint/`, `image_encoder/` and `adapter.safetensors` below `root`."""
    from diffusers import AutoencoderKL, DDIMScheduler
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
    )

    checkpoint = root / "checkpoint"
    tiny_unet().save_pretrained(checkpoint / "unet")
    torch.manual_seed(2)
    AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.5,
    ).save_pretrained(checkpoint / "vae")
    common = {
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": VOCABULARY,
        "bos_token_id": VOCABULARY - 2,
        "eos_token_id": VOCABULARY - 1,
    }
    for name, cls, width in (
        ("text_encoder", CLIPTextModel, TEXT_WIDTHS[0]),
        ("text_encoder_2", CLIPTextModelWithProjection, TEXT_WIDTHS[1]),
    ):
        config = CLIPTextConfig(hidden_size=width, projection_dim=POOLED, **common)
        cls(config).save_pretrained(checkpoint / name)
    for name, pad_token in PAD_TOKENS.items():
        write_byte_tokenizer(checkpoint / name, pad_token)
    CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=CLIP_WIDTH,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=CLIP_SIZE,
            patch_size=CLIP_PATCH,
            projection_dim=8,
        )
    ).save_pretrained(root / "image_encoder")
    index = {
        "_class_name": "StableDiffusionXLPipeline",
        "force_zeros_for_empty_prompt": True,
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (checkpoint / "model_index.json").write_text(json.dumps(index))
    DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
    ).save_pretrained(checkpoint / "scheduler")
    save_file(adapter_tensors(tiny_unet()), root / "adapter.safetensors")
    return root
