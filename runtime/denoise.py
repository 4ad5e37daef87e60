"""The denoising loop: requests in, latents out, over a UNet engine that could be any backend.

The loop moves tensors of the UNet's device and computes nothing itself: the UNet is one engine,
guidance and the scheduler's step are another (`advance`). On a GPU everything that it needs is
there before the first UNet call but for a few numbers per step, and nothing comes back.

Shape legend: C latent channels, h × w latent size.
"""

from collections import defaultdict
from collections.abc import Hashable, Sequence

import numpy as np

from fastface_trt.engines.device import Device, Tensor
from fastface_trt.engines.engine import Engine
from fastface_trt.errors import EngineFailed
from fastface_trt.runtime.advance import NOT_FINITE_MEND, Guidance, HostGuidance
from fastface_trt.runtime.job import Job
from fastface_trt.runtime.run import DenoiseReport, Run, take_step
from fastface_trt.runtime.timeline import NO_TIMELINE, Timeline
from fastface_trt.runtime.trace import OnStep


def denoise(
    unet: Engine,
    jobs: Sequence[Job],
    *,
    guidance: Guidance | None = None,
    on_step: OnStep | None = None,
    max_rows: int | None = None,
    report: DenoiseReport | None = None,
    timeline: Timeline = NO_TIMELINE,
) -> list[Tensor]:
    """Run every job to the end of its schedule and return its latents, float32 [C,h,w] each.

    `guidance` runs where the UNet does: None is numpy, for a UNet on the host. Jobs with the same
    number of branches and the same size share UNet calls of at most `max_rows` rows, as many as the
    UNet's engine takes, whatever their settings and even at different timesteps; results equal
    single runs.
    Raises `Cancelled` when `on_step` returns False, and on the host `EngineFailed` when the UNet's
    output is not finite; elsewhere `require_finite` finds that in the end.
    """
    device = unet.device
    with timeline.span("noise", device):
        runs = [Run(job, device, index) for index, job in enumerate(jobs)]
    while active := [run for run in runs if not run.finished]:
        for group in split_into_calls(active, max_rows, unet.request_counts):
            take_step(
                unet,
                guidance or HostGuidance(),
                group,
                on_step=on_step,
                report=report,
                timeline=timeline,
            )
    return [run.latents for run in runs]


def require_finite(device: Device, latents: Tensor) -> None:
    """Raise `EngineFailed` unless all final latents [C,h,w] are finite; downloads them.

    For the end of a picture: latents that were not finite once stay so to the last step.
    """
    if not np.isfinite(device.download(latents)).all():
        raise EngineFailed("The UNet returned values that are not finite.", NOT_FINITE_MEND)


def split_into_calls(
    runs: Sequence[Run], max_rows: int | None, counts: Sequence[int] | None
) -> list[list[Run]]:
    """Split unfinished runs into groups that can share one UNet call each, in their order.

    `counts` are the group sizes that the UNet's engine takes, None for any.
    """
    groups: dict[Hashable, list[Run]] = defaultdict(list)
    for run in runs:
        groups[run.sharing].append(run)
    split = []
    for members in groups.values():
        while members:
            size = call_size(members[0], len(members), max_rows, counts)
            split.append(members[:size])
            members = members[size:]
    return split


def call_size(run: Run, waiting: int, max_rows: int | None, counts: Sequence[int] | None) -> int:
    """How many of `waiting` runs that share calls with `run` the next one takes; at least 1."""
    size = min(waiting, max(1, max_rows // len(run.guidance.branches)) if max_rows else waiting)
    # Where every row has its own statistics, a row is a request to the engine: no size helps.
    if counts is None or not run.shares_statistics:
        return size
    return max((count for count in counts if count <= size), default=size)
