"""Styles: eight ways to render a drawn portrait, each clearly different, none hiding the face.

Styles work on pictures as float32 [h, w, 3] in 0..1.  Textures are the same in every picture of one
size: a network learns a constant pattern at once, fresh noise never.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

Picture = npt.NDArray[np.floating[Any]]

BASE_SIZE = 96
#: Width of contours in units of half the face's height (person) by style.
OUTLINES: dict[str, float] = {"comic": 0.075, "pencil": 0.055, "pixel": 0.055, "watercolor": 0.03}


def _to_image(picture: Picture) -> Image.Image:
    return Image.fromarray((np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8))


def _to_picture(image: Image.Image) -> Picture:
    return np.asarray(image, dtype=np.float32) / 255


def _blur(picture: Picture, radius: float) -> Picture:
    return _to_picture(_to_image(picture).filter(ImageFilter.GaussianBlur(radius)))


def _grey(picture: Picture) -> Picture:
    grey: Picture = picture @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    return grey


def _saturate(picture: Picture, amount: float) -> Picture:
    grey = _grey(picture)[..., None]
    return np.clip(grey + (picture - grey) * amount, 0, 1)


@lru_cache(maxsize=16)
def _noise(size: int, radius_x: float, radius_y: float, seed: int) -> Picture:
    """Return smooth fixed noise [size, size] with mean 0 and standard deviation 1."""
    field = np.random.default_rng(seed).standard_normal((size, size))
    spectrum = np.fft.fft2(field)
    fy, fx = np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size)[None, :]
    scale = size / BASE_SIZE
    spectrum *= np.exp(-2 * (np.pi * scale) ** 2 * ((fx * radius_x) ** 2 + (fy * radius_y) ** 2))
    smooth = np.fft.ifft2(spectrum).real
    noise: Picture = ((smooth - smooth.mean()) / smooth.std()).astype(np.float32)
    return noise


@lru_cache(maxsize=16)
def _grid(size: int) -> tuple[Picture, Picture]:
    """Return x and y [size, size] in units of a 96-pixel picture's pixels."""
    axis = (np.arange(size, dtype=np.float32) + 0.5) * BASE_SIZE / size
    x, y = np.meshgrid(axis, axis)
    return x, y


@lru_cache(maxsize=4)
def _vignette(size: int) -> Picture:
    x, y = _grid(size)
    distance = np.hypot(x - 48, y - 46) / 68
    return (distance**2).astype(np.float32)[..., None]


def _photo(picture: Picture, mask: Picture) -> Picture:
    size = picture.shape[0]
    x, y = _grid(size)
    soft = _blur(picture, 1.1 * size / BASE_SIZE)
    picture = picture * mask + soft * (1 - mask)
    light = (1.18 - 0.0022 * x - 0.0016 * y)[..., None]
    return picture * light - 0.12 * _vignette(size)


def _watercolor(picture: Picture, mask: Picture) -> Picture:
    size = picture.shape[0]
    scale = size / BASE_SIZE
    wide = _blur(picture, 2.0 * scale)
    edges = np.abs(_grey(picture) - _grey(wide))[..., None]
    wash = picture * mask + _blur(picture, 1.2 * scale) * (1 - mask)
    wash = 1 - (1 - _saturate(wash, 1.15)) * (0.78 + 0.10 * _noise(size, 5, 5, 1))[..., None]
    wash = wash - 0.35 * edges
    x, y = _grid(size)
    border = np.minimum(np.minimum(x, 96 - x), np.minimum(y, 96 - y)) + 2.2 * _noise(size, 3, 3, 2)
    paint = np.clip((border - 5.0) / 2.5, 0, 1)[..., None]
    paper = np.array([0.985, 0.97, 0.935], dtype=np.float32)
    painted: Picture = wash * paint + paper * (1 - paint)
    return painted


def _pixel(picture: Picture, mask: Picture) -> Picture:
    size = picture.shape[0]
    small = _to_image(_saturate(picture, 1.35)).resize((48, 48), Image.Resampling.BOX)
    levels = np.round(_to_picture(small) * 5) / 5
    image = _to_image(levels).resize((size, size), Image.Resampling.NEAREST)
    return _to_picture(image)


def _pencil(picture: Picture, mask: Picture) -> Picture:
    size = picture.shape[0]
    scale = size / BASE_SIZE
    grey = _grey(picture)
    edge = np.clip((_grey(_blur(picture, 1.6 * scale)) - grey) * 3.2 - 0.10, 0, 1)
    x, y = _grid(size)
    hatch = 0.5 + 0.5 * np.sin((x + y) * (2 * np.pi / 5.5))
    cross = 0.5 + 0.5 * np.sin((x - y) * (2 * np.pi / 5.5))
    tone = np.clip((0.72 - grey) * 1.5, 0, 1) * (0.35 + 0.45 * hatch)
    tone = tone + np.clip((0.38 - grey) * 1.6, 0, 1) * (0.15 + 0.4 * cross)
    drawing = 1 - np.clip(0.75 * edge + tone * (0.75 + 0.25 * mask[..., 0]), 0, 0.86)
    paper = np.array([0.97, 0.965, 0.945], dtype=np.float32)
    drawn: Picture = drawing[..., None] * paper
    return drawn


