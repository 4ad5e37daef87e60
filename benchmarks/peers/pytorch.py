"""Peers in PyTorch: the FastFace loop with diffusers' models, eager and compiled."""

import copy
from time import perf_counter
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

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
        return work

    def unet_samples(self, work: Work) -> int:
        return (3 if work.guided else 1) * work.request.steps

    def prepare(self, work: Work) -> float | None:
        return None

    def before(self) -> None:
        """See `Peer`."""

    def picture(self, work: Work) -> Image.Image:
        return self._picture(self._latents(work))

    def made(self, work: Work) -> Made:
        latents = self._latents(work)
        return Made(self._picture(latents), latents[0].cpu().numpy())

    @torch.no_grad()
    def _latents(self, work: Work) -> Tensor:
        attention.configure(self.unet, work.request.manipulation, work.request.ip_scales())
        return denoise(
            self._predict,
            work.request,
            self.models.conditions(work),
            torch.from_numpy(work.initial_noise()).to(self.models.device),
            self.models.pipeline.scheduler,
        )

    @torch.no_grad()
    def _picture(self, latents: Tensor) -> Image.Image:
        pipeline = self.models.pipeline
        scaled = (latents / pipeline.vae.config.scaling_factor).to(self.models.dtype)
        decoded = self.decoder(scaled, return_dict=False)[0]
        (picture,) = pipeline.image_processor.postprocess(decoded, output_type="pil")
        return picture

    def _predict(
        self, sample: Tensor, timestep: Tensor, conditions: Conditions, numbers: Tensor
    ) -> Tensor:
        noise: Tensor = self.unet(
            sample.to(self.models.dtype),
            timestep,
            conditions.text,
            added_cond_kwargs={
                "text_embeds": conditions.pooled,
                "time_ids": conditions.time_ids,
            },
            cross_attention_kwargs={"image_tokens": conditions.image_tokens, "numbers": numbers},
            return_dict=False,
        )[0]
        return noise.float()


class CompiledPeer(PyTorchPeer):
    """The same with UNet and VAE decoder through `torch.compile`, one compilation per preset.

    `channels_last` keeps images with their channels innermost, as tensor cores take them.
    """

    name = "pytorch-compile"
    label = "FastFace loop, torch.compile"

    def __init__(self, models: TorchModels, *, channels_last: bool = False) -> None:
        super().__init__(models)
        self._by_kinds: dict[tuple[object, ...], Any] = {}
        self._format = torch.channels_last if channels_last else torch.preserve_format
        if channels_last:
            self.label += ", channels_last"
        vae = models.pipeline.vae
        vae = copy.deepcopy(vae).to(memory_format=self._format) if channels_last else vae
        self.decoder = torch.compile(vae.decode, dynamic=False)

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

    def _latents(self, work: Work) -> Tensor:
        manipulation = work.request.manipulation
        parts = (manipulation.down, manipulation.mid, manipulation.up)
        kinds = (work.guided, *(part.kind for part in parts))
        if kinds not in self._by_kinds:  # a compiled module of its own: nothing to guard against
            unet = copy.deepcopy(self.models.pipeline.unet).to(memory_format=self._format)
            attention.configure(unet, manipulation, work.request.ip_scales())
            self._by_kinds[kinds] = torch.compile(unet, dynamic=False)
        self.unet = self._by_kinds[kinds]
        return super()._latents(work)


class DiffusersPeer(PyTorchPeer):
    """Plain diffusers with the IP-Adapter: `StableDiffusionXLPipeline` itself, in eager PyTorch.

    No attention manipulation, no decoupled guidance, guidance scale 1, so one branch per step. The
    decoupled attention is this package's plain processor (two SDPA calls, as diffusers' own
    IP-Adapter processor), because diffusers loads no FaceID projection; everything else is its own.
    """

    name = "diffusers"
    label = "plain diffusers with IP-Adapter, no AM, no DCG"

    def work(self, work: Work) -> Work:
        return work.with_preset("plain")

    def unet_samples(self, work: Work) -> int:
        return work.request.steps

    def picture(self, work: Work) -> Image.Image:
        return self._run(work, "pil").images[0]

    def made(self, work: Work) -> Made:
        latents = self._run(work, "latent").images
        return Made(self.picture(work), latents[0].float().cpu().numpy())

    @torch.no_grad()
    def _run(self, work: Work, output: str) -> Any:
        request = work.with_preset("plain").request
        tokens = self.models.image_tokens(work.face, unconditional=False)
        return self.models.pipeline(
            request.prompt,
            height=request.height,
            width=request.width,
            num_inference_steps=request.steps,
            guidance_scale=1.0,
            latents=self.models.tensor(work.initial_noise()),
            output_type=output,
            **self._adapter(work.with_preset("plain"), tokens),
        )

    def _adapter(self, work: Work, tokens: Tensor) -> dict[str, Any]:
        """What the pipeline is told of the adapter; image tokens [1,T,C]."""
        request = work.request
        attention.configure(self.unet, request.manipulation, request.ip_scales())
        numbers = torch.from_numpy(request.manipulation.rows(0, request.steps))
        numbers = numbers.to(self.models.device)
        return {"cross_attention_kwargs": {"image_tokens": tokens, "numbers": numbers}}


class DiffusersAdapterPeer(DiffusersPeer):
    """The same with the attention processor that diffusers itself gives an IP-Adapter.

    The projection is this package's, as above; diffusers calls its tokens image embeddings.
    """

    name = "diffusers-ip-adapter"
    label = "plain diffusers with its own IP-Adapter processor, no AM, no DCG"

    def prepare(self, work: Work) -> float | None:
        """Raises `Unready` where this diffusers has no such processor."""
        from diffusers.models import attention_processor

        if not hasattr(attention_processor, "IPAdapterAttnProcessor2_0"):
            raise Unready("This version of diffusers has no IPAdapterAttnProcessor2_0.")
        return None

    def before(self) -> None:
        """Nothing: a call itself exchanges processors and puts them back, in a millisecond."""

    def _run(self, work: Work, output: str) -> Any:
        unet, config = self.unet, self.unet.config
        kept, projection = unet.attn_processors, unet.encoder_hid_proj
        kind = config.encoder_hid_dim_type
        try:
            unet.set_attn_processor(self._processors(work))
            unet.encoder_hid_proj = _Tokens()
            unet.register_to_config(encoder_hid_dim_type="ip_image_proj")
            return super()._run(work, output)
        finally:
            unet.set_attn_processor(kept)
            unet.encoder_hid_proj = projection
            unet.register_to_config(encoder_hid_dim_type=kind)

    def _adapter(self, work: Work, tokens: Tensor) -> dict[str, Any]:
        return {"ip_adapter_image_embeds": [tokens]}

    def _processors(self, work: Work) -> dict[str, Any]:
        from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

        scales = work.with_preset("plain").request.ip_scales()
        processors: dict[str, Any] = {}
        for name, own in self.unet.attn_processors.items():
            processors[name] = own
            if isinstance(own, attention.ImageAttention):
                hidden, text = own.to_k_ip.out_features, own.to_k_ip.in_features
                made = IPAdapterAttnProcessor2_0(hidden, text, (4,), [float(scales[own.part])])
                made.to_k_ip, made.to_v_ip = (
                    nn.ModuleList([own.to_k_ip]),
                    nn.ModuleList([own.to_v_ip]),
                )
                processors[name] = made
        return processors


class _Tokens(nn.Module):
    """In place of diffusers' projection of image embeddings, which were projected before."""

    def forward(self, image_embeds: list[Tensor]) -> list[Tensor]:
        """The tokens as they are."""
        return image_embeds
