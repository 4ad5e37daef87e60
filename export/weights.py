"""Where the models of an export come from: a checkpoint with an adapter, or random numbers.

Both give the same models one at a time; the caller exports each and drops it before the next, since
a full-size export would not fit otherwise. What was read on the way (sources, fused LoRAs) is
collected for the manifest.
"""

import json
from pathlib import Path
from typing import Protocol

import torch

from fastface_trt.checkpoints import (
    ADAPTERS,
    EVA02_CLIP_L,
    FACE_MODELS,
    TINY_VAE,
    HubItem,
)
from fastface_trt.engines.manifest import AdapterKind, LoraFused, LoraPart, Orthogonal, Source
from fastface_trt.errors import InvalidRequest
from fastface_trt.export import full_size
from fastface_trt.export.adapters import attach_adapter, load_projection, read_adapter
from fastface_trt.export.face_modules import load_eva_tower
from fastface_trt.export.lora import LoraRequest, fuse, plan_loras
from fastface_trt.export.options import ExportOptions
from fastface_trt.export.precision import Model
from fastface_trt.export.sources import (
    CheckpointSource,
    load_image_encoder,
    load_unet_weights,
    load_vae,
    locate,
)
from fastface_trt.mini.folders import FACE_MODEL
from fastface_trt.runtime.tokenizer import PAD_TOKENS, write_byte_tokenizer

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "tokenizer.json",
)

Normalisation = tuple[tuple[float, float, float], tuple[float, float, float]]


class Weights(Protocol):
    """Models by name, each loaded anew when it is asked for."""

    adapter_name: str
    adapter_kind: AdapterKind
    orthogonal: Orthogonal
    face_model: str
    force_zeros_for_empty_prompt: bool
    sources: list[Source]
    loras: list[LoraFused]

    def text_encoder(self, name: str) -> Model:
        """`text_encoder` or `text_encoder_2`."""
        ...

    def image_encoder(self) -> Model:
        """The vision model of the adapter, where it has one."""
        ...

    def image_normalisation(self) -> Normalisation:
        """Mean and standard deviation per channel that the image encoder's input is given."""
        ...

    def projection(self) -> Model:
        """The adapter's face projection."""
        ...

    def vae(self) -> Model:
        """The VAE whose decoder is exported."""
        ...

    def unet(self) -> Model:
        """The UNet with the adapter attached and every LoRA fused."""
        ...

    def copy_tokenizer(self, name: str, folder: Path) -> None:
        """Write the files of `tokenizer` or `tokenizer_2` into a new `folder`."""
        ...


