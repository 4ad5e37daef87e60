"""The FastFace loop as the authors run it: every branch of a request in one batch, on every step.

Guidance is Eq. 3 to 5 in torch, the scheduler is diffusers' own class. What predicts the noise is
handed in, so that PyTorch and plain ONNX Runtime run the same loop.

Shape legend: B branches (u, i, ti; only ti without guidance), C latent channels, h × w latent size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastface_trt.runtime.guidance import resolve_schedule
from fastface_trt.runtime.request import GenerationRequest


@dataclass(frozen=True)
class Conditions:
    """What the UNet is told per branch: text [B,77,C], pooled [B,P], time_ids [B,6], image tokens
    [B,T,C].
    """

    text: Tensor
    pooled: Tensor
    time_ids: Tensor
    image_tokens: Tensor


Predict = Callable[[Tensor, Tensor, Conditions, Tensor], Tensor]
"""(sample [B,C,h,w], timestep, conditions, numbers [parts, columns]) to noise [B,C,h,w]."""


def guided(prediction_BChw: Tensor, alpha: float, beta: float, rescale: float | None) -> Tensor:
    """Eq. 3 to 5, [1,C,h,w]."""
    if len(prediction_BChw) == 1:
        return prediction_BChw
    u, i, ti = prediction_BChw.chunk(3)
    noise = u + alpha * (i - u) + beta * (ti - i)
    if rescale is None:
        return noise
    spread = (i.std() + ti.std()) / 2
    return noise * (rescale * spread / noise.std() + 1 - rescale)


def denoise(
    predict: Predict,
    request: GenerationRequest,
    conditions: Conditions,
    latents: Tensor,
    scheduler: Any,
) -> Tensor:
    """From noise to the final latents, both [1,C,h,w] in float32 on the device that everything runs
    on; `scheduler` has no timesteps set yet.
    """
    scheduler.set_timesteps(request.steps, device=latents.device)
    alphas = resolve_schedule("alpha", request.alpha, request.steps)
    betas = resolve_schedule("beta", request.beta, request.steps)
    branches = len(conditions.text)
    latents = latents * scheduler.init_noise_sigma
    for step, timestep in enumerate(scheduler.timesteps):
        sample = scheduler.scale_model_input(latents, timestep).expand(branches, -1, -1, -1)
        numbers = torch.from_numpy(request.manipulation.rows(step, request.steps))
        numbers = numbers.to(latents.device)
        prediction = predict(sample, timestep, conditions, numbers)
        noise = guided(prediction, alphas[step], betas[step], request.guidance_rescale)
        latents = scheduler.step(noise, timestep, latents, return_dict=False)[0]
    return latents
