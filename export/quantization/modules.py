"""From a loaded UNet or VAE to the plan of its quantisation, and the manifest's entry about it."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from fastface_trt.engines.engine import Engine
from fastface_trt.engines.manifest import Quantization
from fastface_trt.export.options import ExportOptions
from fastface_trt.export.oracle import TorchUNet
from fastface_trt.export.precision import Model, QuantizedFormat
from fastface_trt.export.quantization.graph import QuantizationPlan
from fastface_trt.export.quantization.ranges import (
    METHODS,
    LayerChoice,
    choose_layers,
    choose_vae_layers,
    measure_ranges,
    modelopt_version,
)

Latents = NDArray[np.float32]


def quantize_unet(
    unet: Model,
    options: ExportOptions,
    tokens: int,
    calibrate: Callable[[Engine], int],
    *,
    masked: bool = False,
) -> tuple[QuantizationPlan, Quantization]:
    """Measure the ranges of `unet` (all LoRAs fused, `tokens` image tokens, `masked` or not) on
    what `calibrate` calls it with, which returns the number of rows.

    Raises `MissingDependency`, `WeightsError` and whatever `calibrate` raises.
    """
    form = options.quantized
    assert form is not None
    choice = choose_layers(unet, form, attention=options.quantize_attention)
    rows: list[int] = []

    def run(twin: Model) -> None:
        rows.append(calibrate(TorchUNet(twin, tokens, masked=masked)))

    layers, attention = measure_ranges(unet, form, choice, run)
    plan = QuantizationPlan(form, layers, attention)
    return plan, _record(form, METHODS[form], options, max(rows), choice)


def quantize_vae(
    vae: Model, options: ExportOptions, latents: Sequence[Latents]
) -> tuple[QuantizationPlan, Quantization]:
    """Measure the ranges of a VAE's decoder on scheduler latents, float32 [C,h,w] each.

    Raises `MissingDependency` and `WeightsError`.
    """
    form = options.quantize_vae
    assert form is not None
    shift = getattr(vae.config, "shift_factor", None) or 0.0

    def run(twin: Model) -> None:
        for one in latents:
            scaled = torch.from_numpy(one)[None] / vae.config.scaling_factor + shift
            twin.decode(scaled.to(twin.device, twin.dtype))

    choice = choose_vae_layers(vae, form)
    layers, _ = measure_ranges(vae, form, choice, run, smooth=False)
    plan = QuantizationPlan(form, layers, root="vae")
    return plan, _record(form, "max", options, len(latents), choice)


def _record(
    form: QuantizedFormat, method: str, options: ExportOptions, rows: int, choice: LayerChoice
) -> Quantization:
    assert options.calibration is not None
    return Quantization(
        format=form,
        method=method,
        tool=f"nvidia-modelopt {modelopt_version()}",
        calibration=options.calibration.description,
        calibration_rows=rows,
        layers=choice.quantized,
        attention=choice.attention,
        excluded=dict(choice.excluded),
    )
