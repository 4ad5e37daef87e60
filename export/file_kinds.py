"""What a weights file is, told from names and shapes: for refusals that say what was given.

Kinds of files are told first (an embedding, an adapter, a LoRA, a whole model), then the model that
they belong to. UNets are told apart by the width of the text that their cross-attention reads,
diffusion transformers by names that only one of them has.
"""

import re
from collections.abc import Iterable

from fastface_trt.export.weight_files import WeightsFile

TEXT_WIDTHS = {768: "SD 1.5", 1024: "SD 2", 1280: "SDXL refiner", 2048: "SDXL"}
"""Columns of `attn2.to_k` by the UNet that has them."""

_NUMBER_FORMATS = (
    ("NF4", r"\.quant_state\.bitsandbytes__nf4$|\.absmax$"),
    ("int8", r"\.SCB$|\.(weight_format|qzeros|qweight)$"),
    ("scaled fp8", r"(^|\.)scaled_fp8$|\.scale_weight$|\.weight_scale$"),
)
"""Formats by the companions of their weights; a plain cast has none."""

_LORA_KINDS = (
    ("a LoHa", r"\.hada_w[12]_[ab]$"),
    ("a LoKr", r"\.lokr_w[12](_[ab])?$"),
    ("an OFT file", r"\.oft_(blocks|diag|R)(\.|$)"),
    ("a GLoRA", r"\.(a1|a2|b1|b2)\.weight$"),
    ("an IA3 file", r"\.on_input$"),
    ("a DoRA", r"\.dora_scale$|lora_magnitude_vector"),
    (
        "a LoRA",
        r"lora_(down|up|mid|A|B)\b|[._]lora\.(down|up)\.|_lora\.(down|up)\.|lora_linear_layer",
    ),
    ("a file of weight differences", r"\.diff(_b)?$"),
)

_TRANSFORMERS = (
    ("Flux 2", r"(single|double)_stream_modulation"),
    ("Chroma", r"distilled_guidance_layer"),
    ("HiDream", r"double_stream_blocks_\d"),
    ("AuraFlow", r"double_layers_\d|joint_transformer_blocks_\d"),
    ("HunyuanVideo", r"individual_token_refiner|double_blocks_19_|token_refiner_refiner_blocks"),
    ("Qwen-Image", r"transformer_blocks_\d+_(img|txt)_(mod|mlp)"),
    ("Flux", r"single_transformer_blocks_\d|double_blocks_\d+_img_attn|single_blocks_\d+_linear1"),
    ("SD3", r"joint_blocks_\d|(?<!single)_transformer_blocks_\d+_attn_add_k_proj"),
    ("Stable Cascade", r"clip_txt_mapper|_channelwise_0|prior_unet"),
    ("HunyuanDiT", r"blocks_\d+_attn[12]_(Wqkv|q_proj|kv_proj)"),
    ("Mochi", r"blocks_\d+_attn_qkv_[xy]"),
    ("Sana", r"conv_inverted|inverted_conv"),
    ("PixArt", r"cross_attn_(q|kv)_linear|adaln_single|caption_projection"),
    ("Wan", r"(?<!r_)blocks_\d+_(self|cross)_attn_[qkvo]|vace_blocks_\d|condition_embedder_time"),
    ("Z-Image", r"layers_\d+_attention_to_[qkv](_|$)"),
    ("Lumina", r"layers_\d+_attention_(qkv|w[qkv])|cap_embedder|noise_refiner_\d"),
    ("LTX-Video", r"patchify_proj"),
    ("Cosmos", r"net_blocks_|x_embedder_proj_1"),
)
"""Names, with underscores for dots, that tell a diffusion transformer; the first that is found."""

_TRANSFORMER_WIDTHS = {1152: "PixArt", 2240: "Sana", 1920: "CogVideoX", 3072: "CogVideoX"}
"""Widths of transformers whose attention has diffusers' plain names."""

_UNET = re.compile(r"(down|up|input|output)_blocks_\d|mid(dle)?_block_|(^|_)conv_in_|time_embed")
_TEXT = re.compile(r"(^|_)te\d?_|text_encoder|text_model_encoder|resblocks_\d|encoder_block_\d")
_TEXT_COLUMNS = re.compile(
    r"attn2[._](?:processor[._])?to_[kv](?:_lora)?\."
    r"(?:(?:lora_A(?:\.\w+)?|lora_down|lora\.down|lora_linear_layer\.down|down)\.weight"
    r"|weight|diff|hada_w1_b)$"
)
_KRONECKER = re.compile(r"attn2[._]to_[kv]\.lokr_w([12])(_b)?$")
_BY_METADATA = (
    ("SDXL", r"sdxl|stable-diffusion-xl|sd_xl"),
    ("SD 2", r"sd_v2|stable-diffusion-v2|sd_2"),
    ("SD 1.5", r"sd_v1|stable-diffusion-v1|sd_1"),
    ("SD3", r"sd3|stable-diffusion-v?3"),
    ("Flux", r"flux"),
)
OTHER_MODELS = frozenset(name for name, _ in (*_TRANSFORMERS, *_BY_METADATA)) - {"SDXL"}
"""Models whose files are not SDXL's, whatever fits."""


