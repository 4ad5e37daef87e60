"""Hair: what is behind the head and what lies on the forehead."""

from __future__ import annotations

import numpy as np

from fastface_trt.mini.identity import Identity
from fastface_trt.mini.pen import Floats, Pen, ellipse_points, shade


def draw_back_hair(pen: Pen, person: Identity) -> None:
    """Draw the hair behind head and neck."""
    colour = shade(person.hair_colour, 0.82)
    w = person.face_width
    style = person.hair_style
    if style == "long":
        top = ellipse_points(0, -0.20, w + 0.24, 1.0, np.pi, 2 * np.pi, 24)
        pen.polygon(
            [*top, (w + 0.34, 1.45), (w - 0.2, 1.62), (-w + 0.2, 1.62), (-w - 0.34, 1.45)], colour
        )
    elif style == "bob":
        top = ellipse_points(0, -0.15, w + 0.27, 1.02, np.pi, 2 * np.pi, 24)
        pen.polygon(
            [*top, (w + 0.33, 0.66), (w - 0.1, 0.80), (-w + 0.1, 0.80), (-w - 0.33, 0.66)], colour
        )
    elif style == "curly":
        for angle in np.linspace(np.pi * 0.93, np.pi * 2.07, 9):
            x, y = (w + 0.12) * np.cos(angle), -0.25 + 0.86 * np.sin(angle)
            pen.ellipse(float(x), float(y), 0.31, 0.31, colour)
    elif style == "bun":
        pen.ellipse(0, -1.18, 0.34, 0.30, colour)


def _cap(person: Identity, line: Floats, lift: float) -> Floats:
    """Return a closed shape between the skull, raised by `lift`, and the hair `line` [n, 2]."""
    skull = ellipse_points(0, -0.18, person.face_width + 0.06, 0.85 + lift, np.pi, 2 * np.pi, 24)
    shape: Floats = np.concatenate([skull, line])
    return shape


def draw_front_hair(pen: Pen, person: Identity) -> None:
    """Draw the hair on top of the head."""
    colour, w = person.hair_colour, person.face_width
    style = person.hair_style
    light = shade(colour, 1.35)
    edge = w + 0.06
    hairline = -0.60 + 0.14 * person.fringe
    if style == "bald":
        pen.ellipse(-0.25, -0.74, 0.16, 0.09, shade(person.skin, 1.5), False, -0.3)
        return
    if style == "short":
        line = [
            (edge, -0.12),
            (w * 0.86, -0.38),
            (w * 0.5, hairline),
            (-w * 0.5, hairline),
            (-w * 0.86, -0.38),
            (-edge, -0.12),
        ]
        pen.polygon(_cap(person, np.array(line), 0.08), colour)
    elif style == "side_part":
        line = [
            (edge, -0.05),
            (w * 0.90, -0.36),
            (w * 0.25, -0.46),
            (-w * 0.45, -0.74),
            (-w * 0.8, -0.42),
            (-edge, -0.10),
        ]
        pen.polygon(_cap(person, np.array(line), 0.20), colour)
        pen.stroke([(-w * 0.45, -0.76), (-w * 0.1, -1.0), (w * 0.3, -1.08)], light, 0.05)
    elif style == "curly":
        for x in np.linspace(-w * 0.82, w * 0.82, 5):
            y = -0.78 + 0.30 * (x / w) ** 2 + 0.10 * person.fringe
            pen.ellipse(float(x), float(y), 0.25, 0.22, colour)
        for x in (-0.35, 0.1, 0.45):
            pen.ellipse(x * w * 1.3, -0.92, 0.09, 0.06, light, False)
    elif style == "long":
        line = [
            (edge, 0.30),
            (w * 0.88, -0.10),
            (w * 0.5, -0.48),
            (0.0, -0.76),
            (-w * 0.5, -0.48),
            (-w * 0.88, -0.10),
            (-edge, 0.30),
        ]
        pen.polygon(_cap(person, np.array(line), 0.14), colour)
        pen.stroke([(0.0, -1.12), (0.0, -0.78)], shade(colour, 0.65), 0.045)
    elif style == "bob":
        low = -0.50 + 0.10 * person.fringe
        line = [
            (edge + 0.05, 0.25),
            (w * 0.87, 0.15),
            (w * 0.84, low),
            (-w * 0.84, low),
            (-w * 0.87, 0.15),
            (-edge - 0.05, 0.25),
        ]
        pen.polygon(_cap(person, np.array(line), 0.16), colour)
        pen.stroke([(-w * 0.5, -0.86), (0.0, -0.95), (w * 0.4, -0.88)], light, 0.055)
    elif style == "bun":
        line = [
            (edge, -0.05),
            (w * 0.84, -0.44),
            (0, -0.72 + 0.08 * person.fringe),
            (-w * 0.84, -0.44),
            (-edge, -0.05),
        ]
        pen.polygon(_cap(person, np.array(line), 0.06), colour)
    elif style == "spiky":
        spikes: list[tuple[float, float]] = []
        for number, angle in enumerate(np.linspace(np.pi, 2 * np.pi, 13)):
            reach = 1.28 if number % 2 else 0.92
            spikes.append(
                (float(edge * reach * 0.98 * np.cos(angle)), float(-0.22 + reach * np.sin(angle)))
            )
        line = [
            (w * 0.84, -0.40),
            (w * 0.3, hairline),
            (0, hairline - 0.1),
            (-w * 0.3, hairline),
            (-w * 0.84, -0.40),
        ]
        pen.polygon([*spikes, *line], colour)
