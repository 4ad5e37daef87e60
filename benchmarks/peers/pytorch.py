"""Peers in PyTorch: the FastFace loop with diffusers' models, eager and compiled."""

import copy
from time import perf_counter
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from benchmarks.peers import attention
from benchmarks.peers.loop import Conditions, denoise
from benchmarks.peers.models import TorchModels
from benchmarks.peers.work import Made, Unready, Work, one_line


class PyTorchPeer:
    """FastFace in eager PyTorch: three branches in one batch on every step.

    Prompt and negative prompt go through both text encoders, face and zero face through image
    encoder and projection. Without any guidance it is one branch, as diffusers does it.
    """

    name = "pytorch"
    label = "FastFace loop, eager PyTorch"

    def __init__(self, models: TorchModels) -> None:
        self.models = models
        self.unet: Any = models.pipeline.unet
        self.decoder: Any = models.pipeline.vae.decode

    def work(self, work: Work) -> Work:
        """See `Peer`."""
        return work

    def unet_samples(self, work: Work) -> int:
        """See `Peer`."""
        return (3 if work.guided else 1) * work.request.steps

    def prepare(self, work: Work) -> float | None:
        """See `Peer`."""
        return None

    def before(self) -> None:
        """See `Peer`."""

    def picture(self, work: Work) -> Image.Image:
        """See `Peer`."""
        return self.made(work).picture

    @torch.no_grad()
    def made(self, work: Work) -> Made:
        """See `Peer`."""
        attention.configure(self.unet, work.request.manipulation, work.request.ip_scales())
        latents = denoise(
            self._predict,
            work.request,
            self.models.conditions(work),
            torch.from_numpy(work.initial_noise()),
            self.models.pipeline.scheduler,
        )
        pipeline = self.models.pipeline
        decoded = self.decoder(latents / pipeline.vae.config.scaling_factor, return_dict=False)[0]
        (picture,) = pipeline.image_processor.postprocess(decoded, output_type="pil")
        return Made(picture, latents[0].numpy())

    def _predict(
        self, sample: Tensor, timestep: Tensor, conditions: Conditions, numbers: Tensor
    ) -> Tensor:
        return self.unet(
            sample,
            timestep,
            conditions.text,
            added_cond_kwargs={
                "text_embeds": conditions.pooled,
                "time_ids": conditions.time_ids,
            },
            cross_attention_kwargs={"image_tokens": conditions.image_tokens, "numbers": numbers},
            return_dict=False,
        )[0]


class CompiledPeer(PyTorchPeer):
    """The same with UNet and VAE decoder through `torch.compile`, one compilation per preset."""

    name = "pytorch-compile"
    label = "FastFace loop, torch.compile"

    def __init__(self, models: TorchModels) -> None:
        super().__init__(models)
        self._by_kinds: dict[tuple[object, ...], Any] = {}
        self.decoder = torch.compile(models.pipeline.vae.decode, dynamic=False)

    def prepare(self, work: Work) -> float | None:
        """Compile for this work by making two pictures; raises `Unready` where it fails."""
        started = perf_counter()
        try:
            self.made(work)
            compiled = perf_counter() - started
            self.made(work)
        except Exception as error:  # whatever the compiler or the C++ toolchain throws
            raise Unready(f"torch.compile failed: {one_line(error)}") from error
        return compiled

    def made(self, work: Work) -> Made:
        """See `Peer`."""
        manipulation = work.request.manipulation
        parts = (manipulation.down, manipulation.mid, manipulation.up)
        kinds = (work.guided, *(part.kind for part in parts))
        if kinds not in self._by_kinds:  # a compiled module of its own: nothing to guard against
            unet = copy.deepcopy(self.models.pipeline.unet)
            attention.configure(unet, manipulation, work.request.ip_scales())
            self._by_kinds[kinds] = torch.compile(unet, dynamic=False)
        self.unet = self._by_kinds[kinds]
        return super().made(work)


class DiffusersPeer(PyTorchPeer):
    """Plain diffusers with the IP-Adapter: `StableDiffusionXLPipeline` itself, in eager PyTorch.

    No attention manipulation, no decoupled guidance, guidance scale 1, so one branch per step. The
    decoupled attention is this package's plain processor (two SDPA calls, as diffusers' own
    IP-Adapter processor), because diffusers loads no FaceID projection; everything else is its own.
    """

    name = "diffusers"
    label = "plain diffusers with IP-Adapter, no AM, no DCG"

    def work(self, work: Work) -> Work:
        """See `Peer`."""
        return work.with_preset("plain")

    def unet_samples(self, work: Work) -> int:
        """See `Peer`."""
        return work.request.steps

    def picture(self, work: Work) -> Image.Image:
        """See `Peer`."""
        return self._run(work, "pil").images[0]

    def made(self, work: Work) -> Made:
        """See `Peer`."""
        latents = self._run(work, "latent").images
        return Made(self.picture(work), latents[0].numpy())

    @torch.no_grad()
    def _run(self, work: Work, output: str) -> Any:
        request = work.with_preset("plain").request
        attention.configure(self.unet, request.manipulation, request.ip_scales())
        tokens = self.models.image_tokens(work.face, unconditional=False)
        numbers = torch.from_numpy(request.manipulation.rows(0, request.steps))
        return self.models.pipeline(
            request.prompt,
            height=request.height,
            width=request.width,
            num_inference_steps=request.steps,
            guidance_scale=1.0,
            latents=torch.from_numpy(work.initial_noise()),
            cross_attention_kwargs={"image_tokens": tokens, "numbers": numbers},
            output_type=output,
        )
