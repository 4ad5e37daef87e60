"""Draw a person's head and shoulders: flat, bold shapes in local coordinates.

The local origin is the centre of the face, one unit is half the face's height, y points down.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fastface_trt.mini.hair import draw_back_hair, draw_front_hair
from fastface_trt.mini.identity import Identity
from fastface_trt.mini.pen import Colour, Floats, Pen, ellipse_points, shade

EYE_Y = -0.10
MOUTH_Y = 0.60
WHITE: Colour = (250, 250, 248)
DARK: Colour = (34, 24, 28)


@dataclass(frozen=True)
class Expression:
    """What changes from picture to picture: mouth and eyes by action, gaze by seed."""

    mouth: str = "smile"
    wink: bool = False
    gaze: float = 0.0
    lift: float = 0.0


EXPRESSIONS: dict[str, Expression] = {
    "smiling": Expression("smile"),
    "laughing": Expression("laugh", lift=0.03),
    "winking": Expression("smile", wink=True),
    "waving": Expression("calm"),
    "balloon": Expression("calm"),
    "singing": Expression("round", lift=0.03),
}


def face_outline(person: Identity, count: int = 40) -> Floats:
    """Return the contour of the face [2 * count, 2], clockwise from the top."""
    y = -np.cos(np.linspace(0, np.pi, count))
    upper = np.sqrt(np.maximum(0, 1 - np.abs(np.minimum(y, 0)) ** 2.3))
    power = 1.9 + 1.9 * person.jaw
    lower = np.maximum(0, 1 - np.maximum(y, 0) ** power) ** (0.62 - 0.14 * person.jaw)
    width = person.face_width * np.where(y < 0, upper, lower)
    right = np.stack([width, y], axis=1)
    left = np.stack([-width[::-1], y[::-1]], axis=1)
    outline: Floats = np.concatenate([right, left])
    return outline


def key_points(person: Identity) -> npt.NDArray[np.float64]:
    """Return the five local key points [5, 2]: left eye, right eye, nose, mouth corners.

    Left and right are the viewer's, as in InsightFace's alignment template.
    """
    e, m = person.eye_spacing, person.mouth_width
    nose = EYE_Y + 0.10 + person.nose_length
    return np.array([[-e, EYE_Y], [e, EYE_Y], [0, nose], [-m, MOUTH_Y], [m, MOUTH_Y]])


def _body(pen: Pen, person: Identity, clothes: Colour) -> None:
    neck = shade(person.skin, 0.80)
    pen.polygon([(-0.30, 0.6), (0.30, 0.6), (0.34, 1.30), (-0.34, 1.30)], neck)
    shoulders = ellipse_points(0, 2.35, 1.45, 1.22, np.pi, 2 * np.pi, 30)
    pen.polygon(shoulders, clothes)
    pen.polygon([(-0.36, 1.16), (0.36, 1.16), (0.0, 1.55)], neck)
    pen.stroke([(-0.40, 1.14), (0.0, 1.60), (0.40, 1.14)], shade(clothes, 0.72), 0.09)


def _ears(pen: Pen, person: Identity) -> None:
    for side in (-1, 1):
        x = side * (person.face_width + 0.02)
        size = person.ear_size
        pen.ellipse(x, 0.02, size * 0.72, size * 1.2, shade(person.skin, 0.93))
        pen.ellipse(x, 0.02, size * 0.34, size * 0.7, shade(person.skin, 0.76), False)
        if person.earrings:
            pen.ellipse(x + side * 0.02, 0.06 + size * 1.35, 0.075, 0.075, (250, 206, 70))


def _head(pen: Pen, person: Identity) -> None:
    outline = face_outline(person)
    pen.polygon(outline, shade(person.skin, 0.84))
    # A lighter copy pulled to the upper left leaves a crescent of shade on the other side.
    left = np.array([-person.face_width, -0.35])
    pen.polygon((outline - left) * np.array([0.89, 0.94]) + left, person.skin, False)
    if person.blush > 0:
        cheek = tuple(
            int(c * (1 - person.blush) + b * person.blush)
            for c, b in zip(person.skin, (255, 60, 90), strict=True)
        )
        for side in (-1, 1):
            pen.ellipse(side * 0.44, 0.30, 0.17, 0.12, (cheek[0], cheek[1], cheek[2]), False)
    if person.freckles:
        for x, y in ((0.26, 0.2), (0.40, 0.17), (0.33, 0.3), (0.49, 0.28), (0.20, 0.31)):
            for side in (-1, 1):
                pen.ellipse(side * x, y, 0.028, 0.028, shade(person.skin, 0.66), False)


def _beard(pen: Pen, person: Identity) -> None:
    colour = shade(person.hair_colour, 0.88)
    if person.beard == "full":
        outline = face_outline(person)
        low = outline[outline[:, 1] > 0.14] * 1.035
        inner = ellipse_points(0, 0.16, person.face_width * 0.74, 0.27, 0, np.pi, 16)
        order = np.concatenate([low, inner[::-1]])
        pen.polygon(order, colour)
        pen.ellipse(
            0, MOUTH_Y + 0.02, person.mouth_width + 0.05, 0.14, shade(person.skin, 0.9), False
        )
    elif person.beard == "goatee":
        pen.polygon(ellipse_points(0, 0.88, 0.23, 0.19), colour)


def _moustache(pen: Pen, person: Identity) -> None:
    if person.beard not in ("moustache", "full"):
        return
    colour = shade(person.hair_colour, 0.80)
    m = person.mouth_width
    y = MOUTH_Y - 0.09
    points = [(0, y - 0.09), (m, y - 0.03), (m + 0.10, y + 0.08), (0, y + 0.03)]
    mirrored = [(-x, v) for x, v in reversed(points)]
    pen.polygon([*points, *mirrored], colour, False)


def _eye(pen: Pen, person: Identity, side: int, face: Expression) -> None:
    x, size = side * person.eye_spacing, person.eye_size
    tilt = side * person.eye_slant
    if face.wink and side > 0:
        arc = ellipse_points(x, EYE_Y - 0.02, size, size * 0.5, 0.1, np.pi - 0.1, 12)
        pen.stroke(arc, DARK, 0.06)
        return
    height = size * person.eye_open
    pen.ellipse(x, EYE_Y, size * 1.12, height * 1.2, DARK, False, tilt)
    pen.ellipse(x, EYE_Y + 0.025, size, height, WHITE, False, tilt)
    iris = min(size * 0.66, height * 0.92)
    gaze = x + face.gaze * 0.03
    pen.ellipse(gaze, EYE_Y + 0.01, iris, iris, person.iris, False)
    pen.ellipse(gaze, EYE_Y + 0.01, iris * 0.52, iris * 0.52, (16, 12, 16), False)
    pen.ellipse(gaze - iris * 0.35, EYE_Y - iris * 0.35, iris * 0.27, iris * 0.27, WHITE, False)


def _brow(pen: Pen, person: Identity, side: int, face: Expression) -> None:
    y = EYE_Y - person.brow_height - face.lift
    rise = person.brow_angle * 0.2
    x = person.eye_spacing
    points = [(side * (x - 0.17), y + rise), (side * x, y - 0.03), (side * (x + 0.19), y - rise)]
    brow = (120, 104, 96) if person.hair_style == "bald" else shade(person.hair_colour, 0.74)
    pen.stroke(points, brow, person.brow_thickness)


def _nose(pen: Pen, person: Identity) -> None:
    tip = EYE_Y + 0.10 + person.nose_length
    width = person.nose_width
    dark = shade(person.skin, 0.70)
    pen.polygon(
        [(0.02, EYE_Y + 0.08), (width * 0.75, tip), (0.0, tip)], shade(person.skin, 0.86), False
    )
    arc = ellipse_points(0, tip - 0.01, width, 0.075, 0.15, np.pi - 0.15, 12)
    pen.stroke(arc, dark, 0.055)
    pen.ellipse(-0.03, tip - 0.07, 0.045, 0.05, shade(person.skin, 1.35), False)


def _mouth(pen: Pen, person: Identity, face: Expression) -> None:
    m, lip = person.mouth_width, person.lip_thickness
    y = MOUTH_Y
    if face.mouth == "laugh":
        mouth = ellipse_points(0, y - 0.04, m * 1.08, 0.27, 0, np.pi, 18)
        pen.polygon(mouth, (112, 24, 34))
        pen.polygon(
            [
                (-m * 0.95, y - 0.03),
                (m * 0.95, y - 0.03),
                (m * 0.8, y + 0.055),
                (-m * 0.8, y + 0.055),
            ],
            WHITE,
            False,
        )
        pen.stroke(np.concatenate([mouth, mouth[:1]]), person.lip, lip * 0.8)
        return
    if face.mouth == "round":
        pen.ellipse(0, y + 0.03, m * 0.52 + lip, 0.16 + lip * 0.6, person.lip)
        pen.ellipse(0, y + 0.03, m * 0.52, 0.13, (96, 22, 32), False)
        return
    depth = 0.13 if face.mouth == "smile" else 0.03
    arc = ellipse_points(0, y - 0.02, m, depth, 0, np.pi, 18)
    pen.stroke(arc, person.lip, lip * 1.35)
    pen.stroke(arc, shade(person.lip, 0.5), 0.03)


def _glasses(pen: Pen, person: Identity) -> None:
    if person.glasses == "none":
        return
    colour = person.glasses_colour
    x, radius = person.eye_spacing, person.eye_spacing * 0.80
    for side in (-1, 1):
        if person.glasses == "round":
            rim = ellipse_points(side * x, EYE_Y + 0.02, radius, radius * 0.95)
        else:
            r, h = radius, radius * 0.70
            corners = np.array([(-r, -h), (r, -h), (r * 0.9, h), (-r * 0.9, h)])
            rim = corners + np.array([side * x, EYE_Y + 0.02])
        pen.stroke(np.concatenate([rim, rim[:2]]), colour, 0.065)
        arm = [(side * (x + radius), EYE_Y - 0.04), (side * person.face_width, EYE_Y - 0.06)]
        pen.stroke(arm, colour, 0.065)
    pen.stroke([(-(x - radius), EYE_Y), (x - radius, EYE_Y)], colour, 0.065)


def _hand(pen: Pen, person: Identity) -> None:
    skin = person.skin
    x, y = 1.36, 0.62
    pen.stroke([(x + 0.05, 2.3), (x, y + 0.15)], shade(skin, 0.84), 0.30)
    for number, angle in enumerate((-2.15, -1.8, -1.5, -1.2)):
        length = (0.42, 0.52, 0.52, 0.42)[number]
        tip = (x + length * np.cos(angle), y + length * np.sin(angle))
        pen.stroke([(x + 0.17 * np.cos(angle), y), tip], skin, 0.13)
    pen.stroke([(x - 0.1, y + 0.08), (x - 0.42, y - 0.1)], skin, 0.13)
    pen.ellipse(x, y + 0.02, 0.23, 0.24, skin)


def _balloon(pen: Pen) -> None:
    pen.stroke([(-1.32, -0.45), (-1.22, 0.6), (-1.34, 1.9)], (240, 240, 240), 0.05)
    pen.polygon([(-1.32, -0.55), (-1.20, -0.36), (-1.44, -0.36)], (190, 30, 50))
    pen.ellipse(-1.32, -0.98, 0.40, 0.48, (228, 44, 62))
    pen.ellipse(-1.45, -1.15, 0.10, 0.14, (255, 150, 160), False)


def _notes(pen: Pen) -> None:
    for x, y in ((1.18, 0.10), (1.42, -0.62)):
        pen.stroke([(x + 0.13, y), (x + 0.13, y - 0.46)], DARK, 0.065)
        pen.stroke([(x + 0.13, y - 0.46), (x + 0.32, y - 0.34)], DARK, 0.09)
        pen.ellipse(x, y, 0.16, 0.12, DARK, False, -0.3)


def draw_person(pen: Pen, person: Identity, action: str, clothes: Colour, gaze: float) -> None:
    """Draw a person with head and shoulders, and what belongs to the action.

    Args:
        pen: pen whose frame sits at the face's centre.
        person: who.
        action: one of `prompts.ACTION_NAMES`.
        clothes: colour of the clothes.
        gaze: where the eyes look, -1 (left) to 1 (right).
    """
    base = EXPRESSIONS[action]
    face = Expression(base.mouth, base.wink, gaze, base.lift)
    if action == "balloon":
        _balloon(pen)
    draw_back_hair(pen, person)
    _body(pen, person, clothes)
    _ears(pen, person)
    _head(pen, person)
    _beard(pen, person)
    for side in (-1, 1):
        _eye(pen, person, side, face)
        _brow(pen, person, side, face)
    _nose(pen, person)
    _mouth(pen, person, face)
    _moustache(pen, person)
    draw_front_hair(pen, person)
    _glasses(pen, person)
    if action == "waving":
        _hand(pen, person)
    if action == "singing":
        _notes(pen)
