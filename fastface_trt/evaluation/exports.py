"""An export per scale of the adapter's LoRA, made when an experiment asks for it.

The LoRA is fused before export and only the UNet holds it, so everything else is taken from the
export at hand. What was made is kept by content and serves every later run.
"""

import hashlib
import os
import shutil
from pathlib import Path

from fastface_trt.engines.cache import EngineCache
from fastface_trt.engines.engine import Progress
from fastface_trt.engines.files import finished_folder, verify_files
from fastface_trt.engines.manifest import (
    EXPORT_MANIFEST,
    ExportManifest,
    read_manifest,
)
from fastface_trt.errors import FastFaceError, InvalidRequest, MissingDependency

_TRAINED_SCALE = 1.0


def export_with_lora_scale(
    folder: Path, scale: float, cache: Path | None, progress: Progress
) -> Path:
    """The folder of the same export with the LoRA at `scale`: itself where that is its own.

    Others lie in `exports` beside the engine cache. Raises `MissingDependency` without the export
    extra, `InvalidRequest` for an export that was not made of a registry checkpoint's weights,
    and what an export raises.
    """
    manifest = read_manifest(folder / EXPORT_MANIFEST, ExportManifest)
    own = next((lora.scale for lora in manifest.loras if lora.role == "faceid"), _TRAINED_SCALE)
    if own == scale:
        return folder
    digest = hashlib.sha256(f"{manifest.model_dump_json()}:{scale!r}".encode()).hexdigest()
    target = EngineCache(cache).root.parent / "exports" / digest
    try:
        verify_files(target, read_manifest(target / EXPORT_MANIFEST, ExportManifest).files())
        return target
    except FastFaceError:
        _export(folder, manifest, scale, target, progress)
        return target


def _export(
    folder: Path, manifest: ExportManifest, scale: float, target: Path, progress: Progress
) -> None:
    try:
        from fastface_trt.export.checkpoints import find_checkpoint
        from fastface_trt.export.modules import unet_export
        from fastface_trt.export.onnx_writer import write_module
        from fastface_trt.export.options import ExportOptions
        from fastface_trt.export.probe import write_probe
        from fastface_trt.export.quiet import quiet_libraries
        from fastface_trt.export.weights import CheckpointWeights
    except ImportError as error:
        raise MissingDependency(
            f"Another LoRA scale is another export, which needs {error.name}.",
            "Install it with: pip install 'fastface-trt[export]'.",
        ) from None
    if manifest.random_weights or manifest.quantization is not None:
        raise InvalidRequest(
            f"{folder} cannot be exported with another LoRA scale: its weights are "
            f"{'random' if manifest.random_weights else 'quantised'}.",
            "Give exports of your own with the axis export.",
        )
    quiet_libraries()
    checkpoint = find_checkpoint(manifest.checkpoint)
    options = ExportOptions(
        checkpoint,
        precision=manifest.precision,
        weight_storage=manifest.weight_storage,
        steps=manifest.steps,
        height=manifest.height,
        width=manifest.width,
        fixed_size=manifest.fixed_size,
        faceid_lora_scale=scale,
    )
    progress(f"exporting the UNet with its LoRA at {scale:g}")
    weights = CheckpointWeights(options)
    unet = weights.unet()
    made_of = {(source.role, source.revision, source.sha256) for source in weights.sources}
    known = {(source.role, source.revision, source.sha256) for source in manifest.sources}
    if not made_of <= known:
        raise InvalidRequest(
            f"{folder} was exported from other weights than those of {manifest.checkpoint}.",
            "Export it with --lora-scale, and give the folders with the axis export.",
        )
    levels = len(unet.config.block_out_channels)
    export = unet_export(
        unet,
        tokens=manifest.image_token_count,
        latent_size=options.latent_size(manifest.vae_scale_factor, levels),
        fixed_size=manifest.fixed_size,
    )
    compress = manifest.precision == "fp32" and manifest.weight_storage == "fp16"
    with finished_folder(target, EXPORT_MANIFEST) as draft:
        for entry in manifest.files():
            if not entry.path.startswith("unet/"):
                _link(folder / entry.path, draft.path / entry.path)
        spec = write_module(export, draft.path, fp16_storage=compress)
        probe = write_probe(export, draft.path, "fp16" if compress else manifest.precision)
        modules = manifest.modules | {"unet": spec.model_copy(update={"probe": probe})}
        draft.finish(
            manifest.model_copy(update={"modules": modules, "loras": tuple(weights.loras)})
        )


def _link(source: Path, target: Path) -> None:
    """The same bytes at another place, without a copy where the disk allows it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
