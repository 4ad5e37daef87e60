"""The mini model's data and judges: drawn people that no network saw, in all styles and places.

The judges say who is on a picture, in which style and place. They were trained with other seeds, on
other people and in another architecture than the networks that made the pictures. They ship with
the mini model (`fastface_trt/mini/judges`). There is no face-area score (FCS): the scene judge was
trained on whole pictures, and a face's crop shows neither the place nor enough of the style for it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastface_trt.errors import InvalidRequest, NoFaceFound
from fastface_trt.evaluation.data import SEED, Dataset, Pair
from fastface_trt.evaluation.judges import (
    Column,
    FaceView,
    IdentityJudge,
    Judge,
    NoFaceJudge,
    OtherPeopleJudge,
    Sample,
)
from fastface_trt.mini.folders import FACE_MODEL, JUDGES
from fastface_trt.mini.identity import sample_identity
from fastface_trt.mini.prompts import (
    ACTION_NAMES,
    PLACE_NAMES,
    STYLE_NAMES,
    Scene,
    canonical_prompt,
)
from fastface_trt.mini.scene import draw_portrait
from fastface_trt.runtime.face import Face, FaceAnalyzer

POPULATION = "evaluation"
"""A stream of people that no training draws from."""

PEOPLE = 50
ALL_PAIRS = PEOPLE * len(STYLE_NAMES) * len(PLACE_NAMES)
SCENE_SIZE = 96
_SCENE_COLUMNS = (
    Column(
        name="clip",
        label="Prompt match",
        unit="probability",
        higher_is_better=True,
        what="Probability that the scene judge gives to the prompted style times that of the place",
    ),
    Column(
        name="style",
        label="Style read back",
        unit="share of pictures",
        higher_is_better=True,
        what="Pictures whose likeliest style is the prompted one",
    ),
    Column(
        name="place",
        label="Place read back",
        unit="share of pictures",
        higher_is_better=True,
        what="Pictures whose likeliest place is the prompted one",
    ),
)


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


@dataclass(frozen=True, slots=True)
class SceneView:
    """Probabilities of all styles and places on a picture, by name."""

    style: Mapping[str, float]
    place: Mapping[str, float]

    @property
    def best(self) -> tuple[str, str]:
        """The likeliest style and place."""
        return max(self.style, key=self.style.__getitem__), max(
            self.place, key=self.place.__getitem__
        )


class MiniNetworks:
    """The recogniser and the scene classifier, opened at once: they are small."""

    def __init__(self) -> None:
        self._labels = json.loads((JUDGES / "labels.json").read_text(encoding="utf-8"))
        self._recogniser = _session(JUDGES / "recognition.onnx")
        self._scene = _session(JUDGES / "scene.onnx")
        self.faces = FaceAnalyzer(FACE_MODEL)

    def embed(self, face: Face) -> NDArray[np.float32]:
        """The judge's own embedding of a face, [512] of length 1."""
        # The aligned crop at 224 is the recogniser's 112-pixel template at twice the scale.
        crop = face.crop_bgr.reshape(112, 2, 112, 2, 3).mean((1, 3))[..., ::-1]
        vector = self._recogniser.run(None, {"input.1": _normalised(crop)})[0][0]
        return np.asarray(vector / np.linalg.norm(vector), dtype=np.float32)

    def embedding(self, picture: NDArray[np.uint8]) -> NDArray[np.float32] | None:
        """Of the largest face of a picture, RGB uint8 [H,W,3]; None where none is found."""
        try:
            return self.embed(self.faces.analyze(picture, pad=False))
        except NoFaceFound:
            return None

    def scene(self, picture: NDArray[np.uint8]) -> SceneView:
        """Style and place of a picture, RGB uint8 [H,W,3]."""
        image = Image.fromarray(picture).resize((SCENE_SIZE, SCENE_SIZE), Image.Resampling.BOX)
        logits = self._scene.run(None, {"input.1": _normalised(np.asarray(image))})
        style, place = (_softmax(x[0]) for x in logits[:2])
        return SceneView(
            dict(zip(self._labels["style"], style, strict=True)),
            dict(zip(self._labels["place"], place, strict=True)),
        )


class SceneJudge(Judge):
    """What the scene classifier says about the prompted style and place."""

    def __init__(self, networks: MiniNetworks, column: Column) -> None:
        self.column = column
        self._networks = networks

    def load(self, data: Dataset) -> None:
        """Refuses prompts whose style and place are not known."""
        if any(pair.scene is None for pair in data.pairs):
            raise InvalidRequest(
                f"The mini model's judge {self.column.name} knows only the mini model's prompts.",
                "Use --data mini, or judges for photographs.",
            )

    def judge(self, samples: Sequence[Sample]) -> list[float | None]:
        return [self._one(sample) for sample in samples]

    def _one(self, sample: Sample) -> float:
        scene = sample.pair.scene
        assert scene is not None  # or load would have refused the data
        seen = sample.once(self._networks, lambda one: self._networks.scene(one.picture))
        style, place = seen.best
        if self.column.name == "style":
            return float(style == scene.style)
        if self.column.name == "place":
            return float(place == scene.place)
        return seen.style[scene.style] * seen.place[scene.place]


def mini_judges() -> dict[str, Judge]:
    """All judges of the mini model by name."""
    networks = MiniNetworks()
    view = FaceView(networks.faces, networks.embed)
    scene = [SceneJudge(networks, column) for column in _SCENE_COLUMNS]
    judges = [IdentityJudge(view), OtherPeopleJudge(view), *scene, NoFaceJudge(view)]
    return {judge.column.name: judge for judge in judges}


def _session(path: Path) -> Any:
    import onnxruntime  # here, or every command would wait for it

    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def _normalised(picture: NDArray[np.uint8]) -> NDArray[np.float32]:
    """RGB uint8 [H,W,3] to float32 [1,3,H,W] in [−1, 1]."""
    return ((picture.astype(np.float32) - 127.5) / 127.5).transpose(2, 0, 1)[None]


def _softmax(logits: NDArray[np.float32]) -> list[float]:
    powers = np.exp(logits.astype(np.float64) - logits.max())
    return [float(x) for x in powers / powers.sum()]
