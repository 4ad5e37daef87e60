"""What a weights file is, by names and shapes as people's files have them."""

from pathlib import Path

import pytest

from fastface_trt.export.file_kinds import identify
from fastface_trt.export.weight_files import TensorHeader, WeightsFile, open_weights
from fastface_trt.mini import folders

ATTENTION = "attentions_0_transformer_blocks_0_attn2_to_k"
KINDS = {
    "a LoRA of SD 1.5": {f"lora_unet_down_blocks_0_{ATTENTION}.lora_down.weight": (4, 768)},
    "a LoRA of SD 2": {f"lora_unet_down_blocks_0_{ATTENTION}.lora_down.weight": (4, 1024)},
    "a LoRA of SDXL": {
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight": (4, 2048)
    },
    "a LoRA of the SDXL refiner": {
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v.lora_A.weight": (4, 1280)
    },
    "a DoRA of SDXL": {
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v.lora_A.weight": (4, 2048),
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v.dora_scale": (640, 1),
    },
    "a LoHa of SDXL": {
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.hada_w1_b": (4, 2048)
    },
    "a LoKr of SD 1.5": {
        f"lora_unet_down_blocks_0_{ATTENTION}.lokr_w1": (4, 8),
        f"lora_unet_down_blocks_0_{ATTENTION}.lokr_w2": (80, 96),
    },
    "a LoRA of text encoders": {
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": (4, 768)
    },
    "a LoRA of Flux": {"lora_unet_single_blocks_0_linear1.lora_down.weight": (4, 3072)},
    "a LoRA of SD3": {"transformer.transformer_blocks.0.attn.add_k_proj.lora_A.weight": (4, 1536)},
    "a LoRA of PixArt": {"transformer.transformer_blocks.0.attn1.to_q.lora_A.weight": (4, 1152)},
    "a LoRA of Wan": {"diffusion_model.blocks.0.self_attn.q.lora_A.weight": (4, 5120)},
    "a LoRA of HunyuanVideo": {
        "lora_unet_double_blocks_19_img_attn_qkv.lora_down.weight": (4, 3072)
    },
    "a LoRA of Lumina": {"diffusion_model.layers.0.attention.qkv.lora_A.weight": (4, 2304)},
    "a LoRA of Qwen-Image": {"transformer_blocks.0.img_mlp.net.2.lora_A.weight": (4, 3072)},
    "a textual inversion embedding": {"clip_l": (2, 768), "clip_g": (2, 1280)},
    "an IP-Adapter": {"image_proj.proj.weight": (3, 3), "ip_adapter.1.to_k_ip.weight": (3, 3)},
    "a PuLID adapter": {"id_adapter.latents": (1, 3), "id_adapter_attn_layers.0.id_to_k": (3, 3)},
    "a ControlNet": {"controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3)},
    "a T2I-Adapter": {"adapter.body.0.resnets.0.block1.weight": (3, 3, 3, 3)},
    "an AnimateDiff motion module": {"down_blocks.0.motion_modules.0.norm.weight": (3,)},
    "an upscaler": {"conv_first.weight": (64, 3, 3, 3)},
    "a VAE": {"first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3)},
    "a tiny VAE": {"decoder.layers.0.weight": (64, 4, 3, 3)},
    "a CLIP vision model": {"vision_model.embeddings.patch_embedding.weight": (3, 3, 3, 3)},
    "a text encoder of another model": {"encoder.block.0.layer.0.SelfAttention.q.weight": (3, 3)},
    "an SDXL checkpoint in one file": {
        "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
        "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight": (1280, 2048),
        "first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3),
    },
    "an SDXL checkpoint in one file in scaled fp8": {
        "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight": (1280, 2048),
        "model.diffusion_model.middle_block.1.proj_in.scale_weight": (),
    },
    "an SDXL inpainting UNet (9 input channels)": {
        "conv_in.weight": (320, 9, 3, 3),
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight": (1280, 2048),
    },
    "an SD 1.5 edit UNet (8 input channels)": {
        "conv_in.weight": (320, 8, 3, 3),
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight": (1280, 768),
    },
    "a reduced SDXL UNet (SSD-1B, Vega or KOALA)": {
        "down_blocks.2.attentions.0.transformer_blocks.3.attn2.to_k.weight": (1280, 2048),
        "up_blocks.0.attentions.2.transformer_blocks.9.attn2.to_k.weight": (1280, 2048),
    },
    "an SDXL refiner UNet": {
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight": (1536, 1280)
    },
    "a transformer of Flux": {"double_blocks.0.img_attn.proj.weight": (3072, 3072)},
    "a transformer of SD3": {"joint_blocks.0.x_block.mlp.fc1.weight": (6144, 1536)},
    "a file without tensors": {},
    "a file of an unknown kind": {"a.b.weight": (3, 3, 3), "a.c": (3,), "a.d": (3,)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_what_its_names_and_shapes_say(kind):
    tensors = {name: TensorHeader("F16", shape) for name, shape in KINDS[kind].items()}
    assert identify(WeightsFile(Path("x.safetensors"), tensors)) == kind


def test_metadata_tells_what_names_do_not():
    tensors = {"lora_unet_conv_in.lora_down.weight": TensorHeader("F16", (4, 4, 3, 3))}
    metadata = {"ss_base_model_version": "sdxl_base_v1-0"}
    assert identify(WeightsFile(Path("x"), tensors)) == "a LoRA of an unknown model"
    assert identify(WeightsFile(Path("x"), tensors, metadata)) == "a LoRA of SDXL"


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        (folders.ADAPTER, "a FaceID-Plus adapter"),
        (folders.CHECKPOINT / "unet", "a UNet for text of width 96"),
        (folders.CHECKPOINT / "vae", "a VAE"),
        (folders.CHECKPOINT / "text_encoder", "a CLIP text encoder"),
        (folders.IMAGE_ENCODER, "a CLIP vision model"),
    ],
)
def test_the_mini_models_files_are_what_they_are(path, kind):
    file = next(path.glob("*.safetensors")) if path.is_dir() else path
    assert identify(open_weights(file)) == kind
