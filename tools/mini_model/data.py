"""Training data: portraits drawn once and kept on disk as memory-mapped arrays.

A population lives in a folder of its own:

* ``pictures.npy`` uint8 [n, 96, 96, 3], ``points.npy`` float32 [n, 5, 2],
  ``labels.npy`` int64 [n, 4] (identity, style, place, action);
* ``sources.npy`` uint8 [m, 112, 112, 3]: aligned crops of photo-like pictures, as a user would
  hand them in, ``source_labels.npy`` int64 [m] (identity).
"""

from __future__ import annotations

import multiprocessing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from insightface.utils.face_align import norm_crop

from fastface_trt.mini.identity import sample_identity
from fastface_trt.mini.prompts import ACTION_NAMES, PLACE_NAMES, STYLE_NAMES, Scene
from fastface_trt.mini.scene import draw_portrait

from .files import save_array

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Population:
    """How many people to draw, and how often."""

    name: str
    identities: int
    pictures: int
    sources: int


TRAIN = Population("train", identities=5000, pictures=12, sources=2)
JUDGE = Population("judge", identities=1500, pictures=8, sources=1)


@dataclass(frozen=True)
class Portraits:
    """A population read from disk; the module's docstring names shapes and types."""

    pictures: Bytes
    points: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    sources: Bytes
    source_labels: npt.NDArray[np.int64]


def _draw_identity(job: tuple[str, int, int, int]) -> tuple[list[npt.NDArray[Any]], ...]:
    """Draw all pictures of one person; styles take turns so that every person has all of them."""
    population, number, pictures, sources = job
    person = sample_identity(number, population)
    rng = np.random.default_rng([number, len(population), 3])
    images, points, labels, crops = [], [], [], []
    for index in range(pictures):
        style = (index + number) % len(STYLE_NAMES)
        place = int(rng.integers(len(PLACE_NAMES)))
        action = int(rng.integers(len(ACTION_NAMES)))
        scene = Scene(STYLE_NAMES[style], PLACE_NAMES[place], ACTION_NAMES[action])
        image, face = draw_portrait(person, scene, int(rng.integers(2**31)))
        images.append(np.asarray(image))
        points.append(face.key_points)
        labels.append(np.array([number, style, place, action]))
    for index in range(sources):
        where = PLACE_NAMES[rng.integers(len(PLACE_NAMES))]
        doing = ACTION_NAMES[rng.integers(len(ACTION_NAMES))]
        size = (192, 96)[index % 2]
        image, face = draw_portrait(
            person, Scene("photo", where, doing), int(rng.integers(2**31)), size
        )
        # A detector is off by a fraction of a pixel; training must see that.
        noisy = face.key_points + rng.normal(0, 0.5 * size / 96, (5, 2))
        crops.append(norm_crop(np.asarray(image), noisy.astype(np.float32), 112))
    return images, points, labels, crops


def build_population(folder: Path, population: Population, workers: int = 2) -> Portraits:
    """Draw a population into `folder` unless it is there already, and open it."""
    if not (folder / "source_labels.npy").exists():
        folder.mkdir(parents=True, exist_ok=True)
        numbers = range(population.identities)
        jobs = [(population.name, n, population.pictures, population.sources) for n in numbers]
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            results = list(pool.imap(_draw_identity, jobs, chunksize=25))
        for column, name in enumerate(("pictures", "points", "labels", "sources")):
            array = np.stack([item for result in results for item in result[column]])
            save_array(folder / f"{name}.npy", array)
        save_array(
            folder / "source_labels.npy",
            np.repeat(np.arange(population.identities), population.sources),
        )
    return open_population(folder)


def open_population(folder: Path) -> Portraits:
    """Open a drawn population; arrays stay on disk until they are read."""
    names = ("pictures", "points", "labels", "sources", "source_labels")
    return Portraits(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in names))
