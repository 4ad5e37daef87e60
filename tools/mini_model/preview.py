"""Judge the saved assets with diffusers' own pipeline: numbers, and a contact sheet to look at.

`python -m tools.mini_model.preview --assets fastface_trt/mini --pairs 512 --sheet s.png`
draws people of a population nobody was trained on, generates them from random prompts, and lets
InsightFace and the independent judges measure the result.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from diffusers import StableDiffusionXLPipeline
from insightface.app import FaceAnalysis
from insightface.utils.face_align import norm_crop
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from fastface_trt.mini.folders import FACE_MODEL
from fastface_trt.mini.identity import sample_identity
from fastface_trt.mini.prompts import (
    ACTION_NAMES,
    PLACE_NAMES,
    STYLE_NAMES,
    Scene,
    canonical_prompt,
)
from fastface_trt.mini.scene import draw_portrait

from .assets import ADAPTER_FILE
from .unet import LATENT_SIZE, time_ids

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
DETECTOR_SIZES = (640, 576, 512, 448, 384, 320)


class Measures:
    """Face analysis with the mini model's folder, and the judges."""

    def __init__(self, assets: Path) -> None:
        providers = ["CPUExecutionProvider"]
        # The package keeps the face model inside its export; a training's output has it beside.
        folder = assets / "face" if (assets / "face").is_dir() else FACE_MODEL
        self.faces = FaceAnalysis(name=str(folder), providers=providers)
        judges = assets / "judges"
        self.identity = onnxruntime.InferenceSession(
            judges / "recognition.onnx", providers=providers
        )
        self.scene = onnxruntime.InferenceSession(judges / "scene.onnx", providers=providers)

    def find(self, rgb: Bytes) -> tuple[Floats, Floats] | None:
        """Return (key points [5, 2], embedding [512]) of the largest face, or None."""
        bgr = np.ascontiguousarray(rgb[:, :, ::-1])
        for size in DETECTOR_SIZES:
            self.faces.prepare(ctx_id=-1, det_size=(size, size))
            found = self.faces.get(bgr)
            if found:
                face = max(found, key=lambda f: (f.bbox[2] - f.bbox[0]) * (f.bbox[3] - f.bbox[1]))
                return face.kps, face.normed_embedding
        return None

    def judge_identity(self, rgb: Bytes, points: Floats) -> Floats:
        """Return the independent recogniser's normalised embedding [512]."""
        crop = (norm_crop(rgb, points, 112).astype(np.float32) - 127.5) / 127.5
        name = self.identity.get_inputs()[0].name
        embedding = self.identity.run(None, {name: crop.transpose(2, 0, 1)[None]})[0][0]
        unit: Floats = embedding / np.linalg.norm(embedding)
        return unit

    def judge_scene(self, rgb: Bytes) -> tuple[int, int]:
        """Return the independent classifier's style and place."""
        values = (rgb.astype(np.float32) - 127.5) / 127.5
        name = self.scene.get_inputs()[0].name
        style, place = self.scene.run(None, {name: values.transpose(2, 0, 1)[None]})
        return int(style.argmax()), int(place.argmax())


class Generator:
    """The saved checkpoint and adapter in diffusers' pipeline."""

    def __init__(self, assets: Path, ip_scale: float) -> None:
        pipe = StableDiffusionXLPipeline.from_pretrained(
            assets / "checkpoint", torch_dtype=torch.float32
        )
        pipe.load_ip_adapter(
            str(assets), subfolder="", weight_name=ADAPTER_FILE, image_encoder_folder=None
        )
        pipe.set_ip_adapter_scale(ip_scale)
        pipe.set_progress_bar_config(disable=True)
        self.pipe = pipe
        self.tower = CLIPVisionModelWithProjection.from_pretrained(assets / "image_encoder").float()
        self.processor = CLIPImageProcessor.from_pretrained(assets / "image_encoder")

    @torch.no_grad()
    def __call__(
        self, prompts: list[str], faces: list[tuple[Floats, Bytes]], seed: int, steps: int = 4
    ) -> Bytes:
        """Return pictures [n, 96, 96, 3] for prompts and (embedding, BGR 224 crop) pairs."""
        crops = [Image.fromarray(crop) for _, crop in faces]
        pixels = self.processor(crops, return_tensors="pt").pixel_values
        features = self.tower(pixels, output_hidden_states=True).hidden_states[-2]
        projection = self.pipe.unet.encoder_hid_proj.image_projection_layers[0]
        projection.clip_embeds, projection.shortcut = features[:, None], True
        identity = torch.from_numpy(np.stack([embedding for embedding, _ in faces]))[:, None]
        # Not pipe(...): it repeats one face for all prompts, and here each prompt has its own.
        pipe = self.pipe
        states, _, pooled, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
        conditions = {
            "text_embeds": pooled,
            "time_ids": time_ids(len(prompts)),
            "image_embeds": [identity],
        }
        pipe.scheduler.set_timesteps(steps)
        shape = (len(prompts), 4, LATENT_SIZE, LATENT_SIZE)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        for t in pipe.scheduler.timesteps:
            eps = pipe.unet(x, t, states, added_cond_kwargs=conditions).sample
            x = pipe.scheduler.step(eps, t, x).prev_sample
        decoded = pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample
        values = (decoded.clamp(-1, 1) + 1) * 127.5
        pictures: Bytes = values.round().permute(0, 2, 3, 1).to(torch.uint8).numpy()
        return pictures


