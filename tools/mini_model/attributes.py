"""Lasting attributes of drawn people as numbers, for training networks that read faces."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fastface_trt.mini.identity import BEARDS, GLASSES, HAIR_STYLES, Identity, sample_identity


def attributes(person: Identity) -> npt.NDArray[np.float32]:
    """Return a person's lasting attributes as numbers [42], roughly in -1..1."""
    colours = [*person.skin, *person.hair_colour, *person.iris, *person.lip]
    glasses_colour = person.glasses_colour if person.glasses != "none" else (128, 128, 128)
    colours.extend(glasses_colour)
    numbers = [
        (person.face_width - 0.78) / 0.06,
        person.jaw * 2 - 1,
        person.fringe * 2 - 1,
        (person.eye_size - 0.18) / 0.02,
        (person.eye_open - 0.75) / 0.12,
        person.eye_slant / 0.13,
        (person.eye_spacing - 0.355) / 0.026,
        (person.brow_thickness - 0.075) / 0.023,
        person.brow_angle / 0.17,
        (person.brow_height - 0.29) / 0.03,
        (person.nose_length - 0.30) / 0.046,
        (person.nose_width - 0.14) / 0.029,
        (person.mouth_width - 0.305) / 0.038,
        (person.lip_thickness - 0.08) / 0.017,
        float(person.freckles) * 2 - 1,
        float(person.earrings) * 2 - 1,
        person.blush * 8 - 1,
    ]
    for value, names in (
        (person.hair_style, HAIR_STYLES),
        (person.glasses, GLASSES),
        (person.beard, BEARDS),
    ):
        numbers.extend(2.0 * (value == name) for name in names)
    return np.array([*(np.array(colours) / 64 - 2), *numbers], dtype=np.float32)


def attribute_table(population: str, people: int) -> npt.NDArray[np.float32]:
    """Return the attributes [people, 42] of the first people of a population."""
    return np.stack([attributes(sample_identity(n, population)) for n in range(people)])
