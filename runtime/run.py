"""A run: a job on its way, and the UNet call that takes several runs one step further.

What shares a UNet call is decided by callers (`denoise` for one batch, the server's batcher for
strangers who come and go); `Run.sharing` says what can.

Shape legend: R requests of one UNet call, G branches per request, B = R·G rows (requests-major),
C latent channels, h × w latent size.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np

from fastface_trt.engines import contract
from fastface_trt.engines.device import Device, Tensor
from fastface_trt.engines.engine import Engine
from fastface_trt.errors import Cancelled
from fastface_trt.runtime.advance import Guidance
from fastface_trt.runtime.guidance import GuidanceStep
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