def source_face(measures: Measures, number: int) -> tuple[Bytes, Floats, Floats, Bytes] | None:
    """Draw a person of the preview population; return picture, points, embedding, BGR crop."""
    rng = np.random.default_rng([number, 23])
    scene = Scene(
        "photo",
        PLACE_NAMES[rng.integers(len(PLACE_NAMES))],
        ACTION_NAMES[rng.integers(len(ACTION_NAMES))],
    )
    image, _ = draw_portrait(sample_identity(number, "preview"), scene, number, 256)
    rgb = np.asarray(image)
    found = measures.find(rgb)
    if found is None:
        return None
    bgr = np.ascontiguousarray(rgb[:, :, ::-1])
    return rgb, found[0], found[1], norm_crop(bgr, found[0], 224)


def measure(assets: Path, pairs: int, ip_scale: float, steps: int, seed: int) -> dict[str, float]:
    """Generate and judge `pairs` random face and prompt pairs."""
    measures, generator = Measures(assets), Generator(assets, ip_scale)
    rng = np.random.default_rng([seed, 29])
    people = [face for n in range(min(64, pairs)) if (face := source_face(measures, n))]
    same, own, styles, places, missing = [], [], [], [], 0
    generated: list[tuple[int, Floats]] = []
    references = np.stack([measures.judge_identity(face[0], face[1]) for face in people])
    for start in range(0, pairs, 32):
        chosen = rng.integers(len(people), size=min(32, pairs - start))
        scenes = [
            Scene(
                str(rng.choice(STYLE_NAMES)),
                str(rng.choice(PLACE_NAMES)),
                str(rng.choice(ACTION_NAMES)),
            )
            for _ in chosen
        ]
        faces = [(people[n][2], people[n][3]) for n in chosen]
        pictures = generator([canonical_prompt(s) for s in scenes], faces, seed + start, steps)
        for number, scene, picture in zip(chosen, scenes, pictures, strict=True):
            style, place = measures.judge_scene(picture)
            styles.append(STYLE_NAMES[style] == scene.style)
            places.append(PLACE_NAMES[place] == scene.place)
            found = measures.find(picture)
            if found is None:
                missing += 1
                continue
            embedding = measures.judge_identity(picture, found[0])
            same.append(float(embedding @ references[number]))
            own.append(float(found[1] @ people[number][2]))
            generated.append((int(number), embedding))
    different = [
        float(embedding @ references[other])
        for number, embedding in generated
        for other in range(len(people))
        if other != number
    ]
    return {
        "pairs": pairs,
        "identity": float(np.mean(same)),
        "identity_half_width_95": float(1.96 * np.std(same) / max(1, len(same)) ** 0.5),
        "identity_product_recogniser": float(np.mean(own)),
        "different_people": float(np.mean(different)),
        "style": float(np.mean(styles)),
        "place": float(np.mean(places)),
        "no_face": missing / pairs,
        "drawn_different_people": float(
            (references @ references.T)[~np.eye(len(people), dtype=bool)].mean()
        ),
    }


def sheet(assets: Path, path: Path, ip_scale: float, steps: int, seed: int) -> None:
    """Write a contact sheet: the source face, then eight styles and places; one row a person."""
    measures, generator = Measures(assets), Generator(assets, ip_scale)
    rows = []
    for number in range(6):
        face = source_face(measures, number)
        if face is None:
            continue
        scenes = [
            Scene(style, PLACE_NAMES[(index + number) % 8], ACTION_NAMES[(index + number) % 6])
            for index, style in enumerate(STYLE_NAMES)
        ]
        prompts = [canonical_prompt(scene) for scene in scenes]
        pictures = generator(prompts, [(face[2], face[3])] * len(scenes), seed, steps)
        source = np.asarray(Image.fromarray(face[0]).resize((96, 96), Image.Resampling.LANCZOS))
        rows.append(np.concatenate([source, *pictures], axis=1))
    whole = Image.fromarray(np.concatenate(rows))
    whole.resize((whole.width * 2, whole.height * 2), Image.Resampling.NEAREST).save(path)


def main() -> None:
    """Print the measurements as JSON and write the sheet if one is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=512)
    parser.add_argument("--ip-scale", type=float, default=0.8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sheet", type=Path)
    a = parser.parse_args()
    torch.set_num_threads(1)
    if a.sheet:
        sheet(a.assets, a.sheet, a.ip_scale, a.steps, a.seed)
    if a.pairs:
        print(json.dumps(measure(a.assets, a.pairs, a.ip_scale, a.steps, a.seed), indent=2))


if __name__ == "__main__":
    main()
