"""`python -m tests.helpers.golden_pictures` writes the golden pictures, tests/golden/pictures.

They are what the mini model's published weights make in eager PyTorch: text and image encoders,
projection, UNet and VAE are the models of transformers, diffusers and `export.oracle`, the sampler
is diffusers' own, and guidance is Eq. 3 to 5 written out below with all three branches on every
step. No ONNX file, engine, or part of the runtime's loop takes part, but for finding the face, the
tokens of a prompt and the documented noise.

Shape legend: G = 3 branches (u, i, ti), C latent channels, h × w latent size.
"""

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler
from PIL import Image
from transformers import CLIPTokenizer

from fastface_trt.checkpoints import MINI
from fastface_trt.engines import contract
from fastface_trt.export.options import ExportOptions
from fastface_trt.export.oracle import TorchUNet
from fastface_trt.export.weights import CheckpointWeights
from fastface_trt.mini import folders
from fastface_trt.runtime.face import FaceAnalyzer, clip_pixels
from fastface_trt.runtime.images import load_picture
from fastface_trt.runtime.sampling import INITIAL_LATENTS, standard_noise

FOLDER = Path(__file__).parents[1] / "golden" / "pictures"
STEPS, SIDE, IP_ADAPTER_SCALE = 4, 96, 0.8
ONES = [1.0] * STEPS
GUIDED = {"alpha": [1.0, 1.5, 1.5, 1.0], "beta": [1.0, 3.0, 3.0, 1.0], "rescale": 0.75}
SCALE_POWER = {"kind": "scale_power", "power": 1.3}
SOFTMASK = {
    "kind": "softmask",
    "scale": [1.0, 1.55, 1.55, 1.55],
    "quantile": 0.65,
    "sharpness": [7.5, 5.0, 5.0, 5.0],
}

CASES = {
    "plain": ("ada", "photo; person in a garden, smiling", 11, {}),
    "dcg": ("bruno", "oil painting; person on a beach, waving", 12, GUIDED),
    "am1": (
        "chika",
        "comic book; person in a city, laughing",
        13,
        {"down": SCALE_POWER | {"scale": 1.55}, "up": SCALE_POWER | {"scale": 1.45}},
    ),
    "am2": (
        "dev",
        "film noir; person in a library, winking",
        14,
        dict.fromkeys(("down", "up"), SOFTMASK),
    ),
    "am1+dcg": (
        "elsa",
        "watercolor painting; person in a forest, smiling",
        15,
        GUIDED | {"down": SCALE_POWER | {"scale": 1.55}, "up": SCALE_POWER | {"scale": 1.45}},
    ),
    "am2+dcg": (
        "farid",
        "neon cyberpunk; person in space, singing",
        16,
        GUIDED | dict.fromkeys(("down", "up"), SOFTMASK | {"adain_weight": 0.7}),
    ),
}
"""Per preset: face, prompt, seed, and the paper's parameters as they are printed there."""


def at(value, step):
    return value[step] if isinstance(value, list) else value


def manipulation(case, step):
    """[1, parts, columns]: the parameter rows that the UNet module takes."""
    rows = np.zeros((1, len(contract.PARTS), len(contract.MANIPULATION_COLUMNS)), np.float32)
    defaults = {
        "scale": 1,
        "power": 1,
        "quantile": 0.65,
        "sharpness": 5,
        "adain_weight": 1,
        "invert_first_token": 1,
        "upper_bound": 10,
        "kind": "off",
    }
    for number, part in enumerate(contract.PARTS):
        given = defaults | case.get(part, {})
        given["kind"] = contract.KINDS.index(given["kind"])
        for column, name in enumerate(contract.MANIPULATION_COLUMNS):
            rows[0, number, column] = at(given[name], step)
    return rows


def guided(eps_GChw, case, step):
    """Eq. 3 to 5 for branches u, i and ti."""
    u, i, ti = eps_GChw.astype(np.float64)
    alpha, beta = (case.get(name, ONES)[step] for name in ("alpha", "beta"))
    combined = u + alpha * (i - u) + beta * (ti - i)
    if "rescale" in case:
        spread = (i.std(ddof=1) + ti.std(ddof=1)) / 2
        combined *= case["rescale"] * spread / combined.std(ddof=1) + 1 - case["rescale"]
    return combined


