"""The PyTorch oracle: the UNet in eager PyTorch behind the same call as an engine.

It runs the eager arithmetic of `attention` with torch's own quantile, so it is a reference for
engines of any backend, in float32 or float64. For engines to compare, `export_unet_once` keeps one
ONNX file per UNet, with the guidance step that runs beside it on a GPU, keyed by what it came from.
"""

import hashlib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from fastface_trt.engines.contract import NOISE_PREDICTION
from fastface_trt.engines.device import HostDevice, Tensor
from fastface_trt.engines.engine import Closing, Progress, host_arrays
from fastface_trt.engines.files import finished_folder, verify_files
from fastface_trt.engines.manifest import (
    EXPORT_MANIFEST,
    SCHEMA_VERSION,
    DType,
    ModuleSpec,
    Strict,
    TensorSpec,
    read_manifest,
)
from fastface_trt.errors import FastFaceError
from fastface_trt.export.guidance_step import write_guidance_step
from fastface_trt.export.modules import UNetModule, unet_export
from fastface_trt.export.onnx_writer import write_module
from fastface_trt.export.precision import Model

_NUMPY_NAMES: dict[torch.dtype, DType] = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.int64: "int64",
}


class TorchUNet(Closing):
    """A diffusers UNet with its adapter attached, called with numpy arrays like an engine."""

    def __init__(self, unet: Model, tokens: int = 4, *, masked: bool = False) -> None:
        export = unet_export(
            unet, tokens=tokens, latent_size=(16, 16), fixed_size=False, masked=masked
        )
        self._module = UNetModule(unet).eval()
        self._torch_device = unet.device
        self.device = HostDevice()
        self.request_counts = None

        def spec(name: str, dtype: torch.dtype) -> TensorSpec:
            return TensorSpec(name=name, dtype=_NUMPY_NAMES[dtype], shape=export.shapes[name])

        inputs = tuple(spec(name, tensor.dtype) for name, tensor in export.inputs.items())
        outputs = (spec(NOISE_PREDICTION, torch.float32),)
        self.spec = ModuleSpec.model_construct(
            name="unet", inputs=inputs, outputs=outputs, files=()
        )

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        """The noise prediction; inputs as in `fastface_trt.engines.contract`."""
        with torch.no_grad():
            tensors = {
                name: torch.from_numpy(np.ascontiguousarray(array)).to(self._torch_device)
                for name, array in host_arrays(self.spec, inputs).items()
            }
            return {NOISE_PREDICTION: self._module(**tensors).cpu().numpy()}

    def close(self) -> None:
        """Nothing to free beyond the module itself."""


class UNetExport(Strict):
    """Manifest of a folder that holds only a UNet and its guidance step."""

    schema_version: Literal[1] = SCHEMA_VERSION
    module: ModuleSpec
    guidance_step: ModuleSpec


def _exporter_identity() -> str:
    """Changes with this package's export code and with the exporter's versions."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    for package in ("torch", "diffusers", "onnxscript"):
        digest.update(version(package).encode())
    return digest.hexdigest()


def export_unet_once(
    root: Path,
    identity: str,
    make: Callable[[], Model],
    tokens: int,
    progress: Progress,
    *,
    masked: bool = False,
) -> tuple[UNetExport, Path]:
    """The UNet's export and its folder below `root`, exported unless it is there already.

    `identity` names the weights; `make` loads the UNet with its adapter of `tokens` image tokens,
    at most so many with `masked`. A folder that fails its hashes is replaced.
    """
    form = f"{identity}:{tokens if masked else ''}:{_exporter_identity()}"
    key = hashlib.sha256(form.encode()).hexdigest()
    folder = root / key
    try:
        known = read_manifest(folder / EXPORT_MANIFEST, UNetExport)
        verify_files(folder, known.module.files + known.guidance_step.files)
        return known, folder
    except FastFaceError:
        pass
    progress("Exporting the UNet to ONNX")
    with finished_folder(folder, EXPORT_MANIFEST) as draft:
        unet = make()
        side = 4 * 2 ** (len(unet.config.block_out_channels) - 1)
        export = unet_export(
            unet, tokens=tokens, latent_size=(side, side), fixed_size=False, masked=masked
        )
        module = write_module(export, draft.path)
        guidance_step = write_guidance_step(
            draft.path,
            channels=unet.config.in_channels,
            latent_size=(side, side),
            fixed_size=False,
        )
        written = UNetExport(module=module, guidance_step=guidance_step)
        draft.finish(written)
    return written, folder
