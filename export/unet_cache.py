"""One UNet exported once, with the guidance step that runs beside it on a GPU.

The replay tool's store of ONNX files, keyed by what they came from.
"""

import hashlib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from fastface_trt.engines.engine import Progress
from fastface_trt.engines.files import finished_folder, verify_files
from fastface_trt.engines.manifest import (
    EXPORT_MANIFEST,
    SCHEMA_VERSION,
    ModuleSpec,
    Strict,
    read_manifest,
)
from fastface_trt.errors import FastFaceError
from fastface_trt.export.guidance_step import write_guidance_step
from fastface_trt.export.model import Model
from fastface_trt.export.modules import unet_export
from fastface_trt.export.onnx_writer import write_module


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
    root: Path, identity: str, make: Callable[[], Model], tokens: int, progress: Progress
) -> tuple[UNetExport, Path]:
    """The UNet's export and its folder below `root`, exported unless it is there already.

    `identity` names the weights; `make` loads the UNet with its adapter of `tokens` image tokens. A
    folder that fails its hashes is replaced.
    """
    key = hashlib.sha256(f"{identity}:{_exporter_identity()}".encode()).hexdigest()
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
        export = unet_export(unet, tokens=tokens, latent_size=(side, side), fixed_size=False)
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
