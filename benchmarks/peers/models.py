"""The models of a checkpoint as a diffusers pipeline, for the peers that run PyTorch.

Shape legend: T image tokens, C text width, L text positions.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from numpy.typing import NDArray
from torch import Tensor
from transformers import CLIPTokenizer

from benchmarks.peers import attention
from benchmarks.peers.loop import Conditions
from benchmarks.peers.work import Work
from fastface_trt.export.weights import Weights
from fastface_trt.runtime.face import Face, clip_pixels


class TorchModels:
    """A StableDiffusionXLPipeline, CLIP image encoder and face projection of one set of weights.

    `scheduler` is a manifest's configuration of it, with its class name under `class`. The models
    compute on `device` in the type of the weights; latents are float32.
    """

    def __init__(
        self, weights: Weights, scheduler: dict[str, Any], device: torch.device | str = "cpu"
    ) -> None:
        import diffusers

        self.device = torch.device(device)
        unet = weights.unet()
        attention.attach(unet)
        tokenizers = {}
        with tempfile.TemporaryDirectory() as folder:
            for name in ("tokenizer", "tokenizer_2"):
                weights.copy_tokenizer(name, Path(folder) / name)
                tokenizers[name] = CLIPTokenizer.from_pretrained(Path(folder) / name)
        config = {key: value for key, value in scheduler.items() if key != "class"}
        self.pipeline = StableDiffusionXLPipeline(
            vae=weights.vae(),
            text_encoder=weights.text_encoder("text_encoder"),
            text_encoder_2=weights.text_encoder("text_encoder_2"),
            unet=unet,
            scheduler=getattr(diffusers, scheduler["class"])(**config),
            force_zeros_for_empty_prompt=weights.force_zeros_for_empty_prompt,
            add_watermarker=False,
            **tokenizers,
        )
        self.pipeline.set_progress_bar_config(disable=True)
        self.image_encoder = weights.image_encoder()
        self.projection = weights.projection()
        self.normalisation = weights.image_normalisation()
        for model in (
            self.pipeline.unet,
            self.pipeline.vae,
            self.pipeline.text_encoder,
            self.pipeline.text_encoder_2,
            self.image_encoder,
            self.projection,
        ):
            model.eval().requires_grad_(False).to(self.device)
        self.dtype: torch.dtype = unet.dtype

    def tensor(self, array: NDArray[np.float32]) -> Tensor:
        """An array as a tensor on the device, in the type that the models compute in."""
        return torch.from_numpy(array).to(self.device, self.dtype)

    def face_inputs(self, face: Face, *, unconditional: bool) -> tuple[Tensor, Tensor]:
        """Embeddings [n,512] and CLIP pixels [n,3,S,S]: of no face first where `unconditional`."""
        mean, std = self.normalisation
        size = self.image_encoder.config.image_size
        pixels = self.tensor(clip_pixels(face.crop_bgr, size=size, mean=mean, std=std))[None]
        embedding = self.tensor(face.embedding)[None]
        if unconditional:
            embedding = torch.cat((torch.zeros_like(embedding), embedding))
            pixels = torch.cat((torch.zeros_like(pixels), pixels))
        return embedding, pixels

    def image_tokens(self, face: Face, *, unconditional: bool) -> Tensor:
        """Image tokens [n,T,C] of the face, those of no face before it where `unconditional`."""
        embedding, pixels = self.face_inputs(face, unconditional=unconditional)
        features = self.image_encoder(pixels, output_hidden_states=True).hidden_states[-2]
        return self.projection(embedding, features)

    def conditions(self, work: Work) -> Conditions:
        """Texts and image tokens of u, i and ti in this order, or of ti alone without guidance."""
        request = work.request
        text, negative, pooled, negative_pooled = self.pipeline.encode_prompt(
            request.prompt,
            negative_prompt=request.negative_prompt or None,
            device=self.device,
            do_classifier_free_guidance=work.guided,
        )
        tokens = self.image_tokens(work.face, unconditional=work.guided)
        return branches(work, text, pooled, negative, negative_pooled, tokens)


def branches(
    work: Work,
    text: Tensor,
    pooled: Tensor,
    negative: Tensor | None,
    negative_pooled: Tensor | None,
    tokens: Tensor,
) -> Conditions:
    """The branches' conditions from texts [1,L,C] and [1,P] and image tokens [n,T,C]."""
    request = work.request
    size = [float(request.height), float(request.width)]
    time_ids = torch.tensor([[*size, 0.0, 0.0, *size]], device=text.device)
    if negative is None or negative_pooled is None:
        return Conditions(text, pooled, time_ids, tokens)
    return Conditions(
        torch.cat((negative, negative, text)),
        torch.cat((negative_pooled, negative_pooled, pooled)),
        time_ids.expand(3, -1),
        tokens[[0, 1, 1]],
    )
