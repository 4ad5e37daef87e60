"""What the load is made of: few different pictures, so that every answer can be checked."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastface_trt import FastFace
from fastface_trt.mini.folders import SAMPLE_FACES

Pixels = NDArray[np.uint8]

PRESETS = ("plain", "dcg", "am1", "am1+dcg", "am2+dcg")
STEPS = (1, 2, 4)
PROMPTS = ("photo; person in a garden, smiling", "oil painting; person on a beach, smiling")
SHORT_DEADLINE = 0.25
"""Seconds; so little that some of those who ask for it will not be served in time."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture that clients ask for, and its pixels [H,W,3] as a single run makes it."""

    fields: dict[str, Any]
    pixels: Pixels

    def equals(self, encoded: str) -> bool:
        """Whether a PNG in base64 shows the same picture, but for one level of 255."""
        picture = Image.open(io.BytesIO(base64.b64decode(encoded)))
        shown = np.asarray(picture, dtype=np.int16)
        return shown.shape == self.pixels.shape and int(abs(shown - self.pixels).max()) <= 1


def face_file() -> bytes:
    """The face that all of them show."""
    return (SAMPLE_FACES / "ada.png").read_bytes()


def pictures(fastface: FastFace) -> list[Picture]:
    """One picture for every preset and number of steps, made by single runs."""
    made = []
    for index, (preset, steps) in enumerate((p, s) for p in PRESETS for s in STEPS):
        fields = {
            "prompt": PROMPTS[index % len(PROMPTS)],
            "preset": preset,
            "steps": steps,
            "seed": index,
        }
        result = fastface(
            fields["prompt"],
            face_file(),
            preset=preset,
            num_inference_steps=steps,
            seed=index,
        )
        made.append(Picture(fields, np.asarray(result.images[0])))
    return made


def bodies(
    made: Sequence[Picture], face_id: str, count: int, generator: np.random.Generator
) -> list[tuple[Picture, dict[str, Any]]]:
    """`count` request bodies, each with the picture it asks for; every tenth is in a hurry."""
    drawn = []
    for index in range(count):
        picture = made[generator.integers(len(made))]
        body = {**picture.fields, "face_id": face_id}
        if index % 10 == 9:
            body["deadline"] = SHORT_DEADLINE
        drawn.append((picture, body))
    return drawn
