"""A tiny face detector with SCRFD's output layout, for InsightFace's post-processing.

Nine outputs: scores, boxes and key points at strides 8, 16 and 32, two anchors per cell.  Cells
count in units of their stride from the picture's corner, as InsightFace decodes them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from fastface_trt.mini.identity import sample_identity
from fastface_trt.mini.prompts import ACTION_NAMES, PLACE_NAMES, STYLE_NAMES, Scene
from fastface_trt.mini.scene import Face, Placement, draw_people

from .layers import ConvBlock, ResidualBlock, channels_last
from .loop import Schedule, train

SCHEDULE = Schedule(steps=1100, learning_rate=2e-3, warmup=50, ema=0.99)
BATCH = 16
STRIDES = (8, 16, 32)
#: Longest side of a box, in input pixels, from which a level's second anchor and the next level
#: take over: stride 8 has faces up to 64 pixels, stride 16 up to 176, stride 32 all others.
LIMITS = ((0, 36, 64), (64, 110, 176), (176, 340, 100_000))
POOL = 4
#: Taken off the score's logit: InsightFace cuts at 0.5, faces score 0.9 and phantoms 0.55.
CALIBRATION = 0.6


class Head(nn.Module):
    """Scores, boxes and key points of one level."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = ConvBlock(width, 32)
        self.out = nn.Conv2d(32, 2 * 15, 1)
        self.scale = nn.Parameter(torch.ones(15))
        bias = torch.zeros(2 * 15)
        bias[[0, 15]] = -4.0
        self.out.bias = nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, width, h, w] to [n, h * w * 2, 15]: score logit, box, key points."""
        raw: Tensor = self.out(self.body(x)).permute(0, 2, 3, 1)
        return raw.reshape(raw.shape[0], -1, 15) * self.scale


class Detector(nn.Module):
    """Three levels over a picture that is first averaged by four: drawn faces are bold."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(ConvBlock(3, 16, 2), ConvBlock(16, 24))
        self.middle = nn.Sequential(ConvBlock(24, 48, 2), ResidualBlock(48))
        self.deep = nn.Sequential(ConvBlock(48, 64, 2), ResidualBlock(64), ResidualBlock(64))
        self.lateral = nn.Conv2d(64, 48, 1)
        self.lateral_fine = nn.Conv2d(48, 24, 1)
        self.heads = nn.ModuleList([Head(24), Head(48), Head(64)])

    def levels(self, pooled: Tensor) -> list[Tensor]:
        """Return raw predictions per level from a picture [n, 3, h, w] already averaged by four."""
        fine = self.stem(pooled)
        middle = self.middle(fine)
        deep = self.deep(middle)
        middle = middle + functional.interpolate(self.lateral(deep), scale_factor=2.0)
        fine = fine + functional.interpolate(self.lateral_fine(middle), scale_factor=2.0)
        return [head(x) for head, x in zip(self.heads, (fine, middle, deep), strict=True)]

    def forward(self, picture: Tensor) -> tuple[Tensor, ...]:
        """Return SCRFD's nine outputs for one picture [1, 3, h, w], h and w multiples of 32."""
        raw = [level[0] for level in self.levels(functional.avg_pool2d(picture, POOL))]
        return (
            *((level[:, :1] - CALIBRATION).sigmoid() for level in raw),
            *(level[:, 1:5].clamp(min=0) for level in raw),
            *(level[:, 5:] for level in raw),
        )


def targets(faces: list[Face], height: int, width: int) -> list[npt.NDArray[np.float32]]:
    """Return per level [h * w * 2, 16]: positive, box, key points in strides; last column ignore.

    Args:
        faces: ground truth in input pixels.
        height, width: of the input, in pixels.
    """
    result = []
    for stride, (low, split, high) in zip(STRIDES, LIMITS, strict=True):
        rows, columns = height // stride, width // stride
        grid = np.zeros((rows, columns, 2, 16), dtype=np.float32)
        y, x = np.mgrid[:rows, :columns].astype(np.float32) * stride
        for face in faces:
            x0, y0, x1, y1 = face.box
            side = max(x1 - x0, y1 - y0)
            inside = (x > x0) & (x < x1) & (y > y0) & (y < y1)
            reach = max(0.22 * side, 0.75 * stride)
            near = np.hypot(x - (x0 + x1) / 2, y - (y0 + y1) / 2) < reach
            mine = low <= side < high
            anchor = int(side >= split)
            # Around the centre, on other anchors and levels, a score is neither right nor wrong
            # when the size is close to the limit.
            close = low * 0.8 <= side < high * 1.25
            if close:
                grid[inside, :, 15] = 1
            if not mine:
                continue
            grid[near, anchor, 15] = 0
            box = np.stack([x - x0, y - y0, x1 - x, y1 - y], axis=-1) / stride
            points = (face.key_points[None, None] - np.stack([x, y], axis=-1)[:, :, None]) / stride
            grid[near, anchor, 0] = 1
            grid[near, anchor, 1:5] = box[near]
            grid[near, anchor, 5:15] = points.reshape(rows, columns, 10)[near]
        result.append(grid.reshape(-1, 16))
    return result


