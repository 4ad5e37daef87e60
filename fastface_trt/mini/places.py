"""Places: bold backgrounds, told apart by colour and by shape.

Every place is drawn in a unit square (x to the right, y down).  The middle is hidden by the person,
so the cues stand at the sides and the top.  `shift` in [-1, 1] moves the scenery a little.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

from fastface_trt.mini.pen import Colour, Frame, Pen, ellipse_points, shade


def _gradient(size: int, top: Colour, bottom: Colour) -> Image.Image:
    weight = np.linspace(0, 1, size)[:, None]
    column = np.asarray(top) * (1 - weight) + np.asarray(bottom) * weight
    rows = np.repeat(column[:, None, :], size, axis=1)
    return Image.fromarray(rows.astype(np.uint8), "RGB")


def _forest(pen: Pen, shift: float) -> None:
    pen.polygon([(0, 0.72), (1, 0.72), (1, 1), (0, 1)], (60, 104, 48), False)
    for x, height, green in (
        (0.27, 0.62, (52, 128, 70)),
        (0.73, 0.62, (52, 128, 70)),
        (0.08, 0.80, (28, 92, 52)),
        (0.93, 0.80, (28, 92, 52)),
    ):
        x += 0.035 * shift
        base = 0.86
        pen.polygon(
            [
                (x - 0.025, base - 0.2),
                (x + 0.025, base - 0.2),
                (x + 0.025, base),
                (x - 0.025, base),
            ],
            (104, 66, 40),
        )
        for tier in range(3):
            top = base - height + tier * height * 0.24
            width = 0.075 + 0.035 * tier
            pen.polygon([(x, top), (x + width, top + 0.26), (x - width, top + 0.26)], green)


def _beach(pen: Pen, shift: float) -> None:
    pen.ellipse(0.83 + 0.03 * shift, 0.15, 0.085, 0.085, (255, 226, 88))
    pen.polygon([(0, 0.42), (1, 0.42), (1, 0.66), (0, 0.66)], (32, 150, 190), False)
    for y in (0.48, 0.56):
        for x in (0.30, 0.72, 0.9):
            pen.stroke([(x, y), (x + 0.1, y)], (160, 224, 232), 0.012)
    pen.polygon([(0, 0.64), (1, 0.66), (1, 1), (0, 1)], (244, 214, 148), False)
    pen.stroke([(0, 0.64), (1, 0.66)], (250, 250, 245), 0.025)
    x = 0.12 + 0.03 * shift
    pen.stroke([(x - 0.04, 0.86), (x - 0.01, 0.5), (x + 0.03, 0.24)], (136, 92, 52), 0.045)
    for angle in (-2.9, -2.3, -1.5, -0.8, -0.2, 0.5, 2.6):
        tip = (x + 0.03 + 0.2 * np.cos(angle), 0.23 + 0.15 * np.sin(angle) + 0.05)
        knee = (x + 0.03 + 0.11 * np.cos(angle), 0.19 + 0.12 * np.sin(angle))
        pen.polygon([(x + 0.03, 0.23), knee, tip, (knee[0], knee[1] + 0.05)], (38, 130, 62), False)


def _city(pen: Pen, shift: float) -> None:
    towers = (
        (0.20, 0.34, (70, 66, 110)),
        (0.62, 0.26, (70, 66, 110)),
        (-0.02, 0.16, (44, 42, 80)),
        (0.80, 0.10, (44, 42, 80)),
    )
    for left, top, colour in towers:
        x = left + 0.03 * shift
        pen.polygon([(x, top), (x + 0.21, top), (x + 0.21, 1), (x, 1)], colour)
        for row in range(7):
            for column in range(3):
                if (row * 3 + column * 5 + int(left * 50)) % 4 == 0:
                    continue
                wx, wy = x + 0.03 + 0.06 * column, top + 0.05 + 0.1 * row
                pen.polygon(
                    [(wx, wy), (wx + 0.035, wy), (wx + 0.035, wy + 0.055), (wx, wy + 0.055)],
                    (255, 218, 110),
                    False,
                )


def _mountains(pen: Pen, shift: float) -> None:
    for x, top, half, grey in (
        (0.52, 0.14, 0.42, (132, 148, 178)),
        (0.12, 0.20, 0.34, (96, 112, 148)),
        (0.90, 0.12, 0.36, (96, 112, 148)),
    ):
        x += 0.04 * shift
        pen.polygon([(x - half, 0.82), (x, top), (x + half, 0.82)], grey)
        cap = 0.30
        dy = (0.82 - top) * cap
        pen.polygon(
            [
                (x, top),
                (x + half * cap, top + dy),
                (x + half * 0.12, top + dy * 0.72),
                (x, top + dy * 1.1),
                (x - half * 0.13, top + dy * 0.72),
                (x - half * cap, top + dy),
            ],
            (250, 252, 255),
            False,
        )
    pen.polygon([(0, 0.78), (1, 0.78), (1, 1), (0, 1)], (118, 172, 84), False)


def _cactus(pen: Pen, x: float, base: float, height: float) -> None:
    green = (62, 134, 70)
    pen.stroke([(x, base), (x, base - height)], green, 0.065)
    pen.stroke([(x, base - height * 0.35), (x - 0.09, base - height * 0.4)], green, 0.04)
    pen.stroke([(x - 0.09, base - height * 0.4), (x - 0.09, base - height * 0.72)], green, 0.045)
    pen.stroke([(x, base - height * 0.5), (x + 0.085, base - height * 0.55)], green, 0.04)
    pen.stroke([(x + 0.085, base - height * 0.55), (x + 0.085, base - height * 0.85)], green, 0.045)


def _desert(pen: Pen, shift: float) -> None:
    pen.ellipse(0.20 + 0.04 * shift, 0.17, 0.11, 0.11, (255, 246, 200))
    dune = [(x, 0.60 + 0.07 * np.sin(5 * x + 1.2 * shift)) for x in np.linspace(0, 1, 24)]
    pen.polygon([*dune, (1, 1), (0, 1)], (226, 150, 74))
    near = [(x, 0.77 + 0.06 * np.sin(6 * x + 2.4 - shift)) for x in np.linspace(0, 1, 24)]
    pen.polygon([*near, (1, 1), (0, 1)], (198, 116, 56))
    _cactus(pen, 0.87 + 0.03 * shift, 0.78, 0.46)
    _cactus(pen, 0.12 + 0.03 * shift, 0.84, 0.30)


def _space(pen: Pen, shift: float) -> None:
    for number in range(34):
        x = (number * 0.618034 + 0.03 * shift) % 1
        y = (number * 0.414214 + 0.11) % 1
        radius = 0.006 + 0.008 * (number % 3 == 0)
        pen.ellipse(x, y, radius, radius, (250, 248, 230), False)
    x = 0.17 + 0.03 * shift
    pen.ellipse(x, 0.24, 0.19, 0.05, (240, 216, 160), False, -0.35)
    pen.ellipse(x, 0.24, 0.15, 0.03, (22, 20, 52), False, -0.35)
    pen.ellipse(x, 0.24, 0.105, 0.105, (226, 132, 72))
    pen.stroke(
        ellipse_points(x, 0.24, 0.175, 0.042, 0.15, 2.99, angle=-0.35), (240, 216, 160), 0.022
    )
    x = 0.87 + 0.03 * shift
    pen.ellipse(x, 0.52, 0.12, 0.12, (110, 150, 214))
    pen.ellipse(x - 0.03, 0.48, 0.035, 0.03, (72, 108, 172), False)
    pen.ellipse(x + 0.04, 0.56, 0.03, 0.025, (72, 108, 172), False)


def _library(pen: Pen, shift: float) -> None:
    spines: tuple[Colour, ...] = (
        (176, 48, 44),
        (38, 92, 130),
        (214, 168, 66),
        (52, 112, 70),
        (120, 60, 110),
        (226, 214, 186),
        (196, 100, 44),
    )
    for row in range(4):
        top = 0.015 + 0.25 * row
        x = -0.08 + 0.03 * shift
        book = row * 3
        while x < 1.0:
            width = 0.052 + 0.012 * ((book * 5) % 3)
            height = 0.17 + 0.018 * ((book * 7) % 3)
            left, foot = x + 0.004, top + 0.215
            pen.polygon(
                [
                    (left, foot - height),
                    (x + width, foot - height),
                    (x + width, foot),
                    (left, foot),
                ],
                spines[(book * 4 + row) % len(spines)],
            )
            x += width + 0.004
            book += 1
        shelf = top + 0.215
        pen.polygon(
            [(0, shelf), (1, shelf), (1, shelf + 0.035), (0, shelf + 0.035)], (140, 88, 48), False
        )


def _garden(pen: Pen, shift: float) -> None:
    pen.polygon([(0, 0.30), (1, 0.30), (1, 1), (0, 1)], (92, 166, 74), False)
    for x in np.linspace(0, 1, 9):
        pen.ellipse(x, 0.31, 0.075, 0.06, (72, 146, 64), False)
    petals: tuple[Colour, ...] = ((238, 82, 130), (250, 214, 70), (246, 246, 250), (196, 92, 214))
    places = (
        (0.08, 0.42), (0.25, 0.30), (0.91, 0.38), (0.74, 0.28), (0.10, 0.66), (0.90, 0.63),
        (0.22, 0.53), (0.78, 0.51), (0.05, 0.88), (0.95, 0.87),
    )  # fmt: skip
    for number, (x, y) in enumerate(places):
        x += 0.03 * shift
        pen.stroke([(x, y), (x, y + 0.13)], (44, 110, 48), 0.016)
        for angle in np.arange(5) * 2 * np.pi / 5 - np.pi / 2:
            centre = x + 0.042 * np.cos(angle), y + 0.042 * np.sin(angle)
            pen.ellipse(*centre, 0.034, 0.034, petals[number % 4], False)
        pen.ellipse(x, y, 0.026, 0.026, shade((250, 190, 50), 0.95), False)


_SKIES: dict[str, tuple[Colour, Colour]] = {
    "forest": ((206, 232, 190), (150, 196, 128)),
    "beach": ((116, 200, 242), (206, 236, 248)),
    "city": ((88, 70, 150), (240, 138, 120)),
    "mountains": ((96, 166, 230), (214, 234, 246)),
    "desert": ((250, 196, 96), (252, 228, 164)),
    "space": ((18, 16, 48), (48, 28, 88)),
    "library": ((84, 50, 30), (84, 50, 30)),
    "garden": ((150, 212, 244), (206, 236, 246)),
}
_SCENERY: dict[str, Callable[[Pen, float], None]] = {
    "forest": _forest,
    "beach": _beach,
    "city": _city,
    "mountains": _mountains,
    "desert": _desert,
    "space": _space,
    "library": _library,
    "garden": _garden,
}
CLOTHES: dict[str, Colour] = {
    "forest": (206, 92, 52),
    "beach": (238, 96, 92),
    "city": (232, 232, 238),
    "mountains": (198, 44, 56),
    "desert": (66, 130, 150),
    "space": (222, 226, 234),
    "library": (40, 72, 88),
    "garden": (84, 92, 176),
}


def draw_place(name: str, size: int, shift: float, outline: float = 0.0) -> Image.Image:
    """Draw a background.

    Args:
        name: one of `prompts.PLACE_NAMES`.
        size: width and height in pixels.
        shift: sideways displacement of the scenery in [-1, 1].
        outline: width of contours as a fraction of `size`; 0 for none.

    Returns:
        An RGB picture of `size` × `size` pixels.
    """
    image = _gradient(size, *_SKIES[name])
    _SCENERY[name](Pen(image, Frame(0, 0, size), outline), shift)
    return image
