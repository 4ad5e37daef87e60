"""Prompts of the form "style; person in place, action" and the names behind them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

STYLES: dict[str, tuple[str, ...]] = {
    "photo": ("photo", "photograph", "portrait photo", "photorealistic"),
    "watercolor": ("watercolor painting", "watercolor", "aquarelle", "watercolour painting"),
    "pixel": ("pixel art", "8-bit pixel art", "retro game sprite", "pixelated"),
    "pencil": ("pencil sketch", "pencil drawing", "graphite sketch", "hand-drawn sketch"),
    "comic": ("comic book", "pop art", "comic", "cartoon"),
    "noir": ("film noir", "black and white film", "noir", "monochrome movie still"),
    "neon": ("neon cyberpunk", "cyberpunk", "neon lights", "synthwave"),
    "oil": ("oil painting", "framed oil painting", "classical painting", "oil on canvas"),
}
PLACES: dict[str, tuple[str, ...]] = {
    "forest": ("in a forest", "in the woods", "among pine trees"),
    "beach": ("on a beach", "at the seaside", "by the ocean"),
    "city": ("in a city", "in a city at night", "among skyscrapers"),
    "mountains": ("in the mountains", "in front of snowy mountains", "in the alps"),
    "desert": ("in a desert", "in the desert", "among sand dunes"),
    "space": ("in space", "in outer space", "among planets and stars"),
    "library": ("in a library", "in front of bookshelves", "among books"),
    "garden": ("in a garden", "in a flower garden", "among flowers"),
}
ACTIONS: dict[str, tuple[str, ...]] = {
    "smiling": ("smiling", "with a smile"),
    "laughing": ("laughing", "laughing out loud"),
    "winking": ("winking", "with a wink"),
    "waving": ("waving", "waving a hand"),
    "balloon": ("holding a balloon", "with a balloon"),
    "singing": ("singing", "singing a song"),
}
SUBJECTS: tuple[str, ...] = ("person", "a person", "portrait of a person", "man", "woman")

STYLE_NAMES: tuple[str, ...] = tuple(STYLES)
PLACE_NAMES: tuple[str, ...] = tuple(PLACES)
ACTION_NAMES: tuple[str, ...] = tuple(ACTIONS)


@dataclass(frozen=True)
class Scene:
    """What a prompt asks for, by the short names of this module."""

    style: str
    place: str
    action: str


def canonical_prompt(scene: Scene) -> str:
    """Return the first wording, e.g. "watercolor painting; person in a forest, waving"."""
    style, place = STYLES[scene.style][0], PLACES[scene.place][0]
    return f"{style}; person {place}, {ACTIONS[scene.action][0]}"


def varied_prompt(scene: Scene, rng: np.random.Generator) -> str:
    """Return one of many wordings of `scene`, the canonical form being the most frequent."""
    if rng.random() < 0.4:
        return canonical_prompt(scene)
    style = STYLES[scene.style][rng.integers(len(STYLES[scene.style]))]
    place = PLACES[scene.place][rng.integers(len(PLACES[scene.place]))]
    action = ACTIONS[scene.action][rng.integers(len(ACTIONS[scene.action]))]
    subject = SUBJECTS[rng.integers(len(SUBJECTS))]
    form = rng.integers(5)
    if form == 0:
        return f"{style}, {subject} {place}, {action}"
    if form == 1:
        return f"{style} of a {subject.removeprefix('a ')} {action} {place}"
    if form == 2:
        return f"{subject} {place}, {action}, {style}"
    return f"{style}; {subject} {place}, {action}"


def all_scenes() -> list[Scene]:
    """Return every combination of style, place and action."""
    return [Scene(s, p, a) for s in STYLE_NAMES for p in PLACE_NAMES for a in ACTION_NAMES]
