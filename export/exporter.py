"""One export from start to finish: six modules, tokenizers, the face model and the manifest.

Modules are made one after the other and dropped, so the peak is the largest module (the UNet) and
not the sum. The folder appears under its name only when everything in it is complete.
"""

import gc
import json
import resource
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch
from torch import nn

from fastface_trt.engines.engine import Progress
from fastface_trt.engines.files import describe_file, finished_folder
from fastface_trt.engines.manifest import (
    EXPORT_MANIFEST,
    ExportManifest,
    FileEntry,
    LoraFused,
    ModuleSpec,
    Source,
)
from fastface_trt.errors import InvalidRequest
from fastface_trt.export import full_size, modules
from fastface_trt.export.adapter import attach_adapter, load_projection, read_adapter
from fastface_trt.export.checkpoints import TINY_VAE, Checkpoint, HubItem, mini_folder
from fastface_trt.export.onnx_writer import write_module
from fastface_trt.export.sources import (
    CheckpointSource,
    fuse_distillation_lora,
    load_image_encoder,
    load_unet_weights,
    load_vae,
    locate,
)

Precision = Literal["fp32", "fp16"]
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ExportOptions:
    """What to export. Items left at None come from the checkpoint's registry entry.

    precision: type that the modules compute in; weight_storage: type that the files hold (`fp16`
    halves an fp32 export's files, engines still compute in fp32). height, width: pixels, the
    example's size, or the only one with `fixed_size`. faceid_lora_scale: scale of the adapter's
    LoRA, fused. random_weights: full-size SDXL without downloads.
    """

    checkpoint: Checkpoint
    precision: Precision = "fp32"
    weight_storage: Precision | None = None
    steps: int | None = None
    height: int | None = None
    width: int | None = None
    fixed_size: bool = False
    base: HubItem | None = None
    adapter: HubItem | None = None
    image_encoder: HubItem | None = None
    vae: HubItem | None = None
    tiny_vae: bool = False
    faceid_lora_scale: float = 1.0
    distillation_lora_scale: float | None = None
    random_weights: bool = False

    def __post_init__(self) -> None:
        steps, allowed = self.steps, self.checkpoint.allowed_steps
        if steps is not None and steps not in allowed:
            raise InvalidRequest(
                f"Checkpoint {self.checkpoint.name} does not do {steps} steps.",
                f"Choose one of {', '.join(map(str, allowed))}.",
            )
        if self.random_weights and (self.base or self.adapter or self.vae or self.image_encoder):
            raise InvalidRequest(
                "--random-weights takes no weights.", "Leave out --base, --adapter and the like."
            )

    @property
    def dtype(self) -> torch.dtype:
        """The torch type of `precision`."""
        return torch.float16 if self.precision == "fp16" else torch.float32


@dataclass
class _Parts:
    """What an export collects while its modules are written."""

    specs: dict[str, ModuleSpec] = field(default_factory=dict)
    sources: list[Source] = field(default_factory=list)
    loras: list[LoraFused] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


def run_export(options: ExportOptions, out: Path, progress: Progress) -> ExportManifest:
    """Write the export to folder `out` and return its manifest.

    Raises `WeightsError`, `InvalidRequest` or `StorageError`; then nothing is left at `out` that
    was not there before. `progress` is told every phase with its seconds and the peak memory.
    """
    parts = _Parts()
    with finished_folder(out, EXPORT_MANIFEST) as draft:
        makers = (
            _random_modules(options, parts)
            if options.random_weights
            else _modules(options, parts, draft.path)
        )
        for name, make in makers:
            started = perf_counter()
            progress(f"{name}: loading")
            export = make()
            progress(f"{name}: exporting to ONNX")
            storage = options.weight_storage or options.precision
            parts.specs[name] = write_module(
                export,
                draft.path,
                fp16_storage=storage == "fp16" and options.precision == "fp32",
            )
            size = sum(f.bytes for f in parts.specs[name].files) / 2**20
            del export
            gc.collect()
            seconds = perf_counter() - started
            progress(f"{name}: {size:.1f} MB in {seconds:.0f} s, peak memory {peak_gb():.1f} GB")
        extra = _copy_tokenizers(options, parts, draft.path)
        face_model = _copy_face_model(options, draft.path, extra)
        manifest = _manifest(options, parts, extra, face_model)
        draft.finish(manifest)
    return manifest


