"""The denoising loop: requests in, latents out, over a UNet engine that could be any backend.

The loop moves tensors of the UNet's device and computes nothing itself: the UNet is one engine,
guidance and the scheduler's step are another (`advance`). On a GPU everything that it needs is
there before the first UNet call but for a few numbers per step, and nothing comes back.

Shape legend: R requests of one UNet call, G branches per request, B = R·G rows (requests-major),
C latent channels, h × w latent size, T image tokens.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np

from fastface_trt.engines import contract
from fastface_trt.engines.device import Device, Tensor
from fastface_trt.engines.engine import Engine
from fastface_trt.errors import Cancelled, EngineFailed
from fastface_trt.runtime.advance import NOT_FINITE_MEND, Guidance, HostGuidance
from fastface_trt.runtime.job import Job
from fastface_trt.runtime.noise import INITIAL_LATENTS, step_stream
from fastface_trt.runtime.timeline import NO_TIMELINE, Timeline
from fastface_trt.runtime.trace import OnStep, StepTrace


@dataclass(slots=True)
class DenoiseReport:
    """UNet calls of a run, in order: rows of each, and seconds on the host.

    On a GPU a call returns when its work is queued, so only the sum over a picture means anything.
    """

    seconds: list[float] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)


class _Run:
    """A job on its way: its latents x, the next UNet input k x, and its fresh noise per step."""

    __slots__ = ("job", "latents", "noise", "sample")

    def __init__(self, job: Job, device: Device) -> None:
        steps, shape = job.schedule.steps, job.latent_shape
        latents = np.float32(job.schedule.initial_scale) * job.noise(INITIAL_LATENTS, shape)
        self.job = job
        self.latents: Tensor = device.upload(latents)
        self.sample: Tensor = device.upload(np.float32(steps[0].input_scale) * latents)
        self.noise: list[Tensor | None] = [
            device.upload(job.noise(step_stream(index), shape)) if row.noise != 0 else None
            for index, row in enumerate(steps)
        ]


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
    advance = guidance or HostGuidance()
    with timeline.span("noise", device):
        runs = [_Run(job, device) for job in jobs]
    for step in range(max((len(job.schedule) for job in jobs), default=0)):
        active = [index for index, job in enumerate(jobs) if step < len(job.schedule)]
        for group in _group(jobs, active, step, max_rows, unet.request_counts):
            members = [runs[index] for index in group]
            branches = len(members[0].job.guidance[step].branches)
            rows = branches * len(members)
            with timeline.span("unet", device, step=step, branches=branches, rows=rows):
                prediction_BChw = _predict(unet, members, step, report)
            with timeline.span("guidance", device, step=step):
                advanced = advance(
                    [run.job for run in members],
                    step,
                    prediction_BChw,
                    [run.latents for run in members],
                    [run.noise[step] for run in members],
                )
            if on_step is not None:
                # The next UNet call overwrites its output, and a trace may be kept.
                predictions = iter(list(device.copy(prediction_BChw)))
            for at, index in enumerate(group):
                run, model_input = runs[index], runs[index].sample
                run.latents, run.sample = advanced.latents[at], advanced.samples[at]
                if on_step is None:
                    continue
                trace = StepTrace(
                    index,
                    step,
                    len(run.job.schedule),
                    device,
                    model_input=model_input,
                    predictions={b: next(predictions) for b in run.job.guidance[step].branches},
                    guided=advanced.guided[at],
                    latents=run.latents,
                )
                if on_step(trace) is False:
                    raise Cancelled(f"The run was cancelled after step {step + 1}.")
    return [run.latents for run in runs]


def require_finite(device: Device, latents: Tensor) -> None:
    """Raise `EngineFailed` unless all final latents [C,h,w] are finite; downloads them.

    For the end of a picture: latents that were not finite once stay so to the last step.
    """
    if not np.isfinite(device.download(latents)).all():
        raise EngineFailed("The UNet returned values that are not finite.", NOT_FINITE_MEND)


def _shares_statistics(job: Job) -> bool:
    return not (job.request.manipulation.uses_softmask and job.request.scope == "branch")


def _group(
    jobs: Sequence[Job],
    active: Sequence[int],
    step: int,
    max_rows: int | None,
    counts: Sequence[int] | None,
) -> list[list[int]]:
    """Split the active jobs into groups that can share one UNet call.

    `counts` are the group sizes that the UNet's engine takes, None for any.
    """
    groups: dict[Any, list[int]] = defaultdict(list)
    for index in active:
        job = jobs[index]
        branches = len(job.guidance[step].branches)
        groups[branches, job.latent_shape, _shares_statistics(job)].append(index)
    split = []
    for (branches, _, shares), members in groups.items():
        limit = max(1, max_rows // branches) if max_rows else len(members)
        # Where every row has its own statistics, a row is a request to the engine: no size helps.
        sizes = counts if shares else None
        while members:
            size = min(limit, len(members))
            if sizes is not None:
                size = max((count for count in sizes if count <= size), default=size)
            split.append(members[:size])
            members = members[size:]
    return split


def _predict(unet: Engine, runs: Sequence[_Run], step: int, report: DenoiseReport | None) -> Tensor:
    """One UNet call for jobs with equally many branches; the noise prediction [B,C,h,w].

    What is the same for a whole picture is stacked on the device; the numbers of this step are
    numpy arrays of a few bytes per row, which the engine uploads.
    """
    stack = unet.device.stack
    rows = [(run, branch) for run in runs for branch in run.job.guidance[step].branches]
    jobs = [run.job for run, _ in rows]
    conditions = [run.job.conditions[branch] for run, branch in rows]
    # With one parameter row per UNet row, the graph takes its statistics per branch.
    owners = [run.job for run in runs] if _shares_statistics(runs[0].job) else jobs
    started = perf_counter()
    outputs = unet(
        **{
            contract.SAMPLE: stack([run.sample for run, _ in rows]),
            contract.TIMESTEP: np.array(
                [job.schedule.steps[step].timestep for job in jobs], dtype=np.float32
            ),
            contract.TEXT: stack([c.text for c in conditions]),
            contract.POOLED_TEXT: stack([c.pooled for c in conditions]),
            contract.TIME_IDS: np.stack([job.time_ids for job in jobs]),
            contract.IMAGE_TOKENS: stack([c.image_tokens for c in conditions]),
            contract.IP_ADAPTER_SCALE: np.stack([job.request.ip_scales() for job in owners]),
            contract.MANIPULATION: np.stack(
                [job.request.manipulation.rows(step, len(job.schedule)) for job in owners]
            ),
        }
    )
    if report is not None:
        report.seconds.append(perf_counter() - started)
        report.rows.append(len(rows))
    return outputs[contract.NOISE_PREDICTION]
