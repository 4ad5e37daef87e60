"""A job: a request with everything that the denoising loop needs, prepared before it starts.

What a step callback is shown.

From noise predictions to the next latents, on the host or on the device.

`HostGuidance` is numpy and needs no engine; `EngineGuidance` is the module `guidance_step`, so that
nothing leaves a GPU between two UNet calls. Tests hold both to each other and to float64.

Shape legend: R requests of one UNet call, G branches per request, B = R·G rows (requests-major),
C latent channels, h × w latent size.

A run: a job on its way, and the UNet call that takes several runs one step further.

What shares a UNet call is decided by callers (`denoise` for one batch, the server's batcher for
strangers who come and go); `Run.sharing` says what can.

Shape legend: R requests of one UNet call, G branches per request, B = R·G rows (requests-major),
C latent channels, h × w latent size.

The denoising loop: requests in, latents out, over a UNet engine that could be any backend.

The loop moves tensors of the UNet's device and computes nothing itself: the UNet is one engine,
guidance and the scheduler's step are another (`advance`). On a GPU everything that it needs is
there before the first UNet call but for a few numbers per step, and nothing comes back.

Shape legend: C latent channels, h × w latent size.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fastface_trt.engines import contract
from fastface_trt.engines.device import Device, HostDevice, Tensor
from fastface_trt.engines.engine import Engine
from fastface_trt.errors import Cancelled, EngineFailed
from fastface_trt.runtime.guidance import GuidanceStep, combine
from fastface_trt.runtime.noise import INITIAL_LATENTS, standard_noise, step_stream
from fastface_trt.runtime.request import GenerationRequest
from fastface_trt.runtime.schedule import Schedule
from fastface_trt.runtime.timeline import NO_TIMELINE, Timeline

Latents = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Condition:
    """What the UNet is told in one branch: text [77, C], pooled text [P], image tokens [T, C].

    Tensors of the UNet's device.
    """

    text: Tensor
    pooled: Tensor
    image_tokens: Tensor


NoiseSource = Callable[[int, tuple[int, ...]], Latents]
"""(stream, shape) to standard noise; see `noise` for what the streams mean."""


@dataclass(frozen=True, slots=True)
class Job:
    """A request with its schedule, its guidance per step, and what the UNet is told per branch."""

    request: GenerationRequest
    schedule: Schedule
    guidance: Sequence[GuidanceStep]
    conditions: Mapping[str, Condition]
    time_ids: Latents
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
            noise or (lambda *draw: standard_noise(request.seed, request.image_index, *draw)),
        )


Array: TypeAlias = NDArray[np.float32]


class StepTrace:
    """What happened to one request in one step; arrays are float32 [C,h,w].

    `job` is the request's index, `step` counts from 0 to `steps` − 1. The arrays cross from a GPU
    when they are read, each time: a callback that reads none of them costs no copy to the host.
    """

    __slots__ = (
        "_device",
        "_guided",
        "_latents",
        "_model_input",
        "_predictions",
        "job",
        "step",
        "steps",
    )

    def __init__(
        self,
        job: int,
        step: int,
        steps: int,
        device: Device,
        *,
        model_input: Tensor,
        predictions: Mapping[str, Tensor],
        guided: Tensor,
        latents: Tensor,
    ) -> None:
        self.job, self.step, self.steps = job, step, steps
        self._device = device
        self._model_input, self._predictions = model_input, predictions
        self._guided, self._latents = guided, latents

    @property
    def model_input(self) -> Array:
        """What the UNet was given, k x."""
        return self._read(self._model_input)

    @property
    def predictions(self) -> dict[str, Array]:
        """The UNet's noise prediction by branch."""
        return {branch: self._read(tensor) for branch, tensor in self._predictions.items()}

    @property
    def guided(self) -> Array:
        """The guided prediction ε of Eq. 5."""
        return self._read(self._guided)

    @property
    def latents(self) -> Array:
        """The latents after the step, x'."""
        return self._read(self._latents)

    def _read(self, tensor: Tensor) -> NDArray[Any]:
        return self._device.download(tensor).astype(np.float32, copy=False)


OnStep = Callable[[StepTrace], bool | None]
"""Called after each step of each request; returning False cancels the run."""


NOT_FINITE_MEND = "An fp16 engine may overflow here: try --precision fp32, or milder parameters."


@dataclass(frozen=True, slots=True)
class Advanced:
    """What one step made of R requests: x', the guided ε, and k x' for the next UNet call.

    Each holds R float32 tensors [C,h,w] that the caller owns.
    """

    latents: Sequence[Tensor]
    guided: Sequence[Tensor]
    samples: Sequence[Tensor]


