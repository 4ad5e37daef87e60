"""From a loaded UNet to the plan of its quantisation, and the manifest's entry about it."""

from collections.abc import Callable

from fastface_trt.engines.engine import Engine
from fastface_trt.engines.manifest import Quantization
from fastface_trt.export.model import Model
from fastface_trt.export.options import ExportOptions
from fastface_trt.export.oracle import TorchUNet
from fastface_trt.export.quantization.graph import QuantizationPlan
from fastface_trt.export.quantization.layers import choose_layers
from fastface_trt.export.quantization.ranges import METHODS, measure_ranges, modelopt_version


def quantize_unet(
    unet: Model, options: ExportOptions, tokens: int, calibrate: Callable[[Engine], int]
) -> tuple[QuantizationPlan, Quantization]:
    """Measure the ranges of `unet` (all LoRAs fused, `tokens` image tokens) on what `calibrate`
    calls it with, which returns the number of rows.

    Raises `MissingDependency`, `WeightsError` and whatever `calibrate` raises.
    """
    form = options.quantized
    assert form is not None
    assert options.calibration is not None
    choice = choose_layers(unet, form)
    rows: list[int] = []
    ranges = measure_ranges(
        unet, form, choice, lambda twin: rows.append(calibrate(TorchUNet(twin, tokens)))
    )
    record = Quantization(
        format=form,
        method=METHODS[form],
        tool=f"nvidia-modelopt {modelopt_version()}",
        calibration=options.calibration.description,
        calibration_rows=max(rows),
        layers=choice.quantized,
        excluded=dict(choice.excluded),
    )
    return QuantizationPlan(form, ranges), record
