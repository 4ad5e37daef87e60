"""The drawing program: deterministic, varied where it should be, right about its key points."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fastface_trt.mini.identity import sample_identity
from fastface_trt.mini.prompts import (
    ACTION_NAMES,
    PLACE_NAMES,
    STYLE_NAMES,
    Scene,
    all_scenes,
    canonical_prompt,
    varied_prompt,
)
from fastface_trt.mini.scene import draw_people, draw_portrait

SCENE = Scene("photo", "forest", "smiling")


def _pixels(scene: Scene, person: int = 0, seed: int = 0, size: int = 96) -> np.ndarray:
    image, _ = draw_portrait(sample_identity(person), scene, seed, size)
    return np.asarray(image, dtype=np.float32)


def test_same_arguments_same_picture() -> None:
    assert np.array_equal(_pixels(SCENE, 3, 5), _pixels(SCENE, 3, 5))


def test_seed_and_person_change_the_picture() -> None:
    reference = _pixels(SCENE, 3, 5)
    assert np.abs(reference - _pixels(SCENE, 3, 6)).mean() > 1
    assert np.abs(reference - _pixels(SCENE, 4, 5)).mean() > 1


def test_populations_are_different_people() -> None:
    assert sample_identity(0, "train") == sample_identity(0, "train")
    assert sample_identity(0, "train") != sample_identity(0, "judge")


@pytest.mark.parametrize("part", ["style", "place"])
def test_styles_and_places_differ_more_than_seeds(part: str) -> None:
    names = STYLE_NAMES if part == "style" else PLACE_NAMES
    assert len(names) >= 8
    scenes = [
        Scene(n, "forest", "smiling") if part == "style" else Scene("photo", n, "smiling")
        for n in names
    ]
    pictures = [_pixels(scene) for scene in scenes]
    pairs = zip(scenes, pictures, strict=True)
    by_seed = np.mean([np.abs(_pixels(s, seed=1) - p).mean() for s, p in pairs])
    for first, second in itertools.combinations(pictures, 2):
        assert np.abs(first - second).mean() > by_seed


def test_key_points_sit_on_the_features() -> None:
    person = sample_identity(0)
    image, face = draw_portrait(person, Scene("photo", "library", "smiling"), 2, 192)
    pixels = np.asarray(image)
    for x, y in face.key_points[:2]:
        patch = pixels[round(y) - 1 : round(y) + 2, round(x) - 1 : round(x) + 2]
        assert patch.mean() < 90, "pupils are dark"
    x0, y0, x1, y1 = face.box
    assert ((face.key_points > (x0, y0)) & (face.key_points < (x1, y1))).all()
    assert 0.45 < (y1 - y0) / 192 < 0.60


def test_key_points_scale_with_the_picture() -> None:
    person = sample_identity(1)
    _, small = draw_portrait(person, SCENE, 4, 96)
    _, large = draw_portrait(person, SCENE, 4, 192)
    assert np.allclose(small.key_points * 2, large.key_points, atol=0.01)


def test_several_people_and_none() -> None:
    rng = np.random.default_rng(0)
    image, faces = draw_people([], SCENE, rng)
    assert image.size == (96, 96)
    assert faces == []


def test_prompts_name_their_scene() -> None:
    prompts = {canonical_prompt(scene) for scene in all_scenes()}
    assert len(prompts) == len(STYLE_NAMES) * len(PLACE_NAMES) * len(ACTION_NAMES)
    expected = "watercolor painting; person in a forest, waving"
    assert canonical_prompt(Scene("watercolor", "forest", "waving")) == expected
    rng = np.random.default_rng(0)
    assert len({varied_prompt(SCENE, rng) for _ in range(40)}) > 5
