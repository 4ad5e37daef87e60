"""ONNX Runtime without this project's graph work: what `torch.onnx.export` gives, loaded as it is.

The models are those of the PyTorch peer with the same processors, exported at fixed sizes with the
dynamo exporter, one UNet per kind of manipulation, and opened in default sessions, which optimise
when they load. The loop is the PyTorch peer's: three branches on every step.
"""

import logging
import warnings
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.peers import attention
from benchmarks.peers.loop import Conditions, denoise
from benchmarks.peers.models import TorchModels, branches
from benchmarks.peers.work import Made, Unready, Work, one_line
from fastface_trt.engines.contract import MANIPULATION_COLUMNS, PARTS
from fastface_trt.export.face_modules import FaceProjectionModule, ImageEncoderModule
from fastface_trt.export.modules import (
    TEXT_POSITIONS,
    TextEncoderModule,
    VaeDecoderModule,
)


class PlainUNet(nn.Module):
    """A diffusers UNet behind positional inputs, as `torch.onnx.export` wants them."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        text: Tensor,
        pooled: Tensor,
        time_ids: Tensor,
        image_tokens: Tensor,
        numbers: Tensor,
    ) -> Tensor:
        """The noise prediction [B,C,h,w]; inputs as in `loop.Conditions`."""
        return self.unet(
            sample,
            timestep,
            text,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids},
            cross_attention_kwargs={"image_tokens": image_tokens, "numbers": numbers},
            return_dict=False,
        )[0]


class OnnxRuntimePlainPeer:
    """The FastFace loop over sessions of plainly exported modules; `folder` takes the files."""

    name = "onnxruntime-plain"
    label = "FastFace loop, ONNX Runtime without graph work"

    def __init__(self, models: TorchModels, folder: Path) -> None:
        self._models = models
        self._folder = folder
        self._sessions: dict[str, Any] = {}

    def work(self, work: Work) -> Work:
        return work

    def unet_samples(self, work: Work) -> int:
        return (3 if work.guided else 1) * work.request.steps

    def prepare(self, work: Work) -> float | None:
        """Export and open what this work needs; raises `Unready` where the exporter fails."""
        started = perf_counter()
        try:
            self._prepare(work)
        except Exception as error:  # whatever the exporter or ONNX Runtime throws
            raise Unready(f"The plain export failed: {one_line(error)}") from error
        return perf_counter() - started

    def before(self) -> None:
        """See `Peer`."""

    def picture(self, work: Work) -> Image.Image:
        return self.made(work).picture

    @torch.no_grad()
    def made(self, work: Work) -> Made:
        unet = self._sessions[self._unet_key(work)]

        def predict(
            sample: Tensor, timestep: Tensor, conditions: Conditions, numbers: Tensor
        ) -> Tensor:
            return _run(
                unet,
                sample,
                timestep,
                conditions.text,
                conditions.pooled,
                conditions.time_ids,
                conditions.image_tokens,
                numbers,
            )[0]

        scheduler = self._models.pipeline.scheduler
        noise = torch.from_numpy(work.initial_noise())
        latents = denoise(predict, work.request, self._conditions(work), noise, scheduler)
        picture, _ = _run(self._sessions["vae_decoder"], latents)
        pixels = (picture[0].numpy() * 255).round().astype(np.uint8).transpose(1, 2, 0)
        return Made(Image.fromarray(pixels), latents[0].numpy())

    def _conditions(self, work: Work) -> Conditions:
        request = work.request
        text, pooled = self._text(request.prompt)
        negative = negative_pooled = None
        if work.guided:
            pipeline = self._models.pipeline
            if request.negative_prompt or not pipeline.config.force_zeros_for_empty_prompt:
                negative, negative_pooled = self._text(request.negative_prompt)
            else:
                negative, negative_pooled = torch.zeros_like(text), torch.zeros_like(pooled)
        embedding, pixels = self._models.face_inputs(work.face, unconditional=work.guided)
        rows = len(embedding)
        (features,) = _run(self._sessions[f"image_encoder_{rows}"], pixels)
        (tokens,) = _run(self._sessions[f"face_projection_{rows}"], embedding, features)
        return branches(work, text, pooled, negative, negative_pooled, tokens)

    def _text(self, prompt: str) -> tuple[Tensor, Tensor]:
        pipeline = self._models.pipeline
        ids = [
            tokenizer(
                prompt,
                padding="max_length",
                max_length=TEXT_POSITIONS,
                truncation=True,
                return_tensors="pt",
            ).input_ids
            for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2)
        ]
        (first,) = _run(self._sessions["text_encoder"], ids[0])
        second, pooled = _run(self._sessions["text_encoder_2"], ids[1])
        return torch.cat((first, second), dim=-1), pooled

    @staticmethod
    def _unet_key(work: Work) -> str:
        manipulation = work.request.manipulation
        kinds = "-".join(getattr(manipulation, part).kind for part in PARTS)
        scales = "-".join(f"{scale:g}" for scale in work.request.ip_scales())
        return f"unet_{3 if work.guided else 1}_{kinds}_{scales}"

    def _prepare(self, work: Work) -> None:
        pipeline, models = self._models.pipeline, self._models
        rows = 3 if work.guided else 1
        encoder, projection = models.image_encoder, models.projection
        ids = torch.zeros(1, TEXT_POSITIONS, dtype=torch.int64)
        size = encoder.config.image_size
        embedding, pixels = models.face_inputs(work.face, unconditional=work.guided)
        positions = (size // encoder.config.patch_size) ** 2 + 1
        features = torch.zeros(len(embedding), positions, encoder.config.hidden_size)
        for name, encoder_2 in (("text_encoder", False), ("text_encoder_2", True)):
            module = TextEncoderModule(getattr(pipeline, name), pooled=encoder_2)
            self._open(name, module, (ids,))
        self._open(f"image_encoder_{len(pixels)}", ImageEncoderModule(encoder), (pixels,))
        self._open(
            f"face_projection_{len(pixels)}",
            FaceProjectionModule(projection),
            (embedding, features),
        )
        latents = torch.from_numpy(work.initial_noise())
        self._open("vae_decoder", VaeDecoderModule(pipeline.vae), (latents,))
        config = pipeline.unet.config
        width = config.cross_attention_dim
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        attention.configure(pipeline.unet, work.request.manipulation, work.request.ip_scales())
        self._open(
            self._unet_key(work),
            PlainUNet(pipeline.unet),
            (
                latents.repeat(rows, 1, 1, 1),
                torch.tensor(999),
                torch.zeros(rows, TEXT_POSITIONS, width),
                torch.zeros(rows, pooled),
                torch.zeros(rows, 6),
                torch.zeros(rows, projection.tokens, width),
                torch.zeros(len(PARTS), len(MANIPULATION_COLUMNS)),
            ),
        )

    def _open(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if name in self._sessions:
            return
        import onnxruntime

        path = self._folder / f"{name}.onnx"
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            previous = logging.root.manager.disable
            logging.disable(logging.WARNING)
            try:
                torch.onnx.export(module.eval(), inputs, path, dynamo=True, verbose=False)
            finally:
                logging.disable(previous)
        self._sessions[name] = onnxruntime.InferenceSession(
            path, providers=["CPUExecutionProvider"]
        )


def _run(session: Any, *tensors: Tensor) -> list[Tensor]:
    names = [value.name for value in session.get_inputs()]
    feeds = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
    return [torch.from_numpy(array) for array in session.run(None, feeds)]
