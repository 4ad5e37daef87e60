"""Full-size SDXL with random weights, made once and kept: a time without a download.

In float16 the graphs come from the package and the weights are drawn, which takes less than a
minute and neither torch nor much memory. Everything else is exported with torch.
"""

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any, Final, cast

from fastface_trt.bench.weightless import GRAPHS, TEMPLATE, read_template, write_module
from fastface_trt.engines.cache import EngineCache
from fastface_trt.engines.engine import Progress
from fastface_trt.engines.files import describe_file, finished_folder
from fastface_trt.engines.manifest import EXPORT_MANIFEST, ModuleSpec
from fastface_trt.errors import InvalidRequest, MissingDependency
from fastface_trt.export.byte_tokenizer import PAD_TOKENS, write_byte_tokenizer
from fastface_trt.export.checkpoints import MINI, find_checkpoint
from fastface_trt.export_folder import with_schedule_of
from fastface_trt.mini import folders

DRAWN: Final = "fp16"
"""The precision whose graphs ship with the package."""


def random_export(
    checkpoint: str,
    precision: str,
    steps: int | None,
    cache: EngineCache,
    progress: Progress,
) -> Path:
    """The folder of an export with the shapes of `checkpoint` and random weights.

    It lies in `exports/` of the engine cache and is made at the first call: 8.7 GB of disk in fp16,
    which checkpoints of one shape share. Other precisions than fp16 need the extra `export` and
    about 6 GB of memory. Raises `MissingDependency`, `InvalidRequest`, `UnknownName`,
    `StorageError`.
    """
    if find_checkpoint(checkpoint) is MINI:
        raise InvalidRequest(
            "--random-weights makes full-size SDXL, not the mini model.",
            "Name hyper, lightning, lcm, turbo or base.",
        )
    place = cache.root / "exports"
    if precision == DRAWN:
        version = hashlib.sha256((GRAPHS / TEMPLATE).read_bytes()).hexdigest()[:8]
        return _drawn(checkpoint, place, f"random-{precision}-{version}", progress)
    name = f"{checkpoint}-random-{precision}" + (f"-{steps}steps" if steps else "")
    folder = place / name
    if not (folder / EXPORT_MANIFEST).is_file():
        _export(checkpoint, precision, steps, folder, progress)
    return folder


def _drawn(checkpoint: str, place: Path, kind: str, progress: Progress) -> Path:
    """The export of the package's graphs, with the schedule and the size of `checkpoint`."""
    folder = place / f"{checkpoint}-{kind}"
    if (folder / EXPORT_MANIFEST).is_file():
        return folder
    shape = read_template().manifest
    with finished_folder(folder, EXPORT_MANIFEST) as draft:
        others = [other for other in place.glob(f"*-{kind}") if (other / EXPORT_MANIFEST).is_file()]
        for name, spec in shape.modules.items():
            size = sum(file.bytes for file in spec.files)
            progress(f"{name}: drawing {size / 1e6:,.0f} MB of random weights")
            if not any(_linked(spec, other, draft.path) for other in others):
                shutil.rmtree(draft.path / name, ignore_errors=True)
                write_module(spec, draft.path)
        for name, pad_token in PAD_TOKENS.items():
            write_byte_tokenizer(draft.path / name, pad_token)
        shutil.copytree(folders.FACE_MODEL, draft.path / shape.face_model)
        extra = [
            describe_file(draft.path, path)
            for name in (*PAD_TOKENS, shape.face_model)
            for path in sorted((draft.path / name).iterdir())
        ]
        entry = find_checkpoint(checkpoint)
        own = {"checkpoint": checkpoint, "height": entry.size, "width": entry.size}
        manifest = with_schedule_of(shape, checkpoint).model_copy(
            update=own | {"extra_files": tuple(extra)}
        )
        progress("Waiting for the disk")
        draft.finish(manifest)
    return folder


def _linked(spec: ModuleSpec, other: Path, draft: Path) -> bool:
    """Whether the module's files could be had from another export, by further names for them."""
    try:
        for file in spec.files:
            (draft / file.path).parent.mkdir(exist_ok=True)
            os.link(other / file.path, draft / file.path)
            if (draft / file.path).stat().st_size != file.bytes:
                return False
    except OSError:  # gone, or a file system without such names
        return False
    return True


def _export(
    checkpoint: str, precision: str, steps: int | None, folder: Path, progress: Progress
) -> None:
    try:
        from fastface_trt.export.exporter import run_export
        from fastface_trt.export.options import ExportOptions
        from fastface_trt.export.precision import QUANTIZED_FORMATS
        from fastface_trt.export.quantization.calibration import RandomCalibration
        from fastface_trt.export.quiet import quiet_libraries
    except ImportError as error:
        raise MissingDependency(
            f"Random weights in {precision} have to be exported, which needs {error.name}; those "
            f"in {DRAWN} need nothing.",
            f"Leave out --precision for {DRAWN}, or install it with: "
            "pip install 'fastface-trt[export]'.",
        ) from None
    quiet_libraries()
    progress(f"Random weights in {precision} are exported with torch; those in {DRAWN} are drawn")
    options = ExportOptions(
        find_checkpoint(checkpoint),
        precision=cast(Any, precision),
        steps=steps,
        random_weights=True,
        calibration=RandomCalibration() if precision in QUANTIZED_FORMATS else None,
    )
    run_export(options, folder, progress)
