"""Judges: each gives columns of numbers, one per picture, with their meaning in words.

Judges that look at the same thing (the face of a picture, its CLIP embedding) share it through a
`Sample`, which remembers what was found, so that no network runs twice on one picture.

- Of the face: ID, similarity to other people, and pictures without a face (FFC), by InsightFace's
  detector with a recogniser: buffalo_l's for photographs, one of its own for the mini model. The
  detector is tried at 640 down to 320 pixels in steps of 64 (`runtime.face`), without the border
  that a request's own picture is given.
- By CLIP L/14: match of prompt and picture, of prompt and face area (FCS), and aesthetics. CLIP
  runs in transformers, on the GPU where torch sees one, in float32. Pictures and prompts are
  prepared by the runtime's own preprocessing and tokenizer, which are tested against transformers.
- IR: ImageReward, a model of which picture of a prompt people prefer. The package `image-reward` is
  optional and brings its own weights.

`real_judges` are those of photographs, as the paper's protocol has them. No run of CLIP's judges or
of ImageReward with published weights has been made.

Shape legend: P width of CLIP's joint space (768 for L/14).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastface_trt.checkpoints import HubItem
from fastface_trt.engines.manifest import Strict
from fastface_trt.errors import (
    MissingDependency,
    NoFaceFound,
    UnknownName,
    WeightsError,
    install_hint,
)
from fastface_trt.evaluation.data import Dataset, Pair
from fastface_trt.runtime.face import Face, FaceAnalyzer, clip_pixels
from fastface_trt.runtime.images import MIN_SIDE
from fastface_trt.runtime.tokenizer import ClipTokenizer

Value = TypeVar("Value")
Embedding = NDArray[np.float32]
"""[512], of length 1."""

ID_WHAT = "Cosine similarity of the face embeddings of source and generated picture"
FFC_WHAT = "Pictures on which the detector finds no face at any input size from 640 to 320"
CLIP_L = HubItem(
    "openai/clip-vit-large-patch14", "32bd64288804d66eefd0ccbe215aa642df71cc41", licence="MIT"
)
AESTHETIC_HEAD = HubItem("trl-lib/ddpo-aesthetic-predictor", None, "aesthetic-model.pth")
"""LAION's predictor "sac+logos+ava1-l14-linearMSE"; its repository has no pinned revision here."""

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_FILES = ["config.json", "model.safetensors", "vocab.json", "merges.txt", "*token*.json"]
MODEL = "ImageReward-v1.0"


class Column(Strict):
    """What a judge's numbers are, for tables and axes."""

    name: str
    label: str
    unit: str
    higher_is_better: bool
    what: str


class Sample:
    """One generated picture before the judges: RGB uint8 [H,W,3], and the pair it was made for."""

    def __init__(self, picture: NDArray[np.uint8], pair: Pair) -> None:
        self.picture = picture
        self.pair = pair
        self._known: dict[object, Any] = {}

    def once(self, key: object, compute: Callable[["Sample"], Value]) -> Value:
        """`compute(self)`, computed at the first call with this `key`."""
        if key not in self._known:
            self._known[key] = compute(self)
        return cast(Value, self._known[key])


class Judge(ABC):
    """One metric. `load` opens what it needs and looks at the source pictures, once per run."""

    column: Column

    @abstractmethod
    def load(self, data: Dataset) -> None:
        """Open networks; raises `MissingDependency`, `WeightsError`, `LicenceNotAcknowledged`."""

    @abstractmethod
    def judge(self, samples: Sequence[Sample]) -> list[float | None]:
        """One number per sample in order; None where the picture has nothing to judge."""


def choose_judges(known: Mapping[str, Value], names: Sequence[str] | None) -> list[Value]:
    """What `names` name, in the order of `known`, None: all; raises `UnknownName`."""
    for name in names or ():
        if name not in known:
            raise UnknownName("judge", name, known)
    return [judge for name, judge in known.items() if names is None or name in names]


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
        self._view.load(data)

    def judge(self, samples: Sequence[Sample]) -> list[float | None]:
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
        return [float(self._view.face(sample) is None) for sample in samples]


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

            from fastface_trt.export.locations import locate, weights_errors
        except ImportError as error:
            raise MissingDependency(
                f"The CLIP judges need {error.name}.",
                f"Install it with: {install_hint('export', 'evaluate')}, or leave out clip, "
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
        self._clip.load()

    def judge(self, samples: Sequence[Sample]) -> list[float | None]:
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
        super().load(data)
        self._view.load(data)

    def judge(self, samples: Sequence[Sample]) -> list[float | None]:
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
        super().load(data)
        if self._layers:
            return
        from fastface_trt.export.locations import locate, weights_errors
        from fastface_trt.export.weight_files import open_weights

        path = locate(self._item, "aesthetic head").path
        with weights_errors(f"The aesthetic head {self._item.location}"):
            tensors = {k: v.float().numpy() for k, v in open_weights(path).items()}
        self._layers = linear_layers(tensors, self._clip.width, path)

    def judge(self, samples: Sequence[Sample]) -> list[float | None]:
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
        return [
            float(self._model.score(sample.pair.prompt, Image.fromarray(sample.picture)))
            for sample in samples
        ]


@dataclass(frozen=True)
class JudgeWeights:
    """Where the judges' weights are: hub items or local paths; the paper's by default."""

    face_model: str = "buffalo_l"
    clip: HubItem = CLIP_L
    aesthetic_head: HubItem = AESTHETIC_HEAD
    image_reward: str = MODEL


def real_judges(
    weights: JudgeWeights, names: list[str] | None, *, licence_acknowledged: bool
) -> list[Judge]:
    """The judges of `names`, None: all. Nothing is loaded, and no face model without its licence.

    Raises `UnknownName`, and for those that look at faces what `FaceAnalyzer` raises.
    """
    clip = ClipView(weights.clip)
    views: list[FaceView] = []

    def view() -> FaceView:
        if not views:
            analyzer = FaceAnalyzer(weights.face_model, licence_acknowledged=licence_acknowledged)
            views.append(FaceView(analyzer))
        return views[0]

    makers: dict[str, Callable[[], Judge]] = {
        "id": lambda: IdentityJudge(view()),
        "id_other": lambda: OtherPeopleJudge(view()),
        "clip": lambda: ClipJudge(clip),
        "ae": lambda: AestheticJudge(clip, weights.aesthetic_head),
        "ir": lambda: RewardJudge(weights.image_reward),
        "fcs": lambda: FaceClipJudge(clip, view()),
        "ffc": lambda: NoFaceJudge(view()),
    }
    return [make() for make in choose_judges(makers, names)]