def identify(file: WeightsFile) -> str:
    """What a file is, as a phrase with its article: "a LoRA of Flux", "an SDXL refiner UNet"."""
    phrase = _kind(file)
    formats = (name for name, mark in _NUMBER_FORMATS if _any(file.tensors, mark))
    number_format = next(formats, None)
    return f"{phrase} in {number_format}" if number_format else phrase


def lora_kind(names: Iterable[str]) -> str | None:
    """Which kind of weight update the names are of ("a LoHa"), None for a file of none."""
    names = list(names)
    return next((kind for kind, mark in _LORA_KINDS if _any(names, mark)), None)


def family(file: WeightsFile) -> str | None:
    """The model that a file's tensors belong to ("SDXL", "Flux"), None where nothing tells."""
    flat = [name.replace(".", "_") for name in file.tensors]
    found = next((name for name, mark in _TRANSFORMERS if _any(flat, mark)), None)
    if found == "SD3" and any(3072 in header.shape for header in file.tensors.values()):
        return "Flux"  # a LoRA of its double blocks alone
    if found:
        return found
    width = text_width(file)
    if width is not None:
        return TEXT_WIDTHS.get(width, f"a UNet for text of width {width}")
    if _any(flat, r"transformer_blocks_\d+_attn\d?_") and not _any(flat, _UNET.pattern):
        widths = {header.shape[1] for header in file.tensors.values() if len(header.shape) == 2}
        known = (name for width, name in _TRANSFORMER_WIDTHS.items() if width in widths)
        return next(known, "a diffusion transformer")
    if _any(flat, r"attentions_\d_transformer_blocks_[2-9]_|blocks_\d_1_transformer_blocks_[2-9]_"):
        return "SDXL"
    if _any(flat, r"down_blocks_0_attentions|input_blocks_1_1_|up_blocks_3_attentions"):
        return "SD 1.5 or SD 2"
    facts = " ".join(
        file.metadata.get(key, "") for key in ("ss_base_model_version", "modelspec.architecture")
    )
    return next((name for name, mark in _BY_METADATA if re.search(mark, facts.lower())), None)


def text_width(file: WeightsFile) -> int | None:
    """Columns of the text that the cross-attention of a UNet (or of its LoRA) reads."""
    factors: dict[str, dict[str, int]] = {}
    for name, header in file.tensors.items():
        if len(header.shape) < 2:
            continue
        if _TEXT_COLUMNS.search(name):
            return header.shape[1]
        part = _KRONECKER.search(name)
        if part:
            columns = factors.setdefault(name[: part.start()], {})
            columns[part[1]] = header.shape[1]
    return next((f["1"] * f["2"] for f in factors.values() if len(f) == 2), None)


def is_reduced(file: WeightsFile) -> bool:
    """Whether an SDXL UNet, or its LoRA, has the layers that SSD-1B, Vega and KOALA left: the
    lowest level with at most four transformer blocks an attention, and no attention in the middle.
    """
    flat = [name.replace(".", "_") for name in file.tensors]
    lowest = r"(down_blocks_2_attentions_\d|input_blocks_[78]_1)_transformer_blocks_"
    ways = (lowest, r"(up_blocks_0_attentions|output_blocks_[012]_1_)")
    more = (lowest + "[4-9]_", r"mid_block_attentions|middle_block_1_")
    return all(_any(flat, mark) for mark in ways) and not any(_any(flat, mark) for mark in more)


def in_channels(file: WeightsFile) -> int | None:
    """Channels that a UNet's first convolution reads; 4 latents, more for inpainting and edits."""
    for name, header in file.tensors.items():
        if re.search(r"(^|\.)(conv_in|input_blocks\.0\.0)\.weight$", name) and not re.search(
            r"(en|de)coder|cond_embedding|first_stage", name
        ):
            return header.shape[1]
    return None


