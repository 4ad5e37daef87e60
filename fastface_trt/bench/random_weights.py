"""Full-size SDXL with random weights, exported once and kept: a time without a download."""

from pathlib import Path
from typing import Any, cast

from fastface_trt.engines.cache import EngineCache
from fastface_trt.engines.engine import Progress
from fastface_trt.engines.manifest import EXPORT_MANIFEST
from fastface_trt.errors import MissingDependency


def random_export(
    checkpoint: str,
    precision: str,
    steps: int | None,
    cache: EngineCache,
    progress: Progress,
) -> Path:
    """The folder of an export with the shapes of `checkpoint` and random weights.

    It lies in `exports/` of the engine cache and is made at the first call, which needs the extra
    `export` and about 6 GB of memory and of disk in fp16. Raises `MissingDependency`,
    `InvalidRequest`, `UnknownName`, `StorageError`.
    """
    name = f"{checkpoint}-random-{precision}" + (f"-{steps}steps" if steps else "")
    folder = cache.root / "exports" / name
    if (folder / EXPORT_MANIFEST).is_file():
        return folder
    try:
        from fastface_trt.export.checkpoints import find_checkpoint
        from fastface_trt.export.exporter import run_export
        from fastface_trt.export.options import ExportOptions
        from fastface_trt.export.precision import QUANTIZED_FORMATS
        from fastface_trt.export.quantization.calibration import RandomCalibration
        from fastface_trt.export.quiet import quiet_libraries
    except ImportError as error:
        raise MissingDependency(
            f"Random weights have to be exported, which needs {error.name}.",
            "Install it with: pip install 'fastface-trt[export]', or give --export a folder that "
            "fastface-trt export --random-weights wrote elsewhere.",
        ) from None
    quiet_libraries()
    options = ExportOptions(
        find_checkpoint(checkpoint),
        precision=cast(Any, precision),
        steps=steps,
        random_weights=True,
        calibration=RandomCalibration() if precision in QUANTIZED_FORMATS else None,
    )
    run_export(options, folder, progress)
    return folder