def sample_picture(rng: np.random.Generator, size: int) -> tuple[npt.NDArray[np.uint8], list[Face]]:
    """Draw zero to three people on a `size` x `size` picture; faces in the pixels of it."""
    count = int(rng.choice([0, 1, 1, 1, 1, 2, 3]))
    people = []
    for index in range(count):
        if count == 1:
            half = float(rng.uniform(0.08, 0.46))
            x, y = rng.uniform(0.5 - (0.5 - half) * 0.9, 0.5 + (0.5 - half) * 0.9, 2)
        else:
            half = float(rng.uniform(0.07, 0.40 / count))
            x = (index + 0.5) / count + rng.uniform(-0.04, 0.04)
            y = rng.uniform(half * 1.2, 1 - half * 1.3)
        person = sample_identity(int(rng.integers(1_000_000)), "detector")
        people.append(
            (person, Placement(float(x), float(y), half, float(rng.uniform(-0.25, 0.25))))
        )
    scene = Scene(
        STYLE_NAMES[rng.integers(len(STYLE_NAMES))],
        PLACE_NAMES[rng.integers(len(PLACE_NAMES))],
        ACTION_NAMES[rng.integers(len(ACTION_NAMES))],
    )
    image, faces = draw_people(people, scene, rng, size, supersample=2)
    return np.asarray(image), faces


def _batch(rng: np.random.Generator) -> tuple[Tensor, list[Tensor]]:
    """Return averaged inputs [n, 3, s, s] and targets per level; faces placed on 1/4 pixels."""
    side = int(rng.choice([80, 96, 112, 128, 144, 160]))
    pictures, grids = [], []
    for _ in range(BATCH):
        drawn = int(side * rng.choice([1.0, 1.0, 0.75]))
        image, faces = sample_picture(rng, drawn)
        canvas: npt.NDArray[Any] = np.zeros((side, side, 3), dtype=np.float32)
        canvas[:drawn, :drawn] = image
        if rng.random() < 0.4:
            small = torch.from_numpy(canvas).permute(2, 0, 1)[None]
            low = functional.interpolate(
                small, scale_factor=float(rng.uniform(0.4, 0.9)), mode="area"
            )
            back = functional.interpolate(low, size=(side, side), mode="bilinear")
            canvas = back[0].permute(1, 2, 0).numpy()
        canvas = canvas * rng.uniform(0.8, 1.15) + rng.normal(0, 4, canvas.shape)
        scaled = [Face(face.key_points * POOL, face.box * POOL) for face in faces]
        pictures.append(np.clip(canvas, 0, 255))
        grids.append(targets(scaled, side * POOL, side * POOL))
    values = torch.from_numpy(np.stack(pictures).astype(np.float32)).permute(0, 3, 1, 2)
    inputs = ((values - 127.5) / 128).contiguous(memory_format=torch.channels_last)
    return inputs, [torch.from_numpy(np.stack(level)) for level in zip(*grids, strict=True)]


def _loss(levels: list[Tensor], goals: list[Tensor]) -> Tensor:
    total = levels[0].new_zeros(())
    positives = sum(float(goal[..., 0].sum()) for goal in goals) + 1.0
    for raw, goal in zip(levels, goals, strict=True):
        raw = raw.float()
        score, wanted = raw[..., 0], goal[..., 0]
        probability = score.sigmoid()
        miss = torch.where(wanted > 0, 1 - probability, probability)
        entropy = functional.binary_cross_entropy_with_logits(score, wanted, reduction="none")
        balance = torch.where(wanted > 0, 0.4, 0.6)
        counted = (goal[..., 15] == 0).float()
        total = total + (balance * miss**2 * entropy * counted).sum() / positives
        there = wanted > 0
        if there.any():
            box = functional.smooth_l1_loss(
                raw[there][:, 1:5], goal[there][:, 1:5], reduction="none"
            )
            points = functional.smooth_l1_loss(
                raw[there][:, 5:], goal[there][:, 5:15], reduction="none", beta=0.1
            )
            total = total + (0.3 * box.sum() / 4 + 1.5 * points.sum() / 10) / positives
    return total


def train_detector(work: Path, seed: int) -> Detector:
    """Train the detector on pictures drawn on the fly."""
    torch.manual_seed(seed)
    detector = channels_last(Detector())

    def step_loss(step: int, rng: np.random.Generator) -> Tensor:
        inputs, goals = _batch(rng)
        with torch.autocast("cpu", torch.bfloat16):
            levels = detector.levels(inputs)
        return _loss(levels, goals)

    train(detector, step_loss, SCHEDULE, work / "detector.pt", seed)
    return detector
