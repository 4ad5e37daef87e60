"""From settings to a warm batcher: what every kind of worker starts with."""

import psutil

from fastface_trt.errors import OutOfMemory
from fastface_trt.runtime.export_folder import Export
from fastface_trt.runtime.pipeline import FastFace
from fastface_trt.runtime.preview import LatentPreview
from fastface_trt.serving.batching.batcher import Batcher
from fastface_trt.serving.batching.loop import OnCall, OnDead
from fastface_trt.serving.settings import WorkerSettings


def open_batcher(
    settings: WorkerSettings,
    *,
    build: bool = True,
    on_call: OnCall | None = None,
    on_dead: OnDead | None = None,
) -> Batcher:
    """Open the engines that the settings name, after a look at the free memory, and warm them up.

    With `build=False` a missing engine is an error instead of minutes of building; see `Batcher`
    for the rest. Raises what
    `FastFace.load` raises, `OutOfMemory`, and `EngineFailed` when the warm-up's pictures are not
    finite.
    """
    check_memory(settings)
    fastface = FastFace.load(
        settings.export,
        backend=settings.backend,
        cache=settings.cache,
        threads=settings.threads,
        engine_options=settings.engine_options,
        build=build,
        licence_acknowledged=settings.licence_acknowledged,
        schedule_of=settings.schedule_of,
    )
    try:
        preview = LatentPreview.fit(fastface.stages, fastface.manifest)
    except BaseException:
        fastface.close()
        raise
    batcher = Batcher(
        fastface,
        settings,
        preview=preview.rgb,
        owns_fastface=True,
        on_call=on_call,
        on_dead=on_dead,
    )
    batcher.start()
    return batcher


def check_memory(settings: WorkerSettings) -> None:
    """Raise `OutOfMemory` where not even the weights fit into the memory that is free.

    Only for engines on the host: those on a GPU look at its memory themselves when they are opened.
    """
    if settings.backend != "onnxruntime":
        return
    manifest = Export.open(settings.export).manifest
    needed = sum(file.bytes for module in manifest.modules.values() for file in module.files)
    free = psutil.virtual_memory().available
    if needed > free:
        raise OutOfMemory(
            f"The weights of {settings.export} take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB "
            "of memory are free.",
            "Free some memory, start fewer workers, or export with --weight-storage fp16.",
        )
