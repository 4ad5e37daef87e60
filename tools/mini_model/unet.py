"""The UNet: SDXL's shape in small, epsilon prediction, and the noise schedule it is trained on."""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor

from .text import WIDTHS

LATENT_SIZE = 24
FEW_STEPS = (999, 749, 499, 249)


def build_unet() -> UNet2DConditionModel:
    """Return an untrained UNet whose output starts as a copy of its noisy input."""
    pooled, time_ids, time_width = WIDTHS[1], 6, 32
    unet = UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(48, 80, 96),
        layers_per_block=1,
        transformer_layers_per_block=(1, 1, 1),
        attention_head_dim=(2, 5, 6),
        norm_num_groups=8,
        cross_attention_dim=sum(WIDTHS),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=time_width,
        projection_class_embeddings_input_dim=pooled + time_ids * time_width,
    )
    _start_as_identity(unet)
    return unet.to(memory_format=torch.channels_last)


@torch.no_grad()
def _start_as_identity(unet: UNet2DConditionModel) -> None:
    """Let the noisy latents pass through the outermost skip connection.

    At high noise epsilon is nearly the input, and an error of 1 % in epsilon is 15 % in the
    picture, so a network that must first learn to copy wastes most of a short training.  Each
    latent channel is carried as +x and -x; silu(x) - silu(-x) = x makes the copy exact.
    Three signed pairs share each of two normalisation groups, hence twelve carriers.
    """
    carried = (0, 0, 1, 1, 2, 2, 3, 3, 3, 3, 3, 3)
    width = unet.config.block_out_channels[0]
    unet.conv_in.weight[: len(carried)] = 0
    unet.conv_in.bias[: len(carried)] = 0
    last = unet.up_blocks[-1].resnets[-1]
    last.conv_shortcut.weight[: len(carried)] = 0
    last.conv_shortcut.bias[: len(carried)] = 0
    last.conv2.weight[: len(carried)] = 0
    last.conv2.bias[: len(carried)] = 0
    unet.conv_out.weight.mul_(0.1)
    unet.conv_out.weight[:, : len(carried)] = 0
    for index, channel in enumerate(carried):
        sign = 1.0 if index % 2 == 0 else -1.0
        unet.conv_in.weight[index, channel, 1, 1] = sign
        last.conv_shortcut.weight[index, width + index, 0, 0] = 1.0
        unet.conv_out.weight[channel, index, 1, 1] = sign / (carried.count(channel) / 2)


def build_scheduler() -> DDIMScheduler:
    """Return the scheduler that the checkpoint ships with: SDXL's noise, DDIM, trailing."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
        timestep_spacing="trailing",
    )


class Noise:
    """The variance-preserving noise schedule: x_t = signal(t) x_0 + sigma(t) noise."""

    def __init__(self) -> None:
        alphas: Tensor = build_scheduler().alphas_cumprod.float()
        self._signal, self._sigma = alphas.sqrt(), (1 - alphas).sqrt()

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return signal and sigma [n, 1, 1, 1] at the timesteps `t` [n]."""
        shape = (-1, 1, 1, 1)
        return self._signal[t].view(shape), self._sigma[t].view(shape)

    def add(self, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return noisy latents [n, 4, h, w]."""
        signal, sigma = self.levels(t)
        return signal * clean + sigma * noise

    def weight(self, t: Tensor, cap: float = 60.0) -> Tensor:
        """Return the weight [n] of squared epsilon errors: that of velocity errors, capped.

        Without it the layout decided at t near 999 counts 200 times less than details.
        """
        return (1 / self._signal[t] ** 2).clamp(max=cap)

    def ddim(self, x: Tensor, eps: Tensor, t: Tensor, previous: Tensor) -> Tensor:
        """Move latents from timestep `t` [n] to `previous` [n]; below 0 means timestep 0.

        Timestep 0 and not "no noise" is where the shipped scheduler's last step ends.
        """
        signal, sigma = self.levels(t)
        next_signal, next_sigma = self.levels(previous.clamp(min=0))
        clean = (x - sigma * eps) / signal
        return next_signal * clean + next_sigma * eps


def time_ids(count: int, size: int = 4 * LATENT_SIZE) -> Tensor:
    """Return SDXL's size conditioning [count, 6] for square pictures without cropping."""
    return torch.tensor([[size, size, 0, 0, size, size]], dtype=torch.float32).repeat(count, 1)