class Guidance(Protocol):
    """Guidance (Eq. 3 to 5) and the scheduler's step x' = a x + b ε + c z, then the scaling by k.

    `steps` and `noise` hold for each job the step that it is at, counted from 0, and z, None where
    its scheduler adds none at this step.
    """

    def __call__(
        self,
        jobs: Sequence[Job],
        steps: Sequence[int],
        prediction_BChw: Tensor,
        latents: Sequence[Tensor],
        noise: Sequence[Tensor | None],
    ) -> Advanced:
        """Advance jobs with equally many branches by one step."""
        ...


class HostGuidance:
    """Guidance in numpy; raises `EngineFailed` when a prediction is not finite."""

    def __call__(
        self,
        jobs: Sequence[Job],
        steps: Sequence[int],
        prediction_BChw: Tensor,
        latents: Sequence[Tensor],
        noise: Sequence[Tensor | None],
    ) -> Advanced:
        """Advance jobs with equally many branches by one step."""
        host = HostDevice()
        prediction_BChw = host.download(prediction_BChw).astype(np.float32, copy=False)
        if not np.isfinite(prediction_BChw).all():
            raise EngineFailed(
                f"The UNet returned values that are not finite at step {min(steps) + 1}.",
                NOT_FINITE_MEND,
            )
        advanced, all_guided, samples = [], [], []
        rows = iter(prediction_BChw)
        for job, step, x, z in zip(jobs, steps, latents, noise, strict=True):
            plan, row = job.guidance[step], job.schedule.steps[step]
            guided = combine({branch: next(rows) for branch in plan.branches}, plan)
            following = np.float32(row.latents) * host.download(x)
            following = following + np.float32(row.prediction) * guided
            if z is not None:
                following += np.float32(row.noise) * host.download(z)
            advanced.append(following)
            all_guided.append(guided)
            samples.append(np.float32(_next_input_scale(job, step)) * following)
        return Advanced(advanced, all_guided, samples)


