"""What to export: the choices of one export, checked before anything is loaded."""

from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Literal

import torch

from fastface_trt.checkpoints import ADAPTERS, Checkpoint, HubItem
from fastface_trt.engines.manifest import MAX_FACES, MOST_FACES, AdapterKind, Orthogonal
from fastface_trt.errors import InvalidRequest
from fastface_trt.export.operators import Operators, Spelling
from fastface_trt.export.precision import (
    QUANTIZED_FORMATS,
    Precision,
    QuantizedFormat,
    StoredType,
    compute_dtype,
    stored_type,
)
from fastface_trt.export.quantization.calibration import Calibration


@dataclass(frozen=True)
class LoraFile:
    """A LoRA to fuse, and by which scale."""

    item: HubItem
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not isfinite(self.scale):
            raise InvalidRequest(
                f"The scale of {self.item.location} is {self.scale}.", "Give a number such as 0.8."
            )


@dataclass(frozen=True)
class ExportOptions:
    """What to export. Items left at None come from the checkpoint's registry entry.

    precision: what the modules compute in, see `fastface_trt.export.precision`; weight_storage:
    type that the files hold (`fp16` halves an fp32 export's files, engines still compute in fp32).
    height, width: pixels, the
    example's size, or the only one with `fixed_size`. faceid_lora_scale: scale of the adapter's
    LoRA, fused; loras: others, see `fastface_trt.export.lora`. base_is_distilled: whether a base of
    one's own needs no distillation LoRA, None to stop where it seems so; prediction_type, zero_snr:
    what it was trained with, where it does not say so itself, see `fastface_trt.export.base_facts`.
    adapter_kind: of the adapter, where its file does not tell; max_faces: pictures of a person that
    a FaceID-Portrait export takes, see `fastface_trt.engines.manifest`.
    zero_tokens, orthogonal, face_parser: of a PuLID adapter, see
    `fastface_trt.export.adapters`, `fastface_trt.export.attention` and
    `fastface_trt.runtime.face`. random_weights: full-size SDXL without downloads.
    calibration: what the modules to quantise are run on. quantize_attention: q, k, v and softmax
    of an fp8 UNet in fp8 too; quantize_vae: the 8-bit format of the VAE's convolutions.
    attention_operator, group_norm:
    see `fastface_trt.export.operators`. Raises `InvalidRequest`.
    """

    checkpoint: Checkpoint
    precision: Precision = "fp32"
    weight_storage: StoredType | None = None
    steps: int | None = None
    height: int | None = None
    width: int | None = None
    fixed_size: bool = False
    base: HubItem | None = None
    base_text: HubItem | None = None
    adapter: HubItem | None = None
    adapter_kind: AdapterKind | None = None
    max_faces: int | None = None
    image_encoder: HubItem | None = None
    vae: HubItem | None = None
    tiny_vae: bool = False
    face_parser: Path | None = None
    zero_tokens: int | None = None
    orthogonal: Orthogonal | None = None
    faceid_lora_scale: float = 1.0
    distillation_lora: HubItem | None = None
    distillation_lora_scale: float | None = None
    loras: tuple[LoraFile, ...] = ()
    base_is_distilled: bool | None = None
    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    zero_snr: bool | None = None
    random_weights: bool = False
    calibration: Calibration | None = None
    quantize_attention: bool = False
    quantize_vae: QuantizedFormat | None = None
    attention_operator: Spelling = "spelled"
    group_norm: Spelling = "spelled"

    def __post_init__(self) -> None:
        allowed = self.checkpoint.allowed_steps
        if self.steps is not None and self.steps not in allowed:
            raise InvalidRequest(
                f"Checkpoint {self.checkpoint.name} does not do {self.steps} steps.",
                f"Choose one of {', '.join(map(str, allowed))}.",
            )
        if self.weight_storage not in (None, "fp16", stored_type(self.precision)) or (
            self.weight_storage == "fp16" and self.precision == "bf16"
        ):
            raise InvalidRequest(
                f"A {self.precision} export cannot store its weights as {self.weight_storage}.",
                "Leave out --weight-storage, or add --precision fp32 --weight-storage fp16.",
            )
        if self.zero_tokens is not None and self.zero_tokens < 0:
            raise InvalidRequest(
                f"{self.zero_tokens} zero tokens are asked for.", "Give 0 or more, PuLID uses 20."
            )
        if self.max_faces is not None and not 1 <= self.max_faces <= MOST_FACES:
            raise InvalidRequest(
                f"{self.max_faces} pictures of a person are asked for.",
                f"Give 1 to {MOST_FACES}; the adapter was made for up to {MAX_FACES}.",
            )
        if self.quantize_attention and self.precision != "fp8":
            raise InvalidRequest(
                f"A {self.precision} export does not quantise its attention.",
                "Leave out --quantize-attention, or add --precision fp8.",
            )
        if self.quantize_attention and self.attention_operator == "onnx":
            raise InvalidRequest(
                "The softmax inside an ONNX Attention node cannot be quantised.",
                "Leave out --quantize-attention or --attention-operator onnx.",
            )
        if self.quantize_vae and (self.precision == "bf16" or self.tiny_vae):
            raise InvalidRequest(
                f"A {'tiny' if self.tiny_vae else 'bf16'} VAE is not quantised.",
                "Leave out --quantize-vae, or take another VAE or precision.",
            )
        if (self.quantized or self.quantize_vae) and self.calibration is None:
            raise InvalidRequest(
                f"A {self.quantized or self.quantize_vae} export needs something to calibrate on.",
                "Give `calibration`, or use fastface-trt export, which runs prompts and faces.",
            )
        scale = self.distillation_lora_scale
        if scale is not None and not (self.distillation_lora or self.checkpoint.lora):
            raise InvalidRequest(
                f"Checkpoint {self.checkpoint.name} has no distillation LoRA to scale.",
                "Leave out --distillation-lora-scale, or name a --distillation-lora.",
            )
        if not all(map(isfinite, (scale or 0.0, self.faceid_lora_scale))):
            raise InvalidRequest("The scale of a LoRA is not finite.", "Give a number such as 0.8.")
        if self.base_is_distilled is not None and (self.base is None or self.distillation_lora):
            raise InvalidRequest(
                "Whether a base is distilled is asked of one of your own, without a LoRA for it.",
                "Add --base, or leave out --base-is-distilled and --distillation-lora.",
            )
        adapter = None if self.adapter in ADAPTERS.values() else self.adapter
        models = (self.base, self.base_text, self.vae, self.image_encoder)
        given = (*models, adapter, self.distillation_lora)
        if self.random_weights and (any(given) or self.loras):
            raise InvalidRequest(
                "--random-weights takes no weights.",
                f"Leave out --base and the like; --adapter takes {', '.join(ADAPTERS)}.",
            )
        if self.random_weights and self.checkpoint.name == "mini":
            raise InvalidRequest(
                "--random-weights makes full-size SDXL, not the mini model.",
                "Name hyper, lightning, lcm, turbo or base.",
            )

    @property
    def dtype(self) -> torch.dtype:
        """The torch type that everything computes in which is not quantised."""
        return compute_dtype(self.precision)

    @property
    def operators(self) -> Operators:
        """How attention and group norms are written."""
        return Operators(self.attention_operator, self.group_norm)

    @property
    def quantized(self) -> QuantizedFormat | None:
        """The 8-bit format of the UNet's layers, None for the precisions without one."""
        return next((form for form in QUANTIZED_FORMATS if form == self.precision), None)

    @property
    def stored(self) -> StoredType:
        """The type in which the files hold weights that are not quantised."""
        return self.weight_storage or stored_type(self.precision)

    def latent_size(self, scale_factor: int, levels: int) -> tuple[int, int]:
        """(h, w) of the latents for a VAE that divides by `scale_factor`.

        Raises `InvalidRequest` unless a UNet of so many levels can halve them at every level.
        """
        pixels = (self.height or self.checkpoint.size, self.width or self.checkpoint.size)
        unit = scale_factor * 2 ** (levels - 1)
        if any(side < unit or side % unit for side in pixels):
            raise InvalidRequest(
                f"{pixels[1]}x{pixels[0]} pixels do not fit this checkpoint.",
                f"Height and width must be multiples of {unit}.",
            )
        return pixels[0] // scale_factor, pixels[1] // scale_factor
