"""The judge IR: ImageReward, a model of which picture of a prompt people prefer.

The package `image-reward` is optional and brings its own weights. Not run with its weights.
"""

from collections.abc import Sequence
from typing import Any

from PIL import Image

from fastface_trt.errors import MissingDependency, WeightsError
from fastface_trt.evaluation.data import Dataset
from fastface_trt.evaluation.judges import Column, Judge, Sample

MODEL = "ImageReward-v1.0"


class RewardJudge(Judge):
    """IR: ImageReward's score of the picture for its prompt."""

    column = Column(
        name="ir",
        label="ImageReward (IR)",
        unit="score",
        higher_is_better=True,
        what="ImageReward v1.0 of prompt and picture",
    )

    def __init__(self, model: str = MODEL) -> None:
        self._name = model
        self._model: Any = None

    def load(self, data: Dataset) -> None:
        """See `Judge`."""
        if self._model is not None:
            return
        try:
            import ImageReward
        except ImportError as error:
            raise MissingDependency(
                f"The judge ir needs the package image-reward ({error}).",
                "Install it with: pip install image-reward, or leave out ir with --judges.",
            ) from None
        try:
            self._model = ImageReward.load(self._name)
        except Exception as error:  # its loader, the hub client and torch share no base
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise WeightsError(
                f"ImageReward {self._name} could not be loaded: {reason[:300]}",
                "Go online once, or pass the path of its checkpoint with --image-reward.",
            ) from error

    def judge(self, samples: Sequence[Sample]) -> list[float | None]:
        """See `Judge`."""
        return [
            float(self._model.score(sample.pair.prompt, Image.fromarray(sample.picture)))
            for sample in samples
        ]
