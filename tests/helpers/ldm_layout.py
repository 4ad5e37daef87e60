"""The tiny checkpoint as one file in the layout that SDXL checkpoints are shared in."""

import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.helpers.tiny_sdxl import UNET

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
TOP = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def unet_key(name: str) -> str:
    for ours, theirs in TOP.items():
        if name.startswith(ours + "."):
            return theirs + name[len(ours) :]
    layers = UNET["layers_per_block"]
    block = re.match(
        r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.", name
    )
    if block:
        way, level, kind, index = block[1], int(block[2]), block[3], int(block[4])
        rest = name[block.end() :]
        if way == "down":
            number = 1 + level * (layers + 1) + (layers if kind == "downsamplers" else index)
            slot = 1 if kind == "attentions" else 0
            rest = rest.replace("conv.", "op.") if kind == "downsamplers" else rest
            prefix = f"input_blocks.{number}.{slot}."
        else:
            number = level * (layers + 1) + (layers if kind == "upsamplers" else index)
            has_attention = UNET["up_block_types"][level].startswith("CrossAttn")
            slot = {"resnets": 0, "attentions": 1}.get(kind, 2 if has_attention else 1)
            prefix = f"output_blocks.{number}.{slot}."
    else:
        middle = re.match(r"mid_block\.(resnets|attentions)\.(\d+)\.", name)
        kind, index, rest = middle[1], int(middle[2]), name[middle.end() :]
        prefix = f"middle_block.{1 if kind == 'attentions' else 2 * index}."
    if kind == "resnets":
        for ours, theirs in RESNET.items():
            rest = re.sub(rf"^{ours}\.", f"{theirs}.", rest)
    return prefix + rest


def vae_key(name: str, levels: int) -> str:
    name = re.sub(r"encoder\.down_blocks\.(\d+)\.resnets\.", r"encoder.down.\1.block.", name)
    name = re.sub(
        r"encoder\.down_blocks\.(\d+)\.downsamplers\.0\.", r"encoder.down.\1.downsample.", name
    )

    def up(match: re.Match[str]) -> str:
        kind = "block." if match[2].startswith("resnets") else "upsample."
        return f"decoder.up.{levels - 1 - int(match[1])}.{kind}"

    name = re.sub(r"decoder\.up_blocks\.(\d+)\.(resnets|upsamplers\.0)\.", up, name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    if "mid_block.attentions.0" in name:
        for ours, theirs in VAE_ATTENTION.items():
            name = name.replace(f"attentions.0.{ours}.", f"attentions.0.{theirs}.")
        name = name.replace("mid_block.attentions.0", "mid.attn_1")
    return name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")


def open_clip(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    out = {}
    for name, tensor in state.items():
        name = name.removeprefix("text_model.")
        layer = re.match(r"encoder\.layers\.(\d+)\.(.*)\.(weight|bias)$", name)
        if name == "text_projection.weight":
            out["text_projection"] = tensor.T
        elif name == "embeddings.token_embedding.weight":
            out["token_embedding.weight"] = tensor
        elif name == "embeddings.position_embedding.weight":
            out["positional_embedding"] = tensor
        elif name.startswith("final_layer_norm."):
            out[name.replace("final_layer_norm", "ln_final")] = tensor
        elif layer and layer[2] == "self_attn.q_proj":
            parts = [
                state[k]
                for k in (
                    next(
                        k
                        for k in state
                        if k.endswith(f"layers.{layer[1]}.self_attn.{p}.{layer[3]}")
                    )
                    for p in ("q_proj", "k_proj", "v_proj")
                )
            ]
            out[f"transformer.resblocks.{layer[1]}.attn.in_proj_{layer[3]}"] = torch.cat(parts)
        elif layer and layer[2] in OPEN_CLIP:
            out[f"transformer.resblocks.{layer[1]}.{OPEN_CLIP[layer[2]]}.{layer[3]}"] = tensor
    return out


def write_single_file(checkpoint: Path, path: Path) -> None:
    """Write the diffusers folder `checkpoint` as one safetensors file."""

    def weights(component: str) -> dict[str, torch.Tensor]:
        return load_file(next((checkpoint / component).glob("*.safetensors")))

    everything = {f"model.diffusion_model.{unet_key(k)}": v for k, v in weights("unet").items()}
    for name, tensor in weights("vae").items():
        is_attention = "attentions" in name and name.endswith("weight") and "group" not in name
        everything[f"first_stage_model.{vae_key(name, levels=2)}"] = (
            tensor[..., None, None] if is_attention else tensor
        )
    first = weights("text_encoder")
    everything |= {
        "conditioner.embedders.0.transformer."
        + (k if k.startswith("text_model.") else f"text_model.{k}"): v
        for k, v in first.items()
    }
    second = open_clip(weights("text_encoder_2"))
    everything |= {f"conditioner.embedders.1.model.{k}": v for k, v in second.items()}
    save_file({k: v.contiguous() for k, v in everything.items()}, path)
