"""Judges by CLIP L/14: match of prompt and picture, of prompt and face area, and aesthetics.

CLIP runs in transformers, on the GPU where torch sees one, in float32. Pictures and prompts are
prepared by the runtime's own preprocessing and tokenizer, which are tested against transformers.
No run of these judges with published weights has been made.

Shape legend: P width of CLIP's joint space (768 for L/14).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastface_trt.errors import MissingDependency, WeightsError
from fastface_trt.evaluation.data import Dataset
from fastface_trt.evaluation.face_judges import FaceView
from fastface_trt.evaluation.judges import Column, Judge, Sample
from fastface_trt.export.checkpoints import HubItem
from fastface_trt.runtime.face import clip_pixels
from fastface_trt.runtime.images import MIN_SIDE
from fastface_trt.runtime.tokenizer import ClipTokenizer

CLIP_L = HubItem(
    "openai/clip-vit-large-patch14", "32bd64288804d66eefd0ccbe215aa642df71cc41", licence="MIT"
)
AESTHETIC_HEAD = HubItem("trl-lib/ddpo-aesthetic-predictor", None, "aesthetic-model.pth")
"""LAION's predictor "sac+logos+ava1-l14-linearMSE"; its repository has no pinned revision here."""

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_FILES = ["config.json", "model.safetensors", "vocab.json", "merges.txt", "*token*.json"]