def _comic(picture: Picture, mask: Picture) -> Picture:
    size = picture.shape[0]
    vivid = np.clip((_saturate(picture, 1.75) - 0.5) * 1.2 + 0.54, 0, 1)
    x, y = _grid(size)
    rows = np.floor(y / 3.0)
    dots = np.hypot((x + rows % 2 * 3.0) % 6.0 - 3.0, y % 3.0 - 1.5) < 1.25
    strength = 0.34 * dots[..., None] * (1 - mask)
    paint: Picture = (
        vivid * (1 - strength) + np.array([1.0, 1.0, 0.85], dtype=np.float32) * strength
    )
    return paint


def _noir(picture: Picture, mask: Picture) -> Picture:
    size = picture.shape[0]
    x, _y = _grid(size)
    grey = np.clip((_grey(picture) - 0.5) * 1.35 + 0.54, 0, 1)
    lamp = np.clip(1.30 - x / 100, 0.35, 1.15) * (1 - mask[..., 0])
    face = np.clip(1.28 - x / 150, 0.4, 1.2) * mask[..., 0]
    lit = grey * (0.80 * lamp + face) - 0.20 * _vignette(size)[..., 0]
    return np.repeat(np.clip(lit, 0, 1)[..., None], 3, axis=2)


def _neon(picture: Picture, mask: Picture) -> Picture:
    size = picture.shape[0]
    scale = size / BASE_SIZE
    grey = _grey(picture)[..., None]
    dark = np.array([0.06, 0.02, 0.20], dtype=np.float32)
    magenta = np.array([0.86, 0.10, 0.72], dtype=np.float32)
    cyan = np.array([0.35, 0.98, 1.0], dtype=np.float32)
    low, high = np.clip(grey * 2, 0, 1), np.clip(grey * 2 - 1, 0, 1)
    tone = (dark * (1 - low) + magenta * low) * (1 - high) + cyan * high
    background = tone * 0.72
    tint = np.array([0.88, 0.66, 1.08], dtype=np.float32)
    person = 0.72 * picture * tint + 0.22 * tone
    rim = np.clip(_blur(np.repeat(mask, 3, axis=2), 2.4 * scale), 0, 1)[..., :1]
    inside, outside = mask * (1 - rim) * 1.5, (1 - mask) * rim * 1.7
    x, _ = _grid(size)
    side = np.clip((x - 36) / 24, 0, 1)[..., None]
    glow = cyan * (1 - side) + np.array([1.0, 0.25, 0.70], dtype=np.float32) * side
    mixed = person * mask + background * (1 - mask)
    return mixed + glow * (0.75 * inside + outside)


def _oil(picture: Picture, mask: Picture) -> Picture:
    size = picture.shape[0]
    scale = size / BASE_SIZE
    width = 2 * round(scale) + 1
    dabs = _to_picture(_to_image(picture).filter(ImageFilter.MedianFilter(width)))
    dabs = picture * 0.45 * mask + dabs * (1 - 0.45 * mask)
    warm = np.clip(_saturate(dabs, 1.1) * np.array([1.02, 0.91, 0.70], dtype=np.float32), 0, 1)
    strokes = _noise(size, 3.5, 0.9, 3)[..., None]
    paint = warm * (0.93 + 0.075 * strokes) - 0.10 * _vignette(size) + 0.015
    x, y = _grid(size)
    border = np.minimum(np.minimum(x, 96 - x), np.minimum(y, 96 - y))
    gold = np.array([0.80, 0.60, 0.22], dtype=np.float32)
    bevel = (0.62 + 0.38 * np.sin(np.clip(border / 6.0, 0, 1) * np.pi))[..., None]
    frame = (border < 6.0)[..., None]
    return np.where(frame, gold * bevel, paint)


STYLE_FILTERS: dict[str, Callable[[Picture, Picture], Picture]] = {
    "photo": _photo,
    "watercolor": _watercolor,
    "pixel": _pixel,
    "pencil": _pencil,
    "comic": _comic,
    "noir": _noir,
    "neon": _neon,
    "oil": _oil,
}


def apply_style(name: str, image: Image.Image, mask: Image.Image) -> Image.Image:
    """Render a flat drawing in a style.

    Args:
        name: one of `prompts.STYLE_NAMES`.
        image: the flat drawing, RGB, square.
        mask: where the person is, mode L, same size.

    Returns:
        The rendered picture, RGB, same size.
    """
    person = _to_picture(mask)[..., None]
    return _to_image(STYLE_FILTERS[name](_to_picture(image), person))