def peak_gb() -> float:
    """Peak resident memory of this process so far, in GB (2³⁰ bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


Makers = Iterator[tuple[str, Callable[[], modules.ModuleExport]]]


def _latent_size(options: ExportOptions, factor: int, levels: int) -> tuple[int, int]:
    size = options.checkpoint.size
    pixels = (options.height or size, options.width or size)
    unit = factor * 2 ** (levels - 1)
    if any(side < unit or side % unit for side in pixels):
        raise InvalidRequest(
            f"{pixels[0]}x{pixels[1]} pixels do not fit this checkpoint.",
            f"Height and width must be multiples of {unit}.",
        )
    return pixels[0] // factor, pixels[1] // factor


def _record_vae(parts: _Parts, vae: nn.Module) -> None:
    # AutoencoderKL halves between its blocks, the tiny one carries its levels in another field.
    blocks = (
        getattr(vae.config, "block_out_channels", None) or vae.config.decoder_block_out_channels
    )
    parts.facts["vae_scale_factor"] = 2 ** (len(blocks) - 1)
    parts.facts["latent_channels"] = vae.config.latent_channels


def _record_image_encoder(parts: _Parts, encoder: nn.Module, folder: Path | None) -> int:
    parts.facts["image_encoder_size"] = encoder.config.image_size
    preprocessor = folder / "preprocessor_config.json" if folder else None
    values = json.loads(preprocessor.read_text()) if preprocessor and preprocessor.is_file() else {}
    parts.facts["image_mean"] = tuple(values.get("image_mean", CLIP_MEAN))
    parts.facts["image_std"] = tuple(values.get("image_std", CLIP_STD))
    return (encoder.config.image_size // encoder.config.patch_size) ** 2 + 1


def _modules(options: ExportOptions, parts: _Parts, draft: Path) -> Makers:
    """The six modules of a checkpoint with weights, in the order in which they are made."""
    checkpoint, dtype = options.checkpoint, options.dtype
    source = CheckpointSource(options.base or checkpoint.base, dtype, checkpoint.base)
    parts.sources.append(source.located.source)
    parts.facts["force_zeros_for_empty_prompt"] = source.force_zeros_for_empty_prompt()
    parts.facts["tokenizers"] = [source.tokenizer("tokenizer"), source.tokenizer("tokenizer_2")]
    located = locate(options.adapter or checkpoint.adapter, "adapter")
    parts.sources.append(located.source)
    adapter = read_adapter(located.path)
    parts.facts["adapter"] = located.path.name
    steps = options.steps or checkpoint.steps

    def with_steps(item: HubItem) -> HubItem:
        path = (item.path or "").format(steps=steps, plural="" if steps == 1 else "s")
        return HubItem(item.location, item.revision, path or None, item.licence)

    def make_unet() -> modules.ModuleExport:
        unet = source.unet()
        if checkpoint.unet and not options.base:
            parts.sources.append(load_unet_weights(unet, with_steps(checkpoint.unet)))
        if checkpoint.lora:
            scale = options.distillation_lora_scale
            scale = checkpoint.lora_scale if scale is None else scale
            item = with_steps(checkpoint.lora)
            parts.sources.append(fuse_distillation_lora(unet, item, scale))
            parts.loras.append(LoraFused(role="distillation", scale=scale))
        attach_adapter(unet, adapter, lora_scale=options.faceid_lora_scale)
        parts.loras.append(LoraFused(role="faceid", scale=options.faceid_lora_scale))
        return modules.unet_export(
            unet,
            tokens=parts.facts["image_token_count"],
            latent_size=_latent_size(
                options, parts.facts["vae_scale_factor"], len(unet.config.block_out_channels)
            ),
            fixed_size=options.fixed_size,
        )

    def make_vae() -> modules.ModuleExport:
        item = options.vae or (TINY_VAE if options.tiny_vae else None)
        if item is None and options.precision == "fp16":
            item = checkpoint.fp16_vae
        if item is None:
            vae = source.vae()
        else:
            vae, vae_source = load_vae(item, dtype)
            parts.sources.append(vae_source)
        if (
            getattr(vae.config, "force_upcast", False)
            and options.precision == "fp16"
            and item is None
        ):
            vae = vae.float()  # SDXL's own VAE overflows in fp16
        _record_vae(parts, vae)
        factor = parts.facts["vae_scale_factor"]
        return modules.vae_decoder_export(
            vae,
            latent_size=_latent_size(options, factor, 1),
            scale_factor=factor,
            fixed_size=options.fixed_size,
        )

    def make_image_encoder() -> modules.ModuleExport:
        item = options.image_encoder or checkpoint.image_encoder
        encoder, encoder_source = load_image_encoder(item, dtype)
        parts.sources.append(encoder_source)
        folder = Path(item.location)
        parts.facts["clip_positions"] = _record_image_encoder(
            parts, encoder, folder if folder.is_dir() else None
        )
        return modules.image_encoder_export(encoder)

    def make_projection() -> modules.ModuleExport:
        projection = load_projection(adapter).to(dtype)
        parts.facts["image_token_count"] = projection.tokens
        return modules.face_projection_export(projection, parts.facts["clip_positions"])

    for name in ("text_encoder", "text_encoder_2"):
        yield name, lambda name=name: modules.text_encoder_export(name, source.text_encoder(name))
    yield "image_encoder", make_image_encoder
    yield "face_projection", make_projection
    yield "vae_decoder", make_vae
    yield "unet", make_unet


def _random_modules(options: ExportOptions, parts: _Parts) -> Makers:
    """The six modules at full size with random weights."""
    dtype = options.dtype
    parts.facts["adapter"] = "random"
    parts.facts["force_zeros_for_empty_prompt"] = True
    latent_size = _latent_size(options, 8, 3)

    def make_vae() -> modules.ModuleExport:
        vae = full_size.random_vae(dtype)
        _record_vae(parts, vae)
        return modules.vae_decoder_export(
            vae, latent_size=latent_size, scale_factor=8, fixed_size=options.fixed_size
        )

    def make_image_encoder() -> modules.ModuleExport:
        encoder = full_size.random_image_encoder(dtype)
        parts.facts["clip_positions"] = _record_image_encoder(parts, encoder, None)
        return modules.image_encoder_export(encoder)

    def make_projection() -> modules.ModuleExport:
        projection = full_size.random_projection(dtype)
        parts.facts["image_token_count"] = projection.tokens
        return modules.face_projection_export(projection, parts.facts["clip_positions"])

    for name in ("text_encoder", "text_encoder_2"):
        yield (
            name,
            lambda name=name: modules.text_encoder_export(
                name, full_size.random_text_encoder(name, dtype)
            ),
        )
    yield "image_encoder", make_image_encoder
    yield "face_projection", make_projection
    yield "vae_decoder", make_vae
    yield (
        "unet",
        lambda: modules.unet_export(
            full_size.random_unet(dtype),
            tokens=4,
            latent_size=latent_size,
            fixed_size=options.fixed_size,
        ),
    )


_TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "tokenizer.json",
)


def _copy_tokenizers(options: ExportOptions, parts: _Parts, draft: Path) -> list[FileEntry]:
    for index, name in enumerate(("tokenizer", "tokenizer_2")):
        if options.random_weights:
            full_size.write_byte_tokenizer(draft / name, ("<|endoftext|>", "!")[index])
            continue
        (draft / name).mkdir()
        for file in _TOKENIZER_FILES:
            source = parts.facts["tokenizers"][index] / file
            if source.is_file():
                shutil.copyfile(source, draft / name / file)
    return [
        describe_file(draft, path)
        for name in ("tokenizer", "tokenizer_2")
        for path in sorted((draft / name).iterdir())
    ]


def _copy_face_model(options: ExportOptions, draft: Path, extra: list[FileEntry]) -> str:
    """Copy a face model that is a folder into the export; a pack's name is only recorded."""
    model = options.checkpoint.face_model
    if options.random_weights:  # random weights need faces too, and must not need a download
        model = str(mini_folder() / "face")
    if not Path(model).is_dir():
        return model
    shutil.copytree(model, draft / "face")
    extra += [describe_file(draft, p) for p in sorted((draft / "face").rglob("*")) if p.is_file()]
    return "face"


