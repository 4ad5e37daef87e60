"""Where a model's weights lie in a file: the layouts that SDXL's parts are shared in.

A model's own names are those of diffusers and transformers. Files use them, or those of the
original code: SDXL's (`model.diffusion_model.input_blocks.1.0.in_layers.2.weight`), OpenCLIP's for
the second text encoder and the image encoder, where q, k and v are stacked. `find_weights` goes
from each of the model's names to its place in the file, so that what is missing, of another shape,
or left over is known from headers.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fastface_trt.export.weight_files import WeightsFile

Shape = tuple[int, ...]
Spelling = Callable[[str], str]


@dataclass(frozen=True)
class Place:
    """One weight in a file: its name there, and what makes the model's weight of it."""

    file: WeightsFile
    name: str
    third: int | None = None
    """0, 1, 2: the q, k or v of a stacked weight."""
    transposed: bool = False

    def shape(self) -> Shape:
        """The shape that `take` gives, before convolutions of 1×1 become linear."""
        shape = self.file.tensors[self.name].shape
        if self.third is not None:
            shape = (shape[0] // 3, *shape[1:])
        return shape[::-1] if self.transposed else shape

    def take(self, tensor: Tensor) -> Tensor:
        """The model's weight, of the tensor that the file has under `name`."""
        if self.third is not None:
            tensor = tensor.chunk(3)[self.third]
        return tensor.T if self.transposed else tensor


@dataclass
class Found:
    """What `find_weights` found: places by the model's names, and what does not fit."""

    places: dict[str, Place] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    """Names in the file's layout."""
    misshapen: list[tuple[str, Shape, Shape]] = field(default_factory=list)
    """Name in the file, its shape there, the shape that is needed."""
    prefix: str = ""

    def used(self) -> set[str]:
        """The file's names that a weight was found under."""
        return {place.name for place in self.places.values()}


def find_weights(
    part: str, shapes: Mapping[str, Shape], config: Mapping[str, Any], files: Sequence[WeightsFile]
) -> Found | None:
    """The weights of `part` (a folder's name of an SDXL pipeline, or `image_encoder`), whose
    shapes are `shapes` by the model's names, in the layout that has most of them; None where no
    layout has any."""
    having = {name: file for file in files for name in file.tensors}
    best: list[str] = []
    chosen: tuple[str, Spelling] | None = None
    for prefix, spelling in _layouts(part, config):
        hits = [name for name in shapes if prefix + spelling(name).partition("|")[0] in having]
        if len(hits) > len(best):
            best, chosen = hits, (prefix, spelling)
    if chosen is None:
        return None
    found = Found(prefix=chosen[0])
    for name, shape in shapes.items():
        spelled, _, change = (chosen[0] + chosen[1](name)).partition("|")
        if spelled not in having:
            found.missing.append(spelled)
            continue
        third = int(change) if change.isdigit() else None
        place = Place(having[spelled], spelled, third, change == "T")
        if _squeezed(place.shape()) != _squeezed(shape):
            found.misshapen.append((spelled, place.shape(), shape))
        found.places[name] = place
    return found


def _squeezed(shape: Shape) -> Shape:
    """A 1×1 convolution's shape as that of the linear layer that it is."""
    return shape[:2] if len(shape) == 4 and shape[2:] == (1, 1) else shape


def _layouts(part: str, config: Mapping[str, Any]) -> Iterator[tuple[str, Spelling]]:
    """Prefix and spelling of every layout that a part is shared in. A spelling may end in `|n`
    (the n-th third of a stacked weight) or `|T` (transposed)."""
    own: Spelling = str
    if part == "unet":
        original = OriginalUNet(config).name_of
        for prefix in ("model.diffusion_model.", "", "diffusion_model."):
            yield prefix, original
        for prefix in ("", "unet.", "model.diffusion_model."):
            yield prefix, own
    elif part == "vae":
        levels = len(config.get("block_out_channels", ()))
        for prefix in ("first_stage_model.", "", "vae."):
            yield prefix, lambda name: vae_original(name, levels)
        for prefix in ("", "vae.", "first_stage_model."):
            yield prefix, own
        yield "", _vae_before_0_17
    else:
        prefixes = {
            "text_encoder": ("", "conditioner.embedders.0.transformer.", "text_encoder."),
            "text_encoder_2": ("", "conditioner.embedders.1.model.", "text_encoder_2."),
            "image_encoder": ("", "image_encoder."),
        }[part]
        stem = "vision_model." if part == "image_encoder" else "text_model."
        for prefix in prefixes:
            yield prefix, own
            yield prefix, lambda name: name.removeprefix(stem)
            yield prefix, lambda name: name if name.startswith(stem) else stem + name
            yield prefix, open_clip_vision if part == "image_encoder" else open_clip_text


_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_BLOCK = re.compile(
    r"(?:(down|up)_blocks\.(\d+)|mid_block)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\."
)


class OriginalUNet:
    """Names of the original code (sgm), which counts the blocks of all levels through."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        down = config.get("down_block_types", ())
        layers = config.get("layers_per_block", 2)
        per_level = list(layers) if isinstance(layers, list | tuple) else [layers] * len(down)
        self._down, self._up = per_level, per_level[::-1]
        self._attends = [kind.startswith("CrossAttn") for kind in config.get("up_block_types", ())]
        # Between the middle's two residual blocks stands its attention, where it has one.
        middle = config.get("mid_block_type", "UNetMidBlock2DCrossAttn")
        self._middle_step = 2 if middle == "UNetMidBlock2DCrossAttn" else 1

    def name_of(self, name: str) -> str:
        """The original name of a weight that diffusers calls `name`."""
        for ours, theirs in _UNET_ENDS.items():
            if name.startswith(ours + "."):
                return theirs + name.removeprefix(ours)
        block = _BLOCK.match(name)
        if block is None:
            return name
        way, kind, index, rest = block[1], block[3], int(block[4]), name[block.end() :]
        level = int(block[2] or 0)
        slot = 1 if kind == "attentions" else 0
        if way is None:
            before = f"middle_block.{1 if slot else self._middle_step * index}"
        elif way == "down":
            number = 1 + sum(n + 1 for n in self._down[:level])
            number += self._down[level] if kind == "downsamplers" else index
            rest = rest.replace("conv.", "op.") if kind == "downsamplers" else rest
            before = f"input_blocks.{number}.{slot}"
        else:
            number = sum(n + 1 for n in self._up[:level])
            number += self._up[level] if kind == "upsamplers" else index
            if kind == "upsamplers":
                slot = 2 if self._attends[level] else 1
            before = f"output_blocks.{number}.{slot}"
        if kind == "resnets":
            part, _, end = rest.partition(".")
            rest = f"{_RESNET.get(part, part)}.{end}"
        return f"{before}.{rest}"


_VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def vae_original(name: str, levels: int) -> str:
    """The original code's name of a weight of AutoencoderKL; its decoder counts levels down."""
    name = re.sub(r"encoder\.down_blocks\.(\d+)\.resnets\.", r"encoder.down.\1.block.", name)
    name = re.sub(
        r"encoder\.down_blocks\.(\d+)\.downsamplers\.0", r"encoder.down.\1.downsample", name
    )
    name = re.sub(
        r"decoder\.up_blocks\.(\d+)\.(resnets|upsamplers\.0)\.",
        lambda m: (
            f"decoder.up.{levels - 1 - int(m[1])}.{'block' if m[2] == 'resnets' else 'upsample'}."
        ),
        name,
    )
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    attention = re.match(r"(.*)mid_block\.attentions\.0\.(.*)\.(weight|bias)$", name)
    if attention:
        return f"{attention[1]}mid.attn_1.{_VAE_ATTENTION[attention[2]]}.{attention[3]}"
    return name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")


def _vae_before_0_17(name: str) -> str:
    """diffusers' own names of a VAE's attention before it had one attention class."""
    for new, old in {
        ".to_q.": ".query.",
        ".to_k.": ".key.",
        ".to_v.": ".value.",
        ".to_out.0.": ".proj_attn.",
    }.items():
        name = name.replace(new, old)
    return name


_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_OPEN_CLIP_TEXT = {
    "text_projection.weight": "text_projection|T",
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_OPEN_CLIP_VISION = {
    "visual_projection.weight": "proj|T",
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding.weight": "conv1.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "pre_layrnorm.weight": "ln_pre.weight",
    "pre_layrnorm.bias": "ln_pre.bias",
    "post_layernorm.weight": "ln_post.weight",
    "post_layernorm.bias": "ln_post.bias",
}


def open_clip_text(name: str) -> str:
    """OpenCLIP's name of a weight of a CLIP text model."""
    return _open_clip(name.removeprefix("text_model."), _OPEN_CLIP_TEXT)


def open_clip_vision(name: str) -> str:
    """OpenCLIP's name of a weight of a CLIP vision model."""
    return "visual." + _open_clip(name.removeprefix("vision_model."), _OPEN_CLIP_VISION)


def _open_clip(name: str, ends: Mapping[str, str]) -> str:
    layer = re.match(r"encoder\.layers\.(\d+)\.(.*)\.(weight|bias)$", name)
    if layer is None:
        return ends.get(name, name)
    start = f"transformer.resblocks.{layer[1]}."
    if layer[2] in _OPEN_CLIP_LAYER:
        return f"{start}{_OPEN_CLIP_LAYER[layer[2]]}.{layer[3]}"
    third = "qkv".index(layer[2].removeprefix("self_attn.")[0])
    return f"{start}attn.in_proj_{layer[3]}|{third}"