def _kind(file: WeightsFile) -> str:
    names = file.tensors
    if not names:
        return "a file without tensors"
    special = _special(file)
    if special:
        return special
    lora = lora_kind(names)
    if lora:
        model = family(file)
        if model is None and _any([n.replace(".", "_") for n in names], _TEXT.pattern):
            model = "text encoders"
        if model == "SDXL" and is_reduced(file):
            return f"{lora} of a reduced SDXL (SSD-1B, Vega or KOALA)"
        if model == "SDXL refiner":
            model = "the SDXL refiner"
        return f"{lora} of {model}" if model else f"{lora} of an unknown model"
    return _whole_model(file)


def _special(file: WeightsFile) -> str | None:
    """Files that are neither a LoRA nor a model of their own."""
    names = file.tensors
    parts = {name.partition(".")[0] for name in names}
    if parts <= {"emb_params", "string_to_param", "clip_l", "clip_g", "text_encoders_0"} | {
        "text_encoders_1"
    } or (len(names) <= 2 and all("." not in n and len(h.shape) <= 2 for n, h in names.items())):
        return "a textual inversion embedding"
    if "id_adapter" in parts or "pulid_ca" in parts or "pulid_encoder" in parts:
        return "a PuLID adapter"
    if "id_encoder" in parts and "lora_weights" in parts:
        return "a PhotoMaker file"
    if "image_proj" in parts or "ip_adapter" in parts:
        if "image_proj.perceiver_resampler.proj_in.weight" in names:
            return "a FaceID-Plus adapter"
        return "an IP-Adapter"
    if "lora_controlnet" in names:
        return "a Control-LoRA"
    if _any(
        names, r"^control_model\.|controlnet_(cond|down|mid)|input_hint_block|lllite|^control_"
    ):
        return "a ControlNet"
    if _any(names, r"^(adapter\.)?body\.\d+\.(resnets|block1|in_conv)|^adapter\.body\."):
        return "a T2I-Adapter"
    if _any(names, r"(^|\.)motion_modules\."):
        return "an AnimateDiff motion module"
    if _any(names, r"^\d+\.\d+\.linear\.|^(320|640|768|1024|1280|2048)\.\d"):
        return "a hypernetwork"
    if _any(names, r"rdb1\.|RDB1\.|RRDB|^conv_first\.|^model\.1\.sub\."):
        return "an upscaler"
    return None


def _whole_model(file: WeightsFile) -> str:
    names = file.tensors
    flat = [name.replace(".", "_") for name in names]
    if _any(names, r"^(model\.diffusion_model|conditioner|cond_stage_model|first_stage_model)\."):
        if not _any(names, r"^model\.diffusion_model\."):
            if _any(names, r"^(conditioner|cond_stage_model)\."):
                return "text encoders in one file"
            return "a VAE"
        return _unet_name(file, family(file), "checkpoint in one file")
    if _any(
        names, r"token_embedding\.weight$|^(transformer\.)?text_model\.|^transformer\.resblocks"
    ):
        return "a CLIP text encoder"
    if _any(names, r"patch_embedding|patch_embed\.proj|^(model\.)?(vision_model|visual)\."):
        return "a CLIP vision model"
    if _any(names, r"encoder\.block\.\d+\.layer\.\d|^model\.layers\.\d+\.self_attn"):
        return "a text encoder of another model"
    if _any(names, r"^(vae\.)?(encoder|decoder)\.(conv_in|mid|layers|up|down|\d)"):
        return "a VAE" if _any(names, r"mid(_block)?\.") else "a tiny VAE"
    if _any(flat, _UNET.pattern):
        return _unet_name(file, family(file), "UNet")
    model = family(file)
    return f"a transformer of {model}" if model else "a file of an unknown kind"


def _unet_name(file: WeightsFile, model: str | None, what: str) -> str:
    """ "an SDXL inpainting UNet (9 input channels)": `what` with its model and its use."""
    if model is None or model.startswith("a "):
        return f"a {what}{(model or ' of an unknown model').removeprefix('a UNet')}"
    article = "an" if re.match(r"SD|Hi|Hu|LT|Au", model) else "a"
    channels = in_channels(file)
    if channels not in (None, 4):
        use = {9: "inpainting ", 8: "edit ", 5: "depth ", 7: "upscaling "}.get(channels, "")
        return f"{article} {model} {use}{what} ({channels} input channels)"
    if model == "SDXL" and is_reduced(file):
        return f"a reduced {model} {what} (SSD-1B, Vega or KOALA)"
    return f"{article} {model} {what}"


def _any(names: Iterable[str], mark: str) -> bool:
    pattern = re.compile(mark)
    return any(pattern.search(name) for name in names)