def _manifest(
    options: ExportOptions, parts: _Parts, extra: list[FileEntry], face_model: str
) -> ExportManifest:
    checkpoint, facts = options.checkpoint, parts.facts
    packages = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "fastface-trt")
    return ExportManifest(
        checkpoint=checkpoint.name,
        adapter=facts["adapter"],
        precision=options.precision,
        weight_storage=options.weight_storage or options.precision,
        modules=parts.specs,
        extra_files=tuple(extra),
        sources=tuple(parts.sources),
        loras=tuple(parts.loras),
        scheduler=dict(checkpoint.scheduler),
        steps=options.steps or checkpoint.steps,
        allowed_steps=checkpoint.allowed_steps,
        height=options.height or checkpoint.size,
        width=options.width or checkpoint.size,
        fixed_size=options.fixed_size,
        vae_scale_factor=facts["vae_scale_factor"],
        latent_channels=facts["latent_channels"],
        image_token_count=facts["image_token_count"],
        image_encoder_size=facts["image_encoder_size"],
        image_mean=facts["image_mean"],
        image_std=facts["image_std"],
        force_zeros_for_empty_prompt=facts["force_zeros_for_empty_prompt"],
        face_model=face_model,
        random_weights=options.random_weights,
        tool_versions={name: version(name) for name in packages},
    )
