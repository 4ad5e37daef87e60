"""The mini model's data: drawn people whom no network has seen, in every style and place."""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fastface_trt.evaluation.data import SEED, Dataset, Pair
from fastface_trt.mini.identity import sample_identity
from fastface_trt.mini.prompts import (
    ACTION_NAMES,
    PLACE_NAMES,
    STYLE_NAMES,
    Scene,
    canonical_prompt,
)
from fastface_trt.mini.scene import draw_portrait

POPULATION = "evaluation"
"""A stream of people that no training draws from."""

PEOPLE = 50
ALL_PAIRS = PEOPLE * len(STYLE_NAMES) * len(PLACE_NAMES)


def mini_dataset(count: int | None) -> Dataset:
    """Every style and place equally often, people and actions in turn; None: 3,200 pairs."""
    pairs = make_pairs(ALL_PAIRS if count is None else count)
    shown = {pair.person for pair in pairs}
    people = {
        name: photo
        for name, photo in zip(map(person_name, range(PEOPLE)), draw_people(PEOPLE), strict=True)
        if name in shown
    }
    return Dataset("mini", people, pairs, {name: f"the drawn {name}" for name in people})


def person_name(number: int) -> str:
    """What the drawn person `number` is called."""
    return f"person-{number:02d}"


def make_pairs(count: int) -> list[Pair]:
    """`count` pairs; the noise of each has a seed of its own."""
    scenes = [(style, place) for style in STYLE_NAMES for place in PLACE_NAMES]
    rng = np.random.default_rng(SEED)
    order = np.concatenate([rng.permutation(len(scenes)) for _ in range(count // len(scenes) + 1)])
    pairs = []
    for index in range(count):
        style, place = scenes[order[index]]
        scene = Scene(style, place, ACTION_NAMES[rng.integers(len(ACTION_NAMES))])
        pair = Pair(index, person_name(index % PEOPLE), canonical_prompt(scene), SEED + index)
        pairs.append(replace(pair, scene=scene))
    return pairs


def draw_people(count: int) -> list[NDArray[np.uint8]]:
    """Source photos of people whom no network has seen, RGB uint8 [H,W,3]."""
    pictures = []
    for person in range(count):
        scene = Scene("photo", PLACE_NAMES[person % len(PLACE_NAMES)], "smiling")
        identity = sample_identity(person, population=POPULATION)
        picture, _ = draw_portrait(identity, scene, SEED + person)
        pictures.append(np.asarray(picture))
    return pictures
