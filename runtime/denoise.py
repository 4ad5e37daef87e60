"""The denoising loop: requests in, latents out, over a UNet engine that could be any backend.

Shape legend: R requests of one UNet call, G branches per request, B = R·G rows (requests-major),
C latent channels, h × w latent size, T image tokens.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastface_trt.engines import contract
from fastface_trt.engines.engine import Engine
from fastface_trt.errors import Cancelled, EngineFailed
from fastface_trt.runtime.guidance import GuidanceStep, combine
from fastface_trt.runtime.noise import INITIAL_LATENTS, standard_noise, step_stream
from fastface_trt.runtime.request import GenerationRequest
from fastface_trt.runtime.schedule import Schedule

Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Condition:
    """What the UNet is told in one branch: text [77, C], pooled text [P], image tokens [T, C]."""

    text: Array
    pooled: Array
    image_tokens: Array


NoiseSource = Callable[[int, tuple[int, ...]], Array]
"""(stream, shape) to standard noise; see `noise` for what the streams mean."""


@dataclass(frozen=True, slots=True)
class Job:
    """A request with everything that the loop needs, prepared before the first UNet call."""

    request: GenerationRequest
    schedule: Schedule
    guidance: Sequence[GuidanceStep]
    conditions: Mapping[str, Condition]
    time_ids: Array
    latent_shape: tuple[int, int, int]
    noise: NoiseSource

    @classmethod
    def prepare(
        cls,
        request: GenerationRequest,
        schedule: Schedule,
        conditions: Mapping[str, Condition],
        latent_shape: tuple[int, int, int],
        *,
        noise: NoiseSource | None = None,
    ) -> "Job":
        """Resolve plan, size conditioning and noise of a request; latent_shape is (C, h, w)."""
        size = (request.height, request.width)
        return cls(
            request,
            schedule,
            request.guidance_steps(),
            conditions,
            np.array([*size, 0, 0, *size], dtype=np.float32),
            latent_shape,
            noise
            or (lambda stream, shape: standard_noise(request.seed, request.picture, stream, shape)),
        )


@dataclass(frozen=True, slots=True)
class StepTrace:
    """What happened to one request in one step; arrays are [C,h,w], predictions by branch."""

    job: int
    step: int
    steps: int
    model_input: Array
    predictions: Mapping[str, Array]
    guided: Array
    latents: Array


OnStep = Callable[[StepTrace], bool | None]
"""Called after each step of each request; returning False cancels the run."""


@dataclass(slots=True)
class DenoiseReport:
    """UNet calls of a run: seconds and rows of each, in order."""

    seconds: list[float] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)


def denoise(
    unet: Engine,
    jobs: Sequence[Job],
    *,
    on_step: OnStep | None = None,
    max_rows: int | None = None,
    report: DenoiseReport | None = None,
) -> list[Array]:
    """Run every job to the end of its schedule and return its latents, float32 [C,h,w] each.

    Jobs with the same number of branches and the same size share UNet calls of at most `max_rows`
    rows, whatever their settings and even at different timesteps; results equal single runs.
    Raises `Cancelled` when `on_step` returns False and `EngineFailed` when the UNet's output is not
    finite.
    """
    latents = [
        np.float32(job.schedule.initial_scale) * job.noise(INITIAL_LATENTS, job.latent_shape)
        for job in jobs
    ]
    for step in range(max((len(job.schedule) for job in jobs), default=0)):
        active = [index for index, job in enumerate(jobs) if step < len(job.schedule)]
        for group in _group(jobs, active, step, max_rows):
            inputs = [
                np.float32(jobs[i].schedule.steps[step].input_scale) * latents[i] for i in group
            ]
            predictions = _predict(unet, [jobs[i] for i in group], inputs, step, report)
            for i, model_input, by_branch in zip(group, inputs, predictions, strict=True):
                job = jobs[i]
                guided = combine(by_branch, job.guidance[step])
                latents[i] = _advance(job, step, latents[i], guided)
                if on_step is None:
                    continue
                trace = StepTrace(
                    i, step, len(job.schedule), model_input, by_branch, guided, latents[i]
                )
                if on_step(trace) is False:
                    raise Cancelled(f"The run was cancelled after step {step + 1}.")
    return latents


def _advance(job: Job, step: int, latents: Array, guided: Array) -> Array:
    """One scheduler step: x' = a x + b ε + c z."""
    row = job.schedule.steps[step]
    advanced = np.float32(row.latents) * latents + np.float32(row.prediction) * guided
    if row.noise != 0:
        advanced += np.float32(row.noise) * job.noise(step_stream(step), job.latent_shape)
    return advanced


def _shares_statistics(job: Job) -> bool:
    return not (job.request.manipulation.uses_softmask and job.request.scope == "branch")


def _group(
    jobs: Sequence[Job], active: Sequence[int], step: int, max_rows: int | None
) -> list[list[int]]:
    """Split the active jobs into groups that can share one UNet call."""
    groups: dict[Any, list[int]] = defaultdict(list)
    for index in active:
        job = jobs[index]
        branches = len(job.guidance[step].branches)
        groups[branches, job.latent_shape, _shares_statistics(job)].append(index)
    split = []
    for (branches, _, _), members in groups.items():
        size = max(1, max_rows // branches) if max_rows else len(members)
        split += [members[at : at + size] for at in range(0, len(members), size)]
    return split


def _predict(
    unet: Engine,
    jobs: Sequence[Job],
    inputs: Sequence[Array],
    step: int,
    report: DenoiseReport | None,
) -> list[dict[str, Array]]:
    """One UNet call for jobs with equally many branches; predictions [C,h,w] by branch per job."""
    rows = [
        (job, x, branch)
        for job, x in zip(jobs, inputs, strict=True)
        for branch in job.guidance[step].branches
    ]
    conditions = [job.conditions[branch] for job, _, branch in rows]
    # With one parameter row per UNet row, the graph takes its statistics per branch.
    owners = jobs if _shares_statistics(jobs[0]) else [job for job, _, _ in rows]
    started = perf_counter()
    prediction_BChw = unet(
        **{
            contract.SAMPLE: np.stack([x for _, x, _ in rows]),
            contract.TIMESTEP: np.array(
                [job.schedule.steps[step].timestep for job, _, _ in rows], dtype=np.float32
            ),
            contract.TEXT: np.stack([c.text for c in conditions]),
            contract.POOLED_TEXT: np.stack([c.pooled for c in conditions]),
            contract.TIME_IDS: np.stack([job.time_ids for job, _, _ in rows]),
            contract.IMAGE_TOKENS: np.stack([c.image_tokens for c in conditions]),
            contract.IP_ADAPTER_SCALE: np.stack([job.request.ip_scales() for job in owners]),
            contract.MANIPULATION: np.stack(
                [job.request.manipulation.rows(step, len(job.schedule)) for job in owners]
            ),
        }
    )[contract.NOISE_PREDICTION].astype(np.float32, copy=False)
    if report is not None:
        report.seconds.append(perf_counter() - started)
        report.rows.append(len(rows))
    if not np.isfinite(prediction_BChw).all():
        raise EngineFailed(
            f"The UNet returned values that are not finite at step {step + 1}.",
            "An fp16 engine may overflow here: try --precision fp32, or milder parameters.",
        )
    results: list[dict[str, Array]] = [{} for _ in jobs]
    position = 0
    for result, job in zip(results, jobs, strict=True):
        for branch in job.guidance[step].branches:
            result[branch] = prediction_BChw[position]
            position += 1
    return results
