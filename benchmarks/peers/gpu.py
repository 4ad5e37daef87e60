"""One picture by every peer on a GPU: full-size SDXL with random weights, or the mini model.

All have the same weights: those that are drawn for `bench --random-weights` are read into the
PyTorch models, in float16. Every peer ends with the same encoder of PNGs. `device="cpu"` runs the
same code without a GPU, to test it.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.peers.graph_weights import load_weights
from benchmarks.peers.models import TorchModels
from benchmarks.peers.ours import FastFacePeer
from benchmarks.peers.pytorch import (
    CompiledPeer,
    DiffusersAdapterPeer,
    DiffusersPeer,
    PyTorchPeer,
)
from benchmarks.peers.work import Peer, Work
from fastface_trt import FastFace
from fastface_trt.checkpoints import find_checkpoint
from fastface_trt.engines.manifest import ExportManifest
from fastface_trt.errors import BackendUnavailable
from fastface_trt.export.options import ExportOptions
from fastface_trt.export.weights import CheckpointWeights, RandomWeights
from fastface_trt.runtime.picture_file import encode_picture


class WithPng:
    """A peer whose picture ends as the bytes of a PNG; everything else is the peer's own."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._peer, name)

    def picture(self, work: Work) -> Image.Image:
        image = self._peer.picture(work)
        encode_picture(np.asarray(image), parameters={})
        return image


def require(device: str) -> None:
    """Raises `BackendUnavailable` in one sentence where PyTorch sees no GPU."""
    if device == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailable(
            "PyTorch sees no GPU here, so there is nothing to compare on one.",
            "Run it on a machine with a GPU and a CUDA build of torch; "
            "--device cpu --mini runs the same code on the CPU.",
        )


def make_models(manifest: ExportManifest, export: Path, device: str) -> TorchModels:
    """The PyTorch models on `device`, with the weights of the export in folder `export`."""
    checkpoint, scheduler = find_checkpoint(manifest.checkpoint), dict(manifest.scheduler)
    if not manifest.random_weights:
        return TorchModels(CheckpointWeights(ExportOptions(checkpoint)), scheduler, device)
    options = ExportOptions(checkpoint, precision=manifest.precision, random_weights=True)
    models = TorchModels(RandomWeights(options), scheduler, device)
    for name, model in (
        ("text_encoder", models.pipeline.text_encoder),
        ("text_encoder_2", models.pipeline.text_encoder_2),
        ("image_encoder", models.image_encoder),
        ("face_projection", models.projection),
        ("unet", models.pipeline.unet),
        ("vae_decoder", models.pipeline.vae),
    ):
        load_weights(model, export / name / "model.onnx")
    return models


def make_peers(fastface: FastFace, models: TorchModels) -> list[Peer]:
    """All peers of a GPU, eager PyTorch first."""
    peers: list[Peer] = [
        PyTorchPeer(models),
        CompiledPeer(models, channels_last=True),
        DiffusersPeer(models),
        DiffusersAdapterPeer(models),
        FastFacePeer(fastface, "full", "fresh"),
        FastFacePeer(fastface, "full", "cached"),
        FastFacePeer(fastface, "exact", "fresh"),
        FastFacePeer(fastface, "exact", "cached"),
    ]
    return [WithPng(peer) for peer in peers]


def machine_facts(device: str) -> dict[str, Any]:
    """The machine with the GPU that PyTorch computes on."""
    from fastface_trt.engines.hardware import cuda_driver, cuda_hardware
    from fastface_trt.measure.machine import describe_machine

    if device != "cuda":
        return describe_machine()
    gpu = {"gpu": torch.cuda.get_device_name()}
    return describe_machine() | cuda_hardware() | cuda_driver() | gpu