class CheckpointWeights:
    """The weights that an `ExportOptions` names."""

    def __init__(self, options: ExportOptions) -> None:
        checkpoint = options.checkpoint
        self._options = options
        self._source = CheckpointSource(
            options.base or checkpoint.base, options.dtype, checkpoint.base
        )
        adapter = locate(options.adapter or checkpoint.adapter, "adapter")
        self._adapter = read_adapter(adapter.path)
        self.adapter_name = adapter.path.name
        self.adapter_kind = self._adapter.kind
        self.orthogonal = _orthogonal(options, self.adapter_kind)
        self.face_model = checkpoint.face_model or FACE_MODELS[self.adapter_kind]
        self.force_zeros_for_empty_prompt = self._source.force_zeros_for_empty_prompt()
        self.sources = [self._source.located.source, adapter.source]
        encoder = self._encoder_item()
        if encoder is not None:
            self._image_encoder = locate(encoder, "image_encoder")
            self.sources.append(self._image_encoder.source)
        self._loras = plan_loras(self._lora_requests(), self._source)
        self.sources += [plan.source for plan in self._loras]
        self.loras = [plan.record() for plan in self._loras]

    def _lora_requests(self) -> list[LoraRequest]:
        """The distillation LoRA of the checkpoint or in its place, then those of `--lora`."""
        options, checkpoint = self._options, self._options.checkpoint
        requests = [LoraRequest(one.item, one.scale, "style") for one in options.loras]
        item = options.distillation_lora or checkpoint.lora
        if item is not None:
            scale = options.distillation_lora_scale
            scale = checkpoint.lora_scale if scale is None else scale
            requests.insert(0, LoraRequest(self._for_steps(item), scale, "distillation"))
        return requests

    def _encoder_item(self) -> HubItem | None:
        if self.adapter_kind == "pulid":
            return self._options.image_encoder or EVA02_CLIP_L
        if self.adapter_kind == "faceid-plus-v2":
            return self._options.image_encoder or self._options.checkpoint.image_encoder
        if self._options.image_encoder is None:
            return None
        raise InvalidRequest(
            f"{self.adapter_name} is a FaceID adapter, which looks at no picture.",
            "Leave out --image-encoder, or take a FaceID-Plus-v2 adapter.",
        )

    def text_encoder(self, name: str) -> Model:
        encoder = self._source.component(name)
        fuse(name, encoder, self._loras)
        return encoder

    def image_encoder(self) -> Model:
        if self.adapter_kind == "pulid":
            return load_eva_tower(self._image_encoder.path, self._options.dtype)
        return load_image_encoder(self._image_encoder.path, self._options.dtype)

    def image_normalisation(self) -> Normalisation:
        """CLIP's own where the folder has no preprocessor configuration."""
        file = self._image_encoder.path / "preprocessor_config.json"
        values = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        mean, std = values.get("image_mean", CLIP_MEAN), values.get("image_std", CLIP_STD)
        return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])

    def projection(self) -> Model:
        projection = load_projection(self._adapter, self._options.zero_tokens)
        return projection.to(self._options.dtype)

    def vae(self) -> Model:
        """In float16 the checkpoint's fp16 VAE where it has one.

        SDXL's own VAE overflows in fp16 and says so in its configuration; it stays in float32.
        """
        options = self._options
        item = options.vae or (TINY_VAE if options.tiny_vae else None)
        if item is None and options.dtype == torch.float16:
            item = options.checkpoint.fp16_vae
        if item is not None:
            vae, source = load_vae(item, options.dtype)
            self.sources.append(source)
            return vae
        vae = self._source.component("vae")
        overflows = getattr(vae.config, "force_upcast", False) and options.dtype == torch.float16
        return vae.float() if overflows else vae

    def unet(self) -> Model:
        options, checkpoint = self._options, self._options.checkpoint
        unet = self._source.component("unet")
        if checkpoint.unet and not options.base:
            self.sources.append(load_unet_weights(unet, self._for_steps(checkpoint.unet)))
        fuse("unet", unet, self._loras)
        scale = options.faceid_lora_scale
        attach_adapter(unet, self._adapter, lora_scale=scale, orthogonal=self.orthogonal)
        if self._adapter.has_lora:
            modules = sum(key.endswith("_lora.down.weight") for key in self._adapter.ip_adapter)
            part = LoraPart(modules=modules, kinds={"lora": modules})
            self.loras.append(
                LoraFused(
                    role="faceid", scale=scale, file=self.adapter_name, components={"unet": part}
                )
            )
        return unet

    def _for_steps(self, item: HubItem) -> HubItem:
        """Hyper and Lightning ship one file per number of steps: fill it into the path."""
        steps = self._options.steps or self._options.checkpoint.steps
        path = (item.path or "").format(steps=steps, plural="" if steps == 1 else "s")
        return HubItem(item.location, item.revision, path or None, item.licence)

    def copy_tokenizer(self, name: str, folder: Path) -> None:
        folder.mkdir()
        for file in _TOKENIZER_FILES:
            source = self._source.tokenizer(name) / file
            if source.is_file():
                (folder / file).write_bytes(source.read_bytes())


def _orthogonal(options: ExportOptions, kind: AdapterKind) -> Orthogonal:
    """PuLID's way, and none for the other adapters; PuLID's options are refused for those."""
    if kind == "pulid":
        return options.orthogonal or "v2"
    if options.orthogonal is not None or options.zero_tokens is not None:
        raise InvalidRequest(
            f"An adapter of kind {kind} has no orthogonal attention and no zero tokens.",
            "Leave out --orthogonal and --zero-tokens, or take --adapter pulid.",
        )
    return "off"


class RandomWeights:
    """Full-size SDXL with random weights; faces are found with the mini model's networks."""

    def __init__(self, options: ExportOptions) -> None:
        self._dtype = options.dtype
        self._zero_tokens = options.zero_tokens
        self.adapter_name = "random"
        named = (kind for kind, item in ADAPTERS.items() if item == options.adapter)
        self.adapter_kind: AdapterKind = next(named, "faceid-plus-v2")
        self.orthogonal = _orthogonal(options, self.adapter_kind)
        # Random weights need faces too, and must not need a download.
        self.face_model = str(FACE_MODEL)
        self.force_zeros_for_empty_prompt = True
        self.sources = [Source(role="random weights", location="-", licence="none")]
        self.loras: list[LoraFused] = []

    def text_encoder(self, name: str) -> Model:
        return full_size.random_text_encoder(name, self._dtype)

    def image_encoder(self) -> Model:
        if self.adapter_kind == "pulid":
            return full_size.random_eva_tower(self._dtype)
        return full_size.random_image_encoder(self._dtype)

    def image_normalisation(self) -> Normalisation:
        return CLIP_MEAN, CLIP_STD

    def projection(self) -> Model:
        return full_size.random_projection(self._dtype, self.adapter_kind, self._zero_tokens)

    def vae(self) -> Model:
        return full_size.random_vae(self._dtype)

    def unet(self) -> Model:
        return full_size.random_unet(self._dtype, self.orthogonal)

    def copy_tokenizer(self, name: str, folder: Path) -> None:
        write_byte_tokenizer(folder, PAD_TOKENS[name])
