"""A job: a request with everything that the denoising loop needs, prepared before it starts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastface_trt.engines.device import Tensor
from fastface_trt.runtime.guidance import GuidanceStep
from fastface_trt.runtime.noise import standard_noise
from fastface_trt.runtime.request import GenerationRequest
from fastface_trt.runtime.schedule import Schedule

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
            noise
            or (lambda stream, shape: standard_noise(request.seed, request.picture, stream, shape)),
        )
