"""Independent judges: other seed, other people, other architecture than what they judge."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fastface_trt.mini.prompts import ACTION_NAMES, PLACE_NAMES, STYLE_NAMES

from .data import Portraits
from .face_models import export_onnx
from .layers import channels_last
from .loop import Schedule, train
from .recognition import Recogniser
from .vae import to_tensor

RECOGNITION = Schedule(steps=600, learning_rate=2e-3, warmup=100)
RECOGNITION_WIDTHS = (16, 40, 64, 112)
RECOGNITION_HIDDEN = 112
SCENE = Schedule(steps=300, learning_rate=2e-3, warmup=50)
BATCH = 64


class SceneJudge(nn.Module):
    """Strided convolutions without skips, unlike every network that is judged."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 64, 96)
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(widths):
            layers += [
                nn.Conv2d(inputs, outputs, 5, 2, 2),
                nn.BatchNorm2d(outputs),
                nn.LeakyReLU(0.1),
            ]
        self.body = nn.Sequential(*layers)
        self.style = nn.Linear(widths[-1] * 2, len(STYLE_NAMES))
        self.place = nn.Linear(widths[-1] * 9, len(PLACE_NAMES))

    def forward(self, picture: Tensor) -> tuple[Tensor, Tensor]:
        """Return style logits [n, 8] and place logits [n, 8] of pictures [n, 3, 96, 96]."""
        features = self.body(picture)
        mean, top = features.mean(dim=(2, 3)), features.flatten(2).amax(dim=2)
        grid = functional.avg_pool2d(features, 2).flatten(1)
        return self.style(torch.cat([mean, top], dim=1)), self.place(grid)


def train_scene_judge(portraits: Portraits, path: Path, seed: int) -> SceneJudge:
    """Train the judge of style and place on pictures it will never be asked about."""
    torch.manual_seed(seed)
    judge = channels_last(SceneJudge())

    def step_loss(step: int, rng: np.random.Generator) -> Tensor:
        rows = np.sort(rng.integers(len(portraits.pictures), size=BATCH))
        labels = torch.from_numpy(np.array(portraits.labels[rows]))
        picture = to_tensor(portraits.pictures[rows])
        if rng.random() < 0.5:
            low = functional.interpolate(
                picture, scale_factor=float(rng.uniform(0.5, 0.95)), mode="area"
            )
            picture = functional.interpolate(low, size=(96, 96), mode="bilinear")
        picture = picture * float(rng.uniform(0.85, 1.1)) + float(rng.uniform(-0.1, 0.1))
        picture = picture + torch.randn_like(picture) * float(rng.uniform(0, 0.1))
        style, place = judge(picture.contiguous(memory_format=torch.channels_last))
        return functional.cross_entropy(style, labels[:, 1]) + functional.cross_entropy(
            place, labels[:, 2]
        )

    train(judge, step_loss, SCENE, path, seed)
    return judge


def save_judges(recogniser: Recogniser, scene: SceneJudge, folder: Path) -> None:
    """Write both judges as ONNX and the names of their classes."""
    export_onnx(
        recogniser.eval(), torch.zeros(1, 3, 112, 112), folder / "recognition.onnx", ["embedding"]
    )
    export_onnx(scene.eval(), torch.zeros(1, 3, 96, 96), folder / "scene.onnx", ["style", "place"])
    labels = {
        "style": list(STYLE_NAMES),
        "place": list(PLACE_NAMES),
        "action": list(ACTION_NAMES),
        "recognition_input": "RGB, 112x112, aligned by five points, (x - 127.5) / 127.5",
        "scene_input": "RGB, 96x96, (x - 127.5) / 127.5",
    }
    (folder / "labels.json").write_text(json.dumps(labels, indent=2))
