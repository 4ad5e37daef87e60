"""Writing the finished networks in the formats the product reads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from fastface_trt.mini.identity import sample_identity
from fastface_trt.mini.prompts import Scene
from fastface_trt.mini.scene import Placement, draw_people, draw_portrait

from .adapter import Adapter
from .detector import Detector
from .face_models import export_onnx
from .recognition import Recogniser
from .unet import build_scheduler

ADAPTER_FILE = "ip-adapter-faceid-plusv2_mini.safetensors"
#: Sample people: numbers within the population "samples", chosen to differ from each other.
SAMPLES: dict[str, int] = {
    "ada": 15,
    "bruno": 19,
    "chika": 18,
    "dev": 14,
    "elsa": 28,
    "farid": 7,
    "gina": 31,
    "hugo": 4,
}
SAMPLE_SIZE = 256


def save_checkpoint(unet: UNet2DConditionModel, folder: Path) -> None:
    """Write unet/, scheduler/ and model_index.json; the other parts are there already."""
    plain = UNet2DConditionModel.from_config(unet.config)
    plain.load_state_dict({k: v for k, v in unet.state_dict().items() if ".processor." not in k})
    plain.half().save_pretrained(folder / "unet")
    build_scheduler().save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionXLPipeline",
        "_diffusers_version": "0.42.0",
        "force_zeros_for_empty_prompt": True,
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))


def save_adapter(adapter: Adapter, out: Path) -> None:
    """Write the adapter file."""
    adapter.save(out / ADAPTER_FILE)


def save_face_models(detector: Detector, recogniser: Recogniser, folder: Path) -> None:
    """Write the InsightFace model folder."""
    levels = (8, 16, 32)
    names = [f"{kind}_{level}" for kind in ("score", "bbox", "kps") for level in levels]
    example = torch.zeros(1, 3, 320, 320)
    export_onnx(detector.eval(), example, folder / "detection.onnx", names, dynamic_size=True)
    crop = torch.zeros(1, 3, 112, 112)
    export_onnx(recogniser.eval(), crop, folder / "recognition.onnx", ["embedding"])


def draw_sample_faces(folder: Path) -> None:
    """Draw the faces that ship with the package, and a picture of two people."""
    folder.mkdir(parents=True, exist_ok=True)
    scene = Scene("photo", "garden", "smiling")
    for name, number in SAMPLES.items():
        person = sample_identity(number, "samples")
        image, _ = draw_portrait(person, scene, number, SAMPLE_SIZE)
        _save_small(image, folder / f"{name}.png")
    pair = [
        (sample_identity(SAMPLES["ada"], "samples"), Placement(0.27, 0.52, 0.19, 0.03)),
        (sample_identity(SAMPLES["bruno"], "samples"), Placement(0.73, 0.55, 0.16, -0.04)),
    ]
    rng = np.random.default_rng(5)
    image, _ = draw_people(pair, Scene("photo", "beach", "smiling"), rng, SAMPLE_SIZE)
    _save_small(image, folder / "two_people.png")


def _save_small(image: Image.Image, path: Path) -> None:
    """Write a PNG with 256 colours: a third of the bytes, and drawings do not show it."""
    image.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