class Models:
    """All of the mini model in PyTorch."""

    def __init__(self):
        weights = CheckpointWeights(ExportOptions(MINI))
        self.tokenizers = [
            CLIPTokenizer.from_pretrained(folders.CHECKPOINT / name)
            for name in ("tokenizer", "tokenizer_2")
        ]
        self.encoders = [weights.text_encoder(name) for name in ("text_encoder", "text_encoder_2")]
        self.vision, self.projection = weights.image_encoder(), weights.projection().eval()
        self.normalisation = weights.image_normalisation()
        self.unet, self.vae = TorchUNet(weights.unet()), weights.vae()
        self.faces = FaceAnalyzer(folders.FACE_MODEL)

    def text(self, prompt):
        """Hidden states [77, C] of both encoders side by side, and the pooled text [P]."""
        hidden = []
        for tokenizer, encoder in zip(self.tokenizers, self.encoders, strict=True):
            ids = tokenizer(
                [prompt], padding="max_length", max_length=77, truncation=True, return_tensors="pt"
            ).input_ids
            out = encoder(ids, output_hidden_states=True)
            hidden.append(out.hidden_states[-2][0])
        return torch.cat(hidden, dim=-1).numpy(), out.text_embeds[0].numpy()

    def image_tokens(self, face):
        """[T, C] of a face, or of none."""
        size = self.vision.config.image_size
        mean, std = self.normalisation
        pixels = np.zeros((3, size, size), np.float32)
        embedding = np.zeros(512, np.float32)
        if face is not None:
            pixels = clip_pixels(face.crop_bgr, size=size, mean=mean, std=std)
            embedding = face.embedding
        seen = self.vision(torch.from_numpy(pixels[None]), output_hidden_states=True)
        return self.projection(torch.from_numpy(embedding[None]), seen.hidden_states[-2])[0].numpy()


@torch.no_grad()
def picture(models, name):
    """The golden picture of a preset, RGB uint8 [H,W,3]."""
    face_name, prompt, seed, case = CASES[name]
    face = models.faces.analyze(load_picture(folders.SAMPLE_FACES / f"{face_name}.png"))
    text, pooled = models.text(prompt)
    texts = np.stack([np.zeros_like(text), np.zeros_like(text), text])
    pooleds = np.stack([np.zeros_like(pooled), np.zeros_like(pooled), pooled])
    someone, nobody = models.image_tokens(face), models.image_tokens(None)
    config = {k: v for k, v in MINI.scheduler.items() if k != "class"}
    scheduler = DDIMScheduler.from_config(config)
    scheduler.set_timesteps(STEPS)
    side = SIDE // 4
    latents = torch.from_numpy(standard_noise(seed, 0, INITIAL_LATENTS, (4, side, side))).double()
    for step, t in enumerate(scheduler.timesteps):
        outputs = models.unet(
            **{
                contract.SAMPLE: np.stack([latents.float().numpy()] * 3),
                contract.TIMESTEP: np.full(3, float(t), np.float32),
                contract.TEXT: texts,
                contract.POOLED_TEXT: pooleds,
                contract.TIME_IDS: np.array([[SIDE, SIDE, 0, 0, SIDE, SIDE]] * 3, np.float32),
                contract.IMAGE_TOKENS: np.stack([nobody, someone, someone]),
                contract.IP_ADAPTER_SCALE: np.full((1, 3), IP_ADAPTER_SCALE, np.float32),
                contract.MANIPULATION: manipulation(case, step),
            }
        )
        eps = torch.from_numpy(guided(outputs[contract.NOISE_PREDICTION], case, step))
        latents = scheduler.step(eps, t, latents).prev_sample
    vae = models.vae
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    decoded = vae.decode(latents.float()[None] / vae.config.scaling_factor + shift).sample[0]
    unit = (decoded / 2 + 0.5).clamp(0, 1).numpy().transpose(1, 2, 0)
    return np.rint(unit * 255).astype(np.uint8)


def main():
    """Write a PNG per preset, and what each shows."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    models = Models()
    about = {}
    for name, (face, prompt, seed, _) in CASES.items():
        Image.fromarray(picture(models, name)).save(FOLDER / f"{name}.png")
        about[name] = {"face": face, "prompt": prompt, "seed": seed}
    (FOLDER / "cases.json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
