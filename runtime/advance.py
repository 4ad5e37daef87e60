"""From noise predictions to the next latents, on the host or on the device.

`HostGuidance` is numpy and needs no engine; `EngineGuidance` is the module `guidance_step`, so that
nothing leaves a GPU between two UNet calls. Tests hold both to each other and to float64.

Shape legend: R requests of one UNet call, G branches per request, B = R·G rows (requests-major),
C latent channels, h × w latent size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fastface_trt.engines import contract
from fastface_trt.engines.device import HostDevice, Tensor
from fastface_trt.engines.engine import Engine
from fastface_trt.errors import EngineFailed
from fastface_trt.runtime.guidance import combine
from fastface_trt.runtime.job import Job

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
