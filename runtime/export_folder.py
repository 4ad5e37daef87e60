"""Which export is meant, and with whose schedule it runs."""

import os
from pathlib import Path

from fastface_trt.checkpoints import find_checkpoint
from fastface_trt.engines.manifest import ExportManifest
from fastface_trt.mini import folders


def find_export(export: str | os.PathLike[str]) -> Path:
    """The folder of an export; the name `mini` means the one that ships with the package."""
    if str(export) == "mini" and not Path("mini").is_dir():
        return folders.EXPORT
    return Path(export)


def with_schedule_of(manifest: ExportManifest, checkpoint: str) -> ExportManifest:
    """`manifest` with the sampler and the steps of another checkpoint of the registry.

    Nothing of this is in an engine, so none is built. Raises `UnknownName`.
    """
    entry = find_checkpoint(checkpoint)
    return manifest.model_copy(
        update={
            "scheduler": dict(entry.scheduler),
            "steps": entry.steps,
            "allowed_steps": entry.allowed_steps,
        }
    )
