"""Identities: the lasting attributes of a drawn person.

All lengths are in units of half the face's height, so that an identity is independent of the
picture's size.  Colours are RGB in 0..255.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

RGB = tuple[int, int, int]

SKIN_TONES: tuple[RGB, ...] = (
    (255, 224, 196),
    (244, 200, 164),
    (226, 172, 128),
    (196, 138, 94),
    (150, 98, 64),
    (104, 66, 46),
)
HAIR_COLOURS: tuple[RGB, ...] = (
    (38, 32, 36),
    (92, 54, 32),
    (150, 92, 44),
    (226, 184, 92),
    (196, 78, 36),
    (206, 204, 206),
    (222, 92, 146),
    (54, 138, 160),
)
IRIS_COLOURS: tuple[RGB, ...] = (
    (70, 42, 24),
    (50, 110, 190),
    (52, 140, 80),
    (120, 124, 134),
    (176, 118, 36),
)
LIP_COLOURS: tuple[RGB, ...] = ((206, 92, 92), (178, 52, 70), (150, 84, 74), (226, 128, 128))
GLASSES_COLOURS: tuple[RGB, ...] = ((30, 28, 34), (176, 40, 44), (198, 150, 50), (40, 80, 160))

HAIR_STYLES: tuple[str, ...] = (
    "bald",
    "short",
    "side_part",
    "curly",
    "long",
    "bob",
    "bun",
    "spiky",
)
BEARDS: tuple[str, ...] = ("none", "full", "goatee", "moustache")
GLASSES: tuple[str, ...] = ("none", "round", "square")


@dataclass(frozen=True)
class Identity:
    """One drawn person.  See the module's docstring for units."""

    skin: RGB
    face_width: float
    jaw: float
    hair_style: str
    hair_colour: RGB
    fringe: float
    iris: RGB
    eye_size: float
    eye_open: float
    eye_slant: float
    eye_spacing: float
    brow_thickness: float
    brow_angle: float
    brow_height: float
    nose_length: float
    nose_width: float
    mouth_width: float
    lip_thickness: float
    lip: RGB
    ear_size: float
    glasses: str
    glasses_colour: RGB
    beard: str
    freckles: bool
    earrings: bool
    blush: float


def _jitter(rng: np.random.Generator, colour: RGB, amount: float) -> RGB:
    """Return `colour` moved by at most `amount` per channel, mostly in brightness."""
    shift = rng.uniform(-amount, amount) + rng.uniform(-amount / 3, amount / 3, 3)
    values = np.clip(np.asarray(colour) + shift, 0, 255).astype(int)
    return int(values[0]), int(values[1]), int(values[2])


def _between(rng: np.random.Generator, colours: tuple[RGB, ...]) -> RGB:
    """Return a colour on the line through `colours`, every place on it as likely as another."""
    place = rng.uniform(0, len(colours) - 1)
    low = min(int(place), len(colours) - 2)
    weight = place - low
    mixed = np.asarray(colours[low]) * (1 - weight) + np.asarray(colours[low + 1]) * weight
    return int(mixed[0]), int(mixed[1]), int(mixed[2])


def _choice(rng: np.random.Generator, names: tuple[str, ...], weights: tuple[float, ...]) -> str:
    total = np.asarray(weights) / sum(weights)
    return names[int(rng.choice(len(names), p=total))]


def sample_identity(seed: int, population: str = "train") -> Identity:
    """Draw one identity.

    Args:
        seed: number of the person within the population.
        population: name of an independent stream of people; people of two populations differ.

    Returns:
        The person; the same arguments always give the same person.
    """
    stream = [ord(character) for character in population]
    rng = np.random.default_rng([seed, 7_919, *stream])
    hair_style = _choice(rng, HAIR_STYLES, (1.0, 1.4, 1.2, 1.2, 1.4, 1.2, 1.0, 1.0))
    bearded = 0.0 if hair_style in ("long", "bob", "bun") and rng.random() < 0.85 else 0.5
    beard = _choice(rng, BEARDS, (1 - bearded, bearded * 0.4, bearded * 0.3, bearded * 0.3))
    return Identity(
        skin=_jitter(rng, _between(rng, SKIN_TONES), 8),
        face_width=float(rng.uniform(0.68, 0.88)),
        jaw=float(rng.uniform(0, 1)),
        hair_style=hair_style,
        hair_colour=_jitter(rng, HAIR_COLOURS[rng.integers(len(HAIR_COLOURS))], 12),
        fringe=float(rng.uniform(0, 1)),
        iris=IRIS_COLOURS[rng.integers(len(IRIS_COLOURS))],
        eye_size=float(rng.uniform(0.145, 0.215)),
        eye_open=float(rng.uniform(0.55, 0.95)),
        eye_slant=float(rng.uniform(-0.22, 0.22)),
        eye_spacing=float(rng.uniform(0.31, 0.40)),
        brow_thickness=float(rng.uniform(0.035, 0.115)),
        brow_angle=float(rng.uniform(-0.30, 0.30)),
        brow_height=float(rng.uniform(0.24, 0.34)),
        nose_length=float(rng.uniform(0.22, 0.38)),
        nose_width=float(rng.uniform(0.09, 0.19)),
        mouth_width=float(rng.uniform(0.24, 0.37)),
        lip_thickness=float(rng.uniform(0.05, 0.11)),
        lip=LIP_COLOURS[rng.integers(len(LIP_COLOURS))],
        ear_size=float(rng.uniform(0.13, 0.21)),
        glasses=_choice(rng, GLASSES, (0.62, 0.19, 0.19)),
        glasses_colour=GLASSES_COLOURS[rng.integers(len(GLASSES_COLOURS))],
        beard=beard,
        freckles=bool(rng.random() < 0.2),
        earrings=bool(rng.random() < 0.25),
        blush=float(rng.choice([0.0, 0.0, 0.22])),
    )
