"""Which worker sees which device: one per GPU, or one for all cores of a machine without."""

import os
from collections.abc import Mapping

from fastface_trt.engines.hardware import cuda_device_count
from fastface_trt.engines.ort.threads import usable_cores
from fastface_trt.errors import BackendUnavailable
from fastface_trt.serving.settings import WorkerSettings

VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"


def place_workers(
    settings: WorkerSettings, count: int | None = None, gpus: int | None = None
) -> tuple[WorkerSettings, list[Mapping[str, str]]]:
    """Settings for each worker and what is added to its environment, for `WorkerPool`.

    `count` is one per GPU by default, or one on the host. More workers than GPUs take turns on
    them; on the host they share out the cores, unless `settings.threads` says otherwise. `gpus` is
    how many this process sees, None to look. Raises `BackendUnavailable` for a backend that needs a
    GPU where there is none.
    """
    if settings.backend == "onnxruntime":
        count = count or 1
        threads = settings.threads
        if threads is None and count > 1:
            threads = max(1, usable_cores() // count)
        return settings.model_copy(update={"threads": threads}), [{} for _ in range(count)]
    if gpus is None:
        gpus = cuda_device_count()
    if gpus == 0:
        raise BackendUnavailable(
            f"The backend {settings.backend} needs a GPU, and this machine shows none.",
            "Look at `fastface-trt doctor --gpu`, or use --backend onnxruntime.",
        )
    named = os.environ.get(VISIBLE_DEVICES)
    devices = named.split(",") if named else [str(index) for index in range(gpus)]
    chosen = [devices[index % gpus] for index in range(count or gpus)]
    return settings, [{VISIBLE_DEVICES: device} for device in chosen]