class EngineGuidance:
    """Guidance by an engine of the module `guidance_step`, on the engine's device.

    It looks at no value, so it cannot tell whether a prediction is finite: check the last latents.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __call__(
        self,
        jobs: Sequence[Job],
        steps: Sequence[int],
        prediction_BChw: Tensor,
        latents: Sequence[Tensor],
        noise: Sequence[Tensor | None],
    ) -> Advanced:
        """Advance jobs with equally many branches by one step."""
        device = self._engine.device
        at = list(zip(jobs, steps, strict=True))
        plans = [job.guidance[step] for job, step in at]
        rows = [job.schedule.steps[step] for job, step in at]
        fresh = [
            device.zeros(job.latent_shape, "float32") if z is None else z
            for job, z in zip(jobs, noise, strict=True)
        ]
        outputs = self._engine(
            **{
                contract.NOISE_PREDICTION: prediction_BChw,
                contract.LATENTS: device.stack(latents),
                contract.NOISE: device.stack(fresh),
                contract.COEFFICIENTS: _scalars(
                    [[plan.coefficients[branch] for branch in plan.branches] for plan in plans]
                ),
                contract.SPREAD: _scalars(
                    [
                        [
                            1 / len(plan.spread_branches) if branch in plan.spread_branches else 0.0
                            for branch in plan.branches
                        ]
                        for plan in plans
                    ]
                ),
                contract.RESCALE: _scalars([plan.rescale or 0.0 for plan in plans]),
                contract.STEP: _scalars([[r.latents, r.prediction, r.noise] for r in rows]),
                contract.INPUT_SCALE: _scalars([_next_input_scale(job, step) for job, step in at]),
            }
        )
        # Copies, because the engine's next call overwrites what it returned.
        return Advanced(
            *(
                list(device.copy(outputs[name]))
                for name in (contract.NEXT_LATENTS, contract.GUIDED, contract.SAMPLE)
            )
        )


def _next_input_scale(job: Job, step: int) -> float:
    """k of the step that follows; 1 after the last, where nothing reads it."""
    following = job.schedule.steps[step + 1 : step + 2]
    return following[0].input_scale if following else 1.0


def _scalars(values: Sequence[object]) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.array(values, dtype=np.float32)


@dataclass(slots=True)
class DenoiseReport:
    """UNet calls of a run, in order: rows of each, and seconds on the host.

    On a GPU a call returns when its work is queued, so only the sum over a picture means anything.
    """

    seconds: list[float] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)


class Run:
    """A job on its way: its latents x, the next UNet input k x, and its fresh noise per step.

    `step` counts the steps that are done. `index` is what a `StepTrace` calls the job.
    """

    __slots__ = ("index", "job", "latents", "noise", "sample", "step")

    def __init__(self, job: Job, device: Device, index: int = 0) -> None:
        steps, shape = job.schedule.steps, job.latent_shape
        latents = np.float32(job.schedule.initial_scale) * job.noise(INITIAL_LATENTS, shape)
        self.job = job
        self.index = index
        self.step = 0
        self.latents: Tensor = device.upload(latents)
        self.sample: Tensor = device.upload(np.float32(steps[0].input_scale) * latents)
        self.noise: list[Tensor | None] = [
            device.upload(job.noise(step_stream(step), shape)) if row.noise != 0 else None
            for step, row in enumerate(steps)
        ]

    @property
    def finished(self) -> bool:
        """Whether every step is done; the rest must not be asked for then."""
        return self.step == len(self.job.schedule)

    @property
    def guidance(self) -> GuidanceStep:
        """Guidance of the next step; its branches are the rows that the run needs."""
        return self.job.guidance[self.step]

    @property
    def shares_statistics(self) -> bool:
        """Whether the graph may take one parameter row for all branches of this run."""
        request = self.job.request
        return not (request.manipulation.uses_softmask and request.scope == "branch")

    @property
    def sharing(self) -> Hashable:
        """Runs that agree in this may share their next UNet call, at whatever step each is."""
        return len(self.guidance.branches), self.job.latent_shape, self.shares_statistics


def take_step(
    unet: Engine,
    guidance: Guidance,
    runs: Sequence[Run],
    *,
    on_step: OnStep | None = None,
    report: DenoiseReport | None = None,
    timeline: Timeline = NO_TIMELINE,
) -> None:
    """Take runs that agree in `sharing` one step further, in one UNet call.

    Raises what the UNet and `guidance` raise, the runs being as they were before, and `Cancelled`
    when `on_step` returns False, after which they must not go on.
    """
    device = unet.device
    branches = len(runs[0].guidance.branches)
    where = {"step": min(run.step for run in runs)}
    with timeline.span("unet", device, **where, branches=branches, rows=branches * len(runs)):
        prediction_BChw = _predict(unet, runs, report)
    with timeline.span("guidance", device, **where):
        advanced = guidance(
            [run.job for run in runs],
            [run.step for run in runs],
            prediction_BChw,
            [run.latents for run in runs],
            [run.noise[run.step] for run in runs],
        )
    if on_step is not None:
        # The next UNet call overwrites its output, and a trace may be kept.
        predictions = iter(list(device.copy(prediction_BChw)))
    for at, run in enumerate(runs):
        step, model_input, plan = run.step, run.sample, run.guidance
        run.latents, run.sample = advanced.latents[at], advanced.samples[at]
        run.step += 1
        if on_step is None:
            continue
        trace = StepTrace(
            run.index,
            step,
            len(run.job.schedule),
            device,
            model_input=model_input,
            predictions={branch: next(predictions) for branch in plan.branches},
            guided=advanced.guided[at],
            latents=run.latents,
        )
        if on_step(trace) is False:
            raise Cancelled(f"The run was cancelled after step {step + 1}.")


def _predict(unet: Engine, runs: Sequence[Run], report: DenoiseReport | None) -> Tensor:
    """The noise prediction [B,C,h,w] of the runs' next step.

    What is the same for a whole picture is stacked on the device; the numbers of a step are numpy
    arrays of a few bytes per row, which the engine uploads.
    """
    stack = unet.device.stack
    rows = [(run, branch) for run in runs for branch in run.guidance.branches]
    conditions = [run.job.conditions[branch] for run, branch in rows]
    # With one parameter row per UNet row, the graph takes its statistics per branch.
    owners = runs if runs[0].shares_statistics else [run for run, _ in rows]
    started = perf_counter()
    outputs = unet(
        **{
            contract.SAMPLE: stack([run.sample for run, _ in rows]),
            contract.TIMESTEP: np.array(
                [run.job.schedule.steps[run.step].timestep for run, _ in rows], dtype=np.float32
            ),
            contract.TEXT: stack([c.text for c in conditions]),
            contract.POOLED_TEXT: stack([c.pooled for c in conditions]),
            contract.TIME_IDS: np.stack([run.job.time_ids for run, _ in rows]),
            contract.IMAGE_TOKENS: stack([c.image_tokens for c in conditions]),
            contract.IP_ADAPTER_SCALE: np.stack([run.job.request.ip_scales() for run in owners]),
            contract.MANIPULATION: np.stack(
                [
                    run.job.request.manipulation.rows(run.step, len(run.job.schedule))
                    for run in owners
                ]
            ),
        }
    )
    if report is not None:
        report.seconds.append(perf_counter() - started)
        report.rows.append(len(rows))
    return outputs[contract.NOISE_PREDICTION]


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
