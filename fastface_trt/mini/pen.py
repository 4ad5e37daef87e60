"""A pen: filled shapes and strokes in local coordinates on a Pillow image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

Floats = npt.NDArray[np.float64]
Colour = tuple[int, int, int]
Points = Sequence[tuple[float, float]] | Floats


@dataclass(frozen=True)
class Frame:
    """A similarity transform from local coordinates (y down) to pixels.

    Attributes:
        x, y: pixel position of the local origin.
        unit: pixels per local unit.
        angle: clockwise rotation in radians.
    """

    x: float
    y: float
    unit: float
    angle: float = 0.0

    def map(self, points: Points) -> Floats:
        """Map local points [n, 2] to pixels [n, 2]."""
        local = np.asarray(points, dtype=np.float64).reshape(-1, 2)
        cosine, sine = np.cos(self.angle), np.sin(self.angle)
        rotation = np.array([[cosine, sine], [-sine, cosine]])
        mapped: Floats = local @ rotation * self.unit + np.array([self.x, self.y])
        return mapped


class Pen:
    """Draws on `image`; with `outline` set, every shape gets a dark contour."""

    def __init__(self, image: Image.Image, frame: Frame, outline: float = 0.0) -> None:
        self.frame = frame
        self.outline = outline
        self.ink: Colour = (26, 20, 28)
        self._draw = ImageDraw.Draw(image)

    def polygon(self, points: Points, fill: Colour, contour: bool = True) -> None:
        """Fill the closed polygon `points` [n, 2]."""
        mapped = [tuple(point) for point in self.frame.map(points).tolist()]
        self._draw.polygon(mapped, fill=fill)
        if contour and self.outline > 0:
            width = max(1, round(self.outline * self.frame.unit))
            self._draw.line([*mapped, mapped[0], mapped[1]], self.ink, width, joint="curve")

    def ellipse(
        self,
        x: float,
        y: float,
        radius_x: float,
        radius_y: float,
        fill: Colour,
        contour: bool = True,
        angle: float = 0.0,
    ) -> None:
        """Fill an ellipse with centre (x, y)."""
        self.polygon(ellipse_points(x, y, radius_x, radius_y, angle=angle), fill, contour)

    def stroke(self, points: Points, fill: Colour, width: float) -> None:
        """Stroke the open line `points` [n, 2] with a round-ended line of local `width`."""
        mapped = [tuple(point) for point in self.frame.map(points).tolist()]
        pixels = max(1, round(width * self.frame.unit))
        self._draw.line(mapped, fill, pixels, joint="curve")
        radius = pixels / 2
        for x, y in (mapped[0], mapped[-1]):
            self._draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)


def ellipse_points(
    x: float,
    y: float,
    radius_x: float,
    radius_y: float,
    start: float = 0.0,
    stop: float = 2 * np.pi,
    count: int = 28,
    angle: float = 0.0,
) -> Floats:
    """Return [count, 2] points of an elliptic arc, clockwise on screen from `start` radians."""
    turn = np.linspace(start, stop, count, endpoint=stop - start < 2 * np.pi - 1e-6)
    offsets = np.stack([radius_x * np.cos(turn), radius_y * np.sin(turn)], axis=1)
    cosine, sine = np.cos(angle), np.sin(angle)
    points: Floats = offsets @ np.array([[cosine, sine], [-sine, cosine]]) + np.array([x, y])
    return points


def shade(colour: Colour, factor: float) -> Colour:
    """Return `colour` made darker (factor < 1) or lighter (factor > 1, toward white)."""
    values = np.asarray(colour, dtype=np.float64)
    values = values * factor if factor <= 1 else 255 - (255 - values) / factor
    return int(values[0]), int(values[1]), int(values[2])
