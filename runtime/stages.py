"""The stages of a picture over one export's engines, each by itself.

`FastFace.generate` runs them for one batch from start to end. A server's batcher calls them one by
one: it makes a sample when the client comes, and takes it a step further with whoever else is
there.

Shape legend: C latent channels, h × w latent size, T image tokens.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fastface_trt.engines import contract
from fastface_trt.engines.device import Device, HostDevice, Tensor
from fastface_trt.errors import EngineFailed
from fastface_trt.runtime.conditioning import Conditioner
from fastface_trt.runtime.export_folder import ModuleSet
from fastface_trt.runtime.face import ChannelOrder, Face
from fastface_trt.runtime.prompt_syntax import PromptSyntax
from fastface_trt.runtime.request import GenerationRequest, check_size
from fastface_trt.runtime.sampling import (
    EngineGuidance,
    Guidance,
    HostGuidance,
    NoiseSource,
    OnStep,
    Sample,
    require_finite,
    take_step,
)
from fastface_trt.runtime.timeline import NO_TIMELINE, Timeline


def _not_blank(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """`pixels`, unless all are the same: numbers that are not finite end as one value, mostly 0."""
    if (pixels[0] == pixels[0, 0, 0]).all() and (pixels == pixels[0, 0, 0]).all():
        raise EngineFailed(
            f"The VAE decoder overflows: every value of the picture is {pixels[0, 0, 0]}.",
            "Export with another VAE (--vae madebyollin/sdxl-vae-fp16-fix), or with --precision "
            "bf16 or fp32.",
        )
    return pixels


class Stages:
    """Face tokens, samples, UNet steps and decoding with the engines of a `ModuleSet`.

    Threads may share it; a sample belongs to one thread at a time.
    """

    def __init__(self, modules: ModuleSet) -> None:
        self._modules = modules
        self._conditioner = Conditioner(modules)

    @property
    def device(self) -> Device:
        """Where the tensors of the engines live."""
        return self._modules.device

    @property
    def request_counts(self) -> tuple[int, ...] | None:
        """How many requests a UNet call may hold, in rising order; None for any number."""
        return self._modules["unet"].request_counts

    def image_tokens(
        self, face: Face, channel_order: ChannelOrder = "bgr", timeline: Timeline = NO_TIMELINE
    ) -> Tensor:
        """Image tokens [T, C] of a face; kept for the next call with the same face."""
        return self._conditioner.image_tokens(face, channel_order, timeline)

    def sample(
        self,
        request: GenerationRequest,
        face_tokens: Tensor,
        timeline: Timeline = NO_TIMELINE,
        *,
        noise: NoiseSource | None = None,
    ) -> Sample:
        """The request before its first step: prompt encoded, schedule resolved, noise drawn.

        `noise` takes the place of what the request's seed stands for. See `check_size`.
        """
        export = self._modules.export
        shape = export.manifest.latent_shape(request.height, request.width)
        schedule = export.schedule(request.steps)
        conditions = self._conditioner.conditions(request, face_tokens, timeline)
        with timeline.span("noise", self.device):
            return Sample(request, schedule, conditions, shape, self.device, noise)

    @property
    def guidance(self) -> Guidance:
        """Numpy where the UNet's output is at hand anyway, elsewhere the module made for it."""
        if isinstance(self._modules.device, HostDevice):
            return HostGuidance()
        return EngineGuidance(self._modules["guidance_step"])

    def step(
        self, samples: Sequence[Sample], on_step: OnStep | None = None, *, wait: bool = False
    ) -> None:
        """One UNet call for samples that agree in `Sample.sharing`; see `take_step`.

        At most as many samples as the largest of `request_counts`.
        """
        take_step(self._modules["unet"], self.guidance, samples, on_step=on_step, wait=wait)

    def decode(
        self,
        latents: Tensor,
        timeline: Timeline = NO_TIMELINE,
        out: NDArray[np.uint8] | None = None,
    ) -> NDArray[np.uint8]:
        """The picture of final latents [C,h,w]: RGB, uint8 [H,W,3], written into `out` if given.

        Raises `EngineFailed` where the latents are not finite, or the decoder's values were not.
        """
        device, decoder = self.device, self._modules["vae_decoder"]
        with timeline.span("vae_decoder", device):
            decoded = decoder(**{contract.LATENTS: device.stack([latents])})
        with timeline.span("picture", device):
            # The picture cannot tell: its clamp to [0, 1] may swallow what is not a number.
            require_finite(device, latents)
            if contract.PIXELS in decoded:
                return _not_blank(device.download(decoded[contract.PIXELS][0], out))
            picture_3HW = device.download(decoded[contract.PICTURE][0])
            rounded = np.rint(picture_3HW.astype(np.float32) * 255).clip(0, 255)
            pixels = np.empty((*rounded.shape[1:], 3), np.uint8) if out is None else out
            np.copyto(pixels, rounded.transpose(1, 2, 0), casting="unsafe")
            return _not_blank(pixels)

    def check_size(self, request: GenerationRequest) -> None:
        """Raise `InvalidRequest` unless this export makes pictures of the request's size."""
        check_size(self._modules.manifest, request)

    def text_positions(self, request: GenerationRequest) -> int:
        """How many positions of text the UNet is given for this request, in every branch."""
        return self._conditioner.windows(request) * contract.TEXT_POSITIONS

    @property
    def most_tokens(self) -> int:
        """How many tokens of a prompt this export reads."""
        return self._conditioner.most_windows * (contract.TEXT_POSITIONS - 2)

    def cut_from(self, prompt: str, syntax: PromptSyntax = "plain") -> str:
        """What of a prompt this export has no room for; empty where it has."""
        return self._conditioner.cut_from(prompt, syntax)

    def forget(self) -> None:
        """Drop every encoding of a prompt or a face kept for the next call."""
        self._conditioner.forget()
