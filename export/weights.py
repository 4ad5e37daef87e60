"""Where the models of an export come from: a checkpoint with an adapter, or random numbers.

Both give the same models one at a time; the caller exports each and drops it before the next, since
a full-size export would not fit otherwise. What was read on the way (sources, fused LoRAs) is
collected for the manifest.
"""

import json
from pathlib import Path
from typing import Any, Protocol

import torch

from fastface_trt.checkpoints import (
    ADAPTERS,
    EVA02_CLIP_L,
    FACE_MODELS,
    FP16_VAE,
    TINY_VAE,
    HubItem,
)
from fastface_trt.engines.engine import Progress
from fastface_trt.engines.manifest import (
    MAX_FACES,
    PORTRAIT,
    AdapterKind,
    LoraFused,
    LoraPart,
    Orthogonal,
    Source,
)
from fastface_trt.errors import InvalidRequest, WeightsError
from fastface_trt.export import full_size
from fastface_trt.export.adapters import (
    attach_adapter,
    check_adapter,
    load_projection,
    read_adapter,
)
from fastface_trt.export.base_facts import base_name, read_base
from fastface_trt.export.face_modules import check_eva_tower, load_eva_tower
from fastface_trt.export.locations import is_local, locate
from fastface_trt.export.lora import LoraRequest, fuse, plan_loras
from fastface_trt.export.options import ExportOptions
from fastface_trt.export.precision import Model
from fastface_trt.export.sources import (
    TEXT_ENCODERS,
    CheckpointSource,
    model_config,
    model_part,
)
from fastface_trt.mini.folders import FACE_MODEL
from fastface_trt.runtime.face import EMBEDDING_SIZE
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

    scheduler: dict[str, Any]
    size: tuple[int, int]
    """(height, width) in pixels that the checkpoint was made for."""
    adapter_name: str
    adapter_kind: AdapterKind
    orthogonal: Orthogonal
    max_faces: int
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
    """The weights that an `ExportOptions` names; `progress` is told what is replaced or kept."""

    def __init__(self, options: ExportOptions, progress: Progress = lambda line: None) -> None:
        checkpoint = options.checkpoint
        self._options = options
        self._progress = progress
        unet = None if options.base else checkpoint.unet
        vae = self._vae_item()
        replaced = [name for name, item in (("unet", unet), ("vae", vae)) if item]
        self._source = CheckpointSource(
            options.base or checkpoint.base,
            options.dtype,
            checkpoint.base,
            base_text=options.base_text,
            without=replaced,
        )
        adapter = locate(options.adapter or checkpoint.adapter, "adapter")
        self._adapter = read_adapter(adapter.path, options.adapter_kind)
        self._base = read_base(options, self._source, self._adapter, progress)
        self.scheduler, self.size = self._base.scheduler, self._base.size
        self._source.find()
        for note in self._source.notes:
            progress(note)
        self.sources = list(self._source.sources)
        self._vae_name = ""
        if unet:
            self._replace("unet", self._for_steps(unet))
        if vae:
            self._vae_name = self._replace("vae", vae)
            self._base.check_vae(self._source.skeleton("vae"), self._vae_name)
        self.adapter_name = adapter.path.name
        self.adapter_kind = self._adapter.kind
        self.orthogonal = _orthogonal(options, self.adapter_kind)
        self.max_faces = _max_faces(options, self.adapter_kind)
        self.face_model = checkpoint.face_model or FACE_MODELS[self.adapter_kind]
        self.force_zeros_for_empty_prompt = self._source.force_zeros_for_empty_prompt()
        self.sources.append(adapter.source)
        encoder = self._encoder_item()
        if encoder is not None:
            self._find_image_encoder(encoder)
        check_adapter(self._adapter, self._source.skeleton("unet"), self.orthogonal)
        self._check_widths()
        self._loras = plan_loras(self._lora_requests(), self._source)
        self.sources += [plan.source for plan in self._loras]
        self.loras = [plan.record() for plan in self._loras]

    def _lora_requests(self) -> list[LoraRequest]:
        """The distillation LoRA of the checkpoint or in its place, then those of `--lora`."""
        options, checkpoint = self._options, self._options.checkpoint
        requests = [LoraRequest(one.item, one.scale, "style") for one in options.loras]
        item = self._base.distillation
        if item is not None:
            scale = options.distillation_lora_scale
            scale = checkpoint.lora_scale if scale is None else scale
            requests.insert(0, LoraRequest(self._for_steps(item), scale, "distillation"))
        return requests

    def _replace(self, name: str, item: HubItem) -> str:
        """Put a model of its own in the place of the base's; returns where it comes from."""
        config = self._source.config(name)
        part, _, source = model_part(name, item, self._options.dtype, config, inside=(name,))
        self._source.parts[name] = part
        self.sources.append(source)
        return source.location

    def _find_image_encoder(self, item: HubItem) -> None:
        if self.adapter_kind == "pulid":
            located = locate(item, "image_encoder")
            check_eva_tower(located.path)
            self._image_encoder, source = located.path, located.source
        else:
            own = self._options.checkpoint.image_encoder
            config = model_config(Path(own.location)) if is_local(own) else None
            self._source.parts["image_encoder"], self._image_encoder, source = model_part(
                "image_encoder",
                item,
                self._options.dtype,
                config or full_size.sdxl_config("image_encoder"),
                inside=("image_encoder", "models/image_encoder"),
            )
        self.sources.append(source)

    def _check_widths(self) -> None:
        """What goes from one model into another has to be as wide as that expects."""
        text = [self._source.config(name)["hidden_size"] for name in TEXT_ENCODERS]
        unet = self._source.config("unet")["cross_attention_dim"]
        if isinstance(unet, int) and unet != sum(text):
            raise WeightsError(
                f"The text encoders are {text[0]} and {text[1]} wide, and the UNet reads text of "
                f"{unet}.",
                "Take the text encoders of the model that the UNet is of: --base-text FOLDER|ID.",
            )
        face = self._adapter.embedding
        if face is not None and face != EMBEDDING_SIZE:
            raise WeightsError(
                f"{self.adapter_name} projects vectors of {face} numbers, and a face is one of "
                f"{EMBEDDING_SIZE}.",
                "It is of another kind than FaceID's: an IP-Adapter Plus reads CLIP's features.",
            )
        features, encoder = self._adapter.features, self._source.parts.get("image_encoder")
        if features and encoder:
            width = encoder.config["hidden_size"]
            if width != features:
                raise WeightsError(
                    f"The image encoder is {width} wide, and the adapter was trained with one of "
                    f"{features}.",
                    "FaceID-Plus-v2 needs CLIP ViT-H (h94/IP-Adapter, models/image_encoder).",
                )

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
            return load_eva_tower(self._image_encoder, self._options.dtype)
        return self._source.component("image_encoder")

    def image_normalisation(self) -> Normalisation:
        """CLIP's own where the folder has no preprocessor configuration."""
        file = self._image_encoder / "preprocessor_config.json"
        values = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        mean, std = values.get("image_mean", CLIP_MEAN), values.get("image_std", CLIP_STD)
        return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])

    def projection(self) -> Model:
        projection = load_projection(self._adapter, self._options.zero_tokens)
        return projection.to(self._options.dtype)

    def _vae_item(self) -> HubItem | None:
        """A VAE in the place of the base's own, which the registry has for fp16: a base of one's
        own keeps its VAE, which may be trained on."""
        options = self._options
        item = options.vae or (TINY_VAE if options.tiny_vae else None)
        stand_in = options.checkpoint.fp16_vae
        if item or options.base or options.dtype != torch.float16 or stand_in is None:
            return item
        self._progress(
            f"{base_name(options.checkpoint.base)}: its VAE overflows in fp16, "
            f"{stand_in.location} stands in for it"
        )
        return stand_in

    def vae(self) -> Model:
        """In float32 where its configuration says that it overflows in float16."""
        options, part = self._options, self._source.parts["vae"]
        own = not self._vae_name
        overflows = self._base.vae_overflows if own else part.config.get("force_upcast", False)
        if overflows and options.dtype == torch.float16:
            name = self._vae_name or self._base.name
            self._progress(
                f"{name}: the VAE's configuration says that it overflows in fp16 (force_upcast), "
                f"so it stays in fp32; --vae {FP16_VAE.location} is half as large"
            )
            vae = part.load(torch.float32)
        else:
            vae = part.load(options.dtype)
        if self._vae_name:
            self._base.check_vae(vae, self._vae_name)
        else:
            self._base.give_latents(vae)
        return vae

    def unet(self) -> Model:
        options = self._options
        unet = self._source.component("unet")
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


def _max_faces(options: ExportOptions, kind: AdapterKind) -> int:
    """Pictures of a person that a request may have; more than one are FaceID-Portrait's alone."""
    if kind in PORTRAIT:
        return options.max_faces or MAX_FACES
    if options.max_faces is not None:
        raise InvalidRequest(
            f"An adapter of kind {kind} takes one picture of a person.",
            "Leave out --max-faces, or take --adapter faceid-portrait.",
        )
    return 1


class RandomWeights:
    """Full-size SDXL with random weights; faces are found with the mini model's networks."""

    def __init__(self, options: ExportOptions) -> None:
        self._dtype = options.dtype
        self._zero_tokens = options.zero_tokens
        self.scheduler = dict(options.checkpoint.scheduler)
        self.size = (options.checkpoint.size, options.checkpoint.size)
        self.adapter_name = "random"
        named = (kind for kind, item in ADAPTERS.items() if item == options.adapter)
        self.adapter_kind: AdapterKind = next(named, "faceid-plus-v2")
        self.orthogonal = _orthogonal(options, self.adapter_kind)
        self.max_faces = _max_faces(options, self.adapter_kind)
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
