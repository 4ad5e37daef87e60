"""Independent judges of the mini model's pictures: who is on it, in which style and place.

The judges were trained with other seeds, on other people and in another architecture than the
networks that made the pictures. They ship with the mini model (`fastface_trt/mini/judges`).
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from PIL import Image

from fastface_trt.errors import NoFaceFound
from fastface_trt.mini.folders import FACE_MODEL, JUDGES
from fastface_trt.runtime.face import FaceAnalyzer

SCENE_SIZE = 96


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the judges see: embedding [512] of length 1 (None: no face found), style, place."""

    embedding: NDArray[np.float32] | None
    style: str
    place: str


class MiniJudges:
    """Recogniser, scene classifier and the detector that finds the face for the recogniser."""

    def __init__(self) -> None:
        self.labels = json.loads((JUDGES / "labels.json").read_text(encoding="utf-8"))
        self._recogniser = self._session(JUDGES / "recognition.onnx")
        self._scene = self._session(JUDGES / "scene.onnx")
        self._faces = FaceAnalyzer(FACE_MODEL)

    @staticmethod
    def _session(path: Path) -> onnxruntime.InferenceSession:
        return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    @staticmethod
    def _normalised(picture: NDArray[np.uint8]) -> NDArray[np.float32]:
        """RGB uint8 [H,W,3] to float32 [1,3,H,W] in [−1, 1]."""
        return ((picture.astype(np.float32) - 127.5) / 127.5).transpose(2, 0, 1)[None]

    def embedding(self, picture: NDArray[np.uint8]) -> NDArray[np.float32] | None:
        """The judge's embedding of the largest face, None where the detector finds none."""
        try:
            face = self._faces.analyze(picture, pad=False)
        except NoFaceFound:
            return None
        # The aligned crop at 224 is the recogniser's 112-pixel template at twice the scale.
        crop = face.crop_bgr.reshape(112, 2, 112, 2, 3).mean((1, 3))[..., ::-1]
        vector = self._recogniser.run(None, {"input.1": self._normalised(crop)})[0][0]
        return np.asarray(vector / np.linalg.norm(vector), dtype=np.float32)

    def judge(self, picture: NDArray[np.uint8]) -> Verdict:
        """Everything about one generated picture, RGB uint8 [H,W,3]."""
        image = Image.fromarray(picture).resize((SCENE_SIZE, SCENE_SIZE), Image.Resampling.BOX)
        logits = self._scene.run(None, {"input.1": self._normalised(np.asarray(image))})
        style, place = (int(x[0].argmax()) for x in logits)
        return Verdict(
            self.embedding(picture), self.labels["style"][style], self.labels["place"][place]
        )
