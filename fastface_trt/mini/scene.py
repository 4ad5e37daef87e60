"""Whole pictures: people in front of a place, in a style, with the ground truth of their faces."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from fastface_trt.mini.identity import Identity
from fastface_trt.mini.pen import Frame, Pen
from fastface_trt.mini.places import CLOTHES, draw_place
from fastface_trt.mini.portrait import draw_person, face_outline, key_points
from fastface_trt.mini.prompts import Scene
from fastface_trt.mini.styles import OUTLINES, apply_style

PICTURE_SIZE = 96


@dataclass(frozen=True)
class Face:
    """Ground truth of one face, in pixels of the picture.

    Attributes:
        key_points: float32 [5, 2] as (x, y): left eye, right eye, nose, left and right corner
            of the mouth.
        box: float32 [4] as (x0, y0, x1, y1) around the face without hair.
    """

    key_points: npt.NDArray[np.float32]
    box: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Placement:
    """Where a face goes, in fractions of the picture's width; `tilt` in radians."""

    x: float
    y: float
    half_height: float
    tilt: float


_TILTS = {"waving": 0.06, "balloon": -0.06, "laughing": 0.0, "singing": 0.04, "winking": -0.08}


def sample_placement(rng: np.random.Generator, action: str) -> Placement:
    """Return a placement of a single portrait: centred, with a little play."""
    return Placement(
        x=0.5 + rng.uniform(-0.025, 0.025),
        y=0.50 + rng.uniform(-0.02, 0.02),
        half_height=0.268 + rng.uniform(-0.012, 0.012),
        tilt=_TILTS.get(action, 0.0) + rng.uniform(-0.05, 0.05),
    )


def draw_people(
    people: list[tuple[Identity, Placement]],
    scene: Scene,
    rng: np.random.Generator,
    size: int = PICTURE_SIZE,
    supersample: int = 3,
) -> tuple[Image.Image, list[Face]]:
    """Draw any number of people in one picture.

    Args:
        people: who stands where, back to front; may be empty.
        scene: style, place and action.
        rng: the source of the small differences between pictures of one scene.
        size: width and height of the picture in pixels.
        supersample: the drawing is made this many times larger and averaged.

    Returns:
        The RGB picture and one `Face` per person.
    """
    large = size * supersample
    outline = OUTLINES.get(scene.style, 0.0)
    image = draw_place(scene.place, large, float(rng.uniform(-1, 1)), outline * 0.2)
    mask = Image.new("L", (large, large), 0)
    layer = Image.new("RGBA", (large, large))
    gaze = float(rng.uniform(-1, 1))
    faces = []
    for person, place in people:
        frame = Frame(place.x * large, place.y * large, place.half_height * large, place.tilt)
        draw_person(Pen(layer, frame, outline), person, scene.action, CLOTHES[scene.place], gaze)
        points = frame.map(key_points(person)) / supersample
        contour = frame.map(face_outline(person)) / supersample
        box = np.concatenate([contour.min(axis=0), contour.max(axis=0)])
        faces.append(Face(points.astype(np.float32), box.astype(np.float32)))
    if people:
        mask = layer.getchannel("A")
        image.paste(layer.convert("RGB"), (0, 0), mask)
    if supersample > 1:
        image, mask = image.reduce(supersample), mask.reduce(supersample)
    return apply_style(scene.style, image, mask), faces


def draw_portrait(
    person: Identity, scene: Scene, seed: int, size: int = PICTURE_SIZE
) -> tuple[Image.Image, Face]:
    """Draw one person; the same arguments always give the same picture.

    Args:
        person: who.
        scene: style, place and action.
        seed: chooses placement, tilt, gaze and the scenery's shift.
        size: width and height in pixels.

    Returns:
        The RGB picture and the ground truth of its face.
    """
    rng = np.random.default_rng([seed, 104_729])
    placement = sample_placement(rng, scene.action)
    image, faces = draw_people([(person, placement)], scene, rng, size)
    return image, faces[0]