class ClipView:
    """CLIP, loaded at first use, and what it sees; embeddings have length 1."""

    def __init__(self, item: HubItem = CLIP_L) -> None:
        self._item = item
        self._model: Any = None
        self._torch: Any = None
        self._texts: dict[str, NDArray[np.float32]] = {}

    @property
    def width(self) -> int:
        """P."""
        return int(self._model.config.projection_dim)

    def load(self) -> None:
        """Open the model; raises `MissingDependency`, `WeightsError`."""
        if self._model is not None:
            return
        try:
            import torch
            from transformers import CLIPModel

            from fastface_trt.export.sources import locate, weights_errors
        except ImportError as error:
            raise MissingDependency(
                f"The CLIP judges need {error.name}.",
                "Install it with: pip install 'fastface-trt[export,evaluate]', or leave out clip, "
                "fcs and ae with --judges.",
            ) from None
        folder = locate(self._item, "CLIP judge", patterns=_FILES).path
        with weights_errors(f"The CLIP judge {self._item.location}"):
            model = CLIPModel.from_pretrained(str(folder), dtype=torch.float32).eval()
        self._tokenizer = ClipTokenizer.from_folder(folder)
        self._torch = torch
        self._model = model.to("cuda" if torch.cuda.is_available() else "cpu")

    def picture(self, picture: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Embedding [P] of an RGB picture, uint8 [H,W,3]."""
        pixels = clip_pixels(
            picture[..., ::-1],
            size=self._model.config.vision_config.image_size,
            mean=CLIP_MEAN,
            std=CLIP_STD,
            channel_order="rgb",
        )
        with self._torch.inference_mode():
            batch = self._torch.from_numpy(pixels[None]).to(self._model.device)
            pooled = self._model.vision_model(pixel_values=batch).pooler_output
            return self._unit(self._model.visual_projection(pooled))

    def text(self, prompt: str) -> NDArray[np.float32]:
        """Embedding [P] of a prompt; what is beyond 77 tokens is cut."""
        if prompt not in self._texts:
            ids = self._tokenizer.encode([prompt]).input_ids
            with self._torch.inference_mode():
                batch = self._torch.from_numpy(ids).to(self._model.device)
                pooled = self._model.text_model(input_ids=batch).pooler_output
                self._texts[prompt] = self._unit(self._model.text_projection(pooled))
        return self._texts[prompt]

    def whole(self, sample: Sample) -> NDArray[np.float32]:
        """Embedding [P] of a sample's whole picture, computed once."""
        return sample.once(self, lambda one: self.picture(one.picture))

    @staticmethod
    def _unit(rows: Any) -> NDArray[np.float32]:
        vector = rows[0].float().cpu().numpy()
        return np.asarray(vector / np.linalg.norm(vector), dtype=np.float32)


class ClipJudge(Judge):
    """CLIP score: how well the picture fits its prompt."""

    column = Column(
        name="clip",
        label="CLIP score",
        unit="cosine",
        higher_is_better=True,
        what="Cosine similarity of prompt and picture in CLIP L/14",
    )

    def __init__(self, clip: ClipView) -> None:
        self._clip = clip

    def load(self, data: Dataset) -> None:
        """See `Judge`."""
        self._clip.load()

    def judge(self, samples: Sequence[Sample]) -> list[float | None]:
        """See `Judge`."""
        return [float(self._clip.text(s.pair.prompt) @ self._clip.whole(s)) for s in samples]


class FaceClipJudge(ClipJudge):
    """FCS: how well the face alone fits the prompt, which is where style is lost first."""

    column = Column(
        name="fcs",
        label="Face CLIP score (FCS)",
        unit="cosine",
        higher_is_better=True,
        what="Cosine similarity of prompt and the face's box in CLIP L/14; without a face left out",
    )

    def __init__(self, clip: ClipView, view: FaceView) -> None:
        super().__init__(clip)
        self._view = view

    def load(self, data: Dataset) -> None:
        """See `Judge`."""
        super().load(data)
        self._view.load(data)

    def judge(self, samples: Sequence[Sample]) -> list[float | None]:
        """See `Judge`."""
        return [self._one(sample) for sample in samples]

    def _one(self, sample: Sample) -> float | None:
        face = self._view.face(sample)
        area = None if face is None else face_area(sample.picture, face.box)
        if area is None:
            return None
        return float(self._clip.text(sample.pair.prompt) @ self._clip.picture(area))


def face_area(
    picture: NDArray[np.uint8], box: tuple[float, float, float, float]
) -> NDArray[np.uint8] | None:
    """The pixels of a face's box within the picture; None below `MIN_SIDE` pixels on a side."""
    height, width = picture.shape[:2]
    left, top = (max(0, round(value)) for value in box[:2])
    right, bottom = min(width, round(box[2])), min(height, round(box[3]))
    if min(right - left, bottom - top) < MIN_SIDE:
        return None
    return picture[top:bottom, left:right]


class AestheticJudge(ClipJudge):
    """AE: LAION's aesthetic predictor, linear layers on the picture's CLIP embedding."""

    column = Column(
        name="ae",
        label="Aesthetics (AE)",
        unit="LAION score, 1 to 10",
        higher_is_better=True,
        what="LAION aesthetic predictor on the CLIP L/14 embedding of the picture",
    )

    def __init__(self, clip: ClipView, item: HubItem = AESTHETIC_HEAD) -> None:
        super().__init__(clip)
        self._item = item
        self._layers: list[tuple[NDArray[np.float32], NDArray[np.float32]]] = []

    def load(self, data: Dataset) -> None:
        """See `Judge`."""
        super().load(data)
        if self._layers:
            return
        from fastface_trt.export.adapter import read_tensors
        from fastface_trt.export.sources import locate, weights_errors

        path = locate(self._item, "aesthetic head").path
        with weights_errors(f"The aesthetic head {self._item.location}"):
            tensors = {k: v.float().numpy() for k, v in read_tensors(path).items()}
        self._layers = linear_layers(tensors, self._clip.width, path)

    def judge(self, samples: Sequence[Sample]) -> list[float | None]:
        """See `Judge`."""
        return [self._one(sample) for sample in samples]

    def _one(self, sample: Sample) -> float:
        value = self._clip.whole(sample)
        for weight, bias in self._layers:
            value = weight @ value + bias
        return float(value[0])


def linear_layers(
    tensors: dict[str, NDArray[np.float32]], width: int, path: Path
) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Weights [out, in] and biases [out] in order, from P to one number.

    LAION published one linear layer, and five with nothing but dropout between them; both fit.
    Raises `WeightsError`.
    """
    stems = sorted(
        (name.removesuffix("weight") for name in tensors if name.endswith("weight")),
        key=lambda stem: [int(part) for part in stem.split(".") if part.isdigit()],
    )
    layers = [(tensors[f"{s}weight"], tensors[f"{s}bias"]) for s in stems if f"{s}bias" in tensors]
    sizes = [size for weight, _ in layers for size in reversed(weight.shape)]
    fits = sizes[:1] == [width] and sizes[-1:] == [1] and sizes[1:-1:2] == sizes[2:-1:2]
    if not fits or len(layers) * 2 != len(tensors):
        raise WeightsError(
            f"{path.name} is not an aesthetic head for embeddings of {width} numbers.",
            "Use LAION's sa_0_4_vit_l_14_linear.pth or sac+logos+ava1-l14-linearMSE.pth.",
        )
    return layers
