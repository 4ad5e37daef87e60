"""Judges of the face: ID, similarity to other people, and pictures without a face (FFC).

The networks are InsightFace's detector with a recogniser: buffalo_l's for photographs, one of its
own for the mini model. The detector is tried at 640 down to 320 pixels in steps of 64
(`runtime.face`), without the border that a request's own picture is given.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from fastface_trt.errors import NoFaceFound
from fastface_trt.evaluation.data import Dataset
from fastface_trt.evaluation.judges import Column, Judge, Sample
from fastface_trt.runtime.face import Face, FaceAnalyzer

Embedding = NDArray[np.float32]
"""[512], of length 1."""

ID_WHAT = "Cosine similarity of the face embeddings of source and generated picture"
FFC_WHAT = "Pictures on which the detector finds no face at any input size from 640 to 320"


class FaceView:
    """Faces of pictures, and how much each resembles the people of a data set."""

    def __init__(
        self,
        analyzer: FaceAnalyzer,
        embed: Callable[[Face], Embedding] = lambda face: face.embedding,
    ) -> None:
        self._analyzer = analyzer
        self._embed = embed
        self._data: Dataset | None = None
        self._people: list[str] = []
        self._embeddings: NDArray[np.float32] = np.zeros((0, 0), dtype=np.float32)

    def load(self, data: Dataset) -> None:
        """Embed the source pictures, once; raises `NoFaceFound` naming all without a face."""
        if self._data is data:
            return
        self._analyzer.load()
        embeddings, missing = [], []
        for name, picture in data.people.items():
            try:
                embeddings.append(self._embed(self._analyzer.analyze(picture)))
            except NoFaceFound:
                missing.append(data.files[name])
        if missing:
            raise faceless(missing)
        self._people, self._embeddings = list(data.people), np.stack(embeddings)
        self._data = data

    def face(self, sample: Sample) -> Face | None:
        """The largest face of the picture, None where the detector finds none."""
        return sample.once((self, "face"), self._find)

    def similarities(self, sample: Sample) -> tuple[float, float | None] | None:
        """To the same person, and the mean to all others (None: there are none)."""
        return sample.once((self, "similarities"), self._compare)

    def _find(self, sample: Sample) -> Face | None:
        try:
            return self._analyzer.analyze(sample.picture, pad=False)
        except NoFaceFound:
            return None

    def _compare(self, sample: Sample) -> tuple[float, float | None] | None:
        face = self.face(sample)
        if face is None:
            return None
        similarity = self._embeddings @ self._embed(face)
        own = self._people.index(sample.pair.person)
        others = np.delete(similarity, own)
        return float(similarity[own]), float(others.mean()) if len(others) else None


def faceless(files: Sequence[str]) -> NoFaceFound:
    """The error of a data set with source pictures that have no face."""
    return NoFaceFound(
        f"{len(files)} source picture{'s have' if len(files) > 1 else ' has'} no detectable face: "
        f"{', '.join(files)}.",
        "Replace them, or take them out of the data.",
    )


class IdentityJudge(Judge):
    """ID: how much the picture shows its own person."""

    column = Column(
        name="id",
        label="ID, same person",
        unit="cosine",
        higher_is_better=True,
        what=ID_WHAT + "; pictures without a face are left out",
    )

    def __init__(self, view: FaceView) -> None:
        self._view = view

    def load(self, data: Dataset) -> None:
        """See `Judge`."""
        self._view.load(data)

    def judge(self, samples: Sequence[Sample]) -> list[float | None]:
        """See `Judge`."""
        found = [self._view.similarities(sample) for sample in samples]
        return [None if similarity is None else similarity[0] for similarity in found]


class OtherPeopleJudge(IdentityJudge):
    """How much the picture resembles people that it should not show: what ID is worth."""

    column = Column(
        name="id_other",
        label="ID, other people",
        unit="cosine",
        higher_is_better=False,
        what="Mean cosine similarity of the generated face to all other people of the data",
    )

    def judge(self, samples: Sequence[Sample]) -> list[float | None]:
        """See `Judge`."""
        found = [self._view.similarities(sample) for sample in samples]
        return [None if similarity is None else similarity[1] for similarity in found]


class NoFaceJudge(IdentityJudge):
    """FFC: 1 for a picture without a detectable face, else 0."""

    column = Column(
        name="ffc",
        label="No face (FFC)",
        unit="share of pictures",
        higher_is_better=False,
        what=FFC_WHAT,
    )

    def judge(self, samples: Sequence[Sample]) -> list[float | None]:
        """See `Judge`."""
        return [float(self._view.face(sample) is None) for sample in samples]
