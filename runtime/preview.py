"""A small picture of latents, without the VAE: one linear map, fitted to the export's own decoder.

A latent pixel of these VAEs is nearly a colour (of vae_scale_factor² pixels), so a matrix of C + 1
numbers per colour shows what a picture is becoming for less than a thousandth of a decode. The map
is fitted when an export is opened, so that it fits any VAE.

Shape legend: C latent channels, h × w latent size, H × W picture size, P latent pixels.
"""

import numpy as np
from numpy.typing import NDArray

from fastface_trt.engines.manifest import ExportManifest
from fastface_trt.runtime.sampling import standard_noise
from fastface_trt.runtime.stages import Stages

EXAMPLES = 2
"""Decodes to fit on; each gives h·w equations for C + 1 unknowns, so that one would do."""

SMOOTHNESS = 1.0
"""Standard deviation of the examples' blur, in latent pixels. Neighbours in a picture are alike;
latents without any such likeness are nothing that the decoder was trained on."""

WIDEST = 2.0
"""Standard deviation of latents that is shown as it is; finished ones have about 1. Some schedules
keep their noise on top of the latents, which would only show as black and white."""


class LatentPreview:
    """Latents as RGB pixels, one for each latent pixel.

    Final latents give a blurred picture with roughly its colours. Latents on the way hold noise
    besides, so what is shown of them is only a hint of what comes.
    """

    def __init__(self, weights: NDArray[np.float32]) -> None:
        """`weights`: float32 [C + 1, 3], in steps of 0 to 255; the last row is added to all."""
        self._weights = weights

    @classmethod
    def fit(cls, stages: Stages, manifest: ExportManifest) -> "LatentPreview":
        """Least squares between random smooth latents and what the export's decoder makes of them.

        Decodes a few pictures of the export's own size. The examples have the spread that the
        UNet's final latents are scaled to: mean 0 and variance 1 in every channel. Raises what
        `Stages.decode` raises.
        """
        inputs, colours = [], []
        for example in range(EXAMPLES):
            latents_Chw = smooth_latents(manifest.latent_shape(), example)
            pixels_HW3 = stages.decode(stages.device.upload(latents_Chw))
            inputs.append(_rows(latents_Chw))
            colours.append(_block_means(pixels_HW3, manifest.vae_scale_factor).reshape(-1, 3))
        weights, *_ = np.linalg.lstsq(np.concatenate(inputs), np.concatenate(colours), rcond=None)
        return cls(weights.astype(np.float32))

    def rgb(self, latents_Chw: NDArray[np.float32]) -> NDArray[np.uint8]:
        """A picture of latents [C,h,w] of any size: RGB, uint8 [h,w,3].

        Values that are not finite count as 0, and very noisy latents are damped.
        """
        finite_Chw = np.nan_to_num(latents_Chw, nan=0, posinf=0, neginf=0)
        finite_Chw = finite_Chw * (WIDEST / max(float(finite_Chw.std()), WIDEST))
        colours_P3 = _rows(finite_Chw.astype(np.float32)) @ self._weights
        _, height, width = latents_Chw.shape
        pixels_P3: NDArray[np.uint8] = np.rint(colours_P3).clip(0, 255).astype(np.uint8)
        return pixels_P3.reshape(height, width, 3)


def smooth_latents(shape_Chw: tuple[int, int, int], example: int) -> NDArray[np.float32]:
    """Random latents [C,h,w] that change slowly, with mean 0 and variance 1 per channel."""
    noise_Chw = standard_noise(0, example, 0, shape_Chw)
    _, height, width = shape_Chw
    frequency_hw = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None, :])
    blur_hw = np.exp(-2 * (np.pi * SMOOTHNESS * frequency_hw) ** 2)
    smooth_Chw = np.fft.ifft2(np.fft.fft2(noise_Chw) * blur_hw).real
    smooth_Chw -= smooth_Chw.mean((1, 2), keepdims=True)
    smooth_Chw /= smooth_Chw.std((1, 2), keepdims=True)
    return smooth_Chw.astype(np.float32)


def _rows(latents_Chw: NDArray[np.float32]) -> NDArray[np.float32]:
    """The latents as one row per latent pixel with a 1 at its end, float32 [P, C + 1]."""
    rows_PC = latents_Chw.reshape(len(latents_Chw), -1).T
    return np.concatenate((rows_PC, np.ones((len(rows_PC), 1), np.float32)), axis=1)


def _block_means(pixels_HW3: NDArray[np.uint8], factor: int) -> NDArray[np.float64]:
    """The picture with `factor` × `factor` pixels averaged to one, [h, w, 3]."""
    height, width = pixels_HW3.shape[0] // factor, pixels_HW3.shape[1] // factor
    blocks = pixels_HW3.reshape(height, factor, width, factor, 3)
    return np.asarray(blocks.mean(axis=(1, 3)))
