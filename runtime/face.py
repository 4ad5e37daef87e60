"""Find a face, align it, embed it: what an adapter wants to know about a person.

Detector and recogniser run by InsightFace's code where that is installed, and else by `face_steps`,
which gives the same; this module chooses the face and the detector's input size, and says in one
sentence what went wrong. Then come the pictures of the face that image encoders take: a crop in
colour for CLIP, and for PuLID's vision tower a portrait.

The portrait is aligned to five points of 512 pixels, as face restoration does (FFHQ's pose), turned
grey so that light and colour say nothing, and everything that is not the face (background, hair,
hat, ears, neck, clothes) is made white by a face parser. The parser is an ONNX file of one's own
(BiSeNet's 19 classes on CelebAMask-HQ); without one the surroundings stay, in grey. PuLID finds the
five points with a detector of its own (RetinaFace), here they are those of the face model.
"""

import contextlib
import importlib.metadata
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastface_trt.engines.engine import Progress
from fastface_trt.engines.ort.session import open_libraries
from fastface_trt.errors import (
    BackendUnavailable,
    EngineFailed,
    ExportIncomplete,
    FaceIndexOutOfRange,
    FastFaceError,
    LicenceNotAcknowledged,
    NoFaceFound,
    UnknownName,
    WeightsError,
)
from fastface_trt.runtime import face_files
from fastface_trt.runtime.export_folder import Export
from fastface_trt.runtime.face_files import PACKS, FaceFiles
from fastface_trt.runtime.face_steps import (
    ArcFaceRecogniser,
    ScrfdDetector,
    norm_crop,
    similarity,
    warp,
)
from fastface_trt.runtime.timeline import NO_TIMELINE, Timeline

DETECTOR_SIZES = (640, 576, 512, 448, 384, 320)
"""Detector input sizes in pixels, tried in this order, as in the paper's evaluation."""
CROP_SIZE = 224
EMBEDDING_SIZE = 512
OLDEST_INSIGHTFACE = (2, 1)
ACCEPT_VARIABLE = "FASTFACE_ACCEPT_LICENCES"

ChannelOrder = Literal["bgr", "rgb"]
"""Order in which the aligned crop goes to CLIP; see `clip_pixels`."""


@dataclass(frozen=True, slots=True)
class Face:
    """One face of a picture; its `repr`, which ends up in logs, tells nothing of who it is."""

    embedding: NDArray[np.float32] = field(repr=False)
    """[512], of length 1: InsightFace's `normed_embedding`."""
    embedding_norm: float
    """Length that the recogniser gave the embedding; PuLID takes it unnormalised."""
    crop_bgr: NDArray[np.uint8] = field(repr=False)
    """[224, 224, 3] in BGR order, aligned by InsightFace's `norm_crop`."""
    box: tuple[float, float, float, float]
    """Left, top, right, bottom in pixels of the picture; may reach beyond its edges."""
    score: float
    """The detector's confidence, 0 to 1."""
    index: int
    """Place in the order by area, 0 is the largest."""
    count: int
    """How many faces the picture has."""
    detector_size: int
    """The detector's input size in pixels at which the faces were found."""
    portrait_bgr: NDArray[np.uint8] | None = field(default=None, repr=False)
    """[512, 512, 3] in BGR order, see `align_portrait`; None where the analyser makes none."""
    by_index: bool = True
    """Whether the caller said which; False: the largest was taken, as nobody did."""
    others: tuple["Face", ...] = field(default=(), repr=False)
    """The same person in further pictures, for an adapter that takes several; see `one_person`."""

    @property
    def warning(self) -> str | None:
        """That the picture has further faces, unless the caller said which to take."""
        if self.by_index or self.count == 1:
            return None
        left, top, right, bottom = (round(side) for side in self.box)
        return (
            f"The picture has {self.count} faces; the largest is used, at x {left} to {right} and "
            f"y {top} to {bottom} (face_index chooses another: 1 is the next in size)."
        )


def one_person(faces: Sequence[Face]) -> Face:
    """A person whom several pictures show: the first face, with all others behind it."""
    first, *others = (one for face in faces for one in (face, *face.others))
    return replace(first, others=tuple(replace(one, others=()) for one in others))


@dataclass(frozen=True, slots=True)
class _Found:
    """Faces by area, largest first: boxes [n, 5] with scores, key points [n, 5, 2], in pixels."""

    boxes: NDArray[np.float32]
    points: NDArray[np.float32]
    detector_size: int


@dataclass(frozen=True, slots=True)
class _Models:
    """Detector and recogniser with InsightFace's interface, and its `norm_crop`, or all of ours."""

    detector: Any
    recogniser: Any
    crop: Callable[[NDArray[np.uint8], NDArray[np.float32], int], NDArray[np.uint8]]


class FaceAnalyzer:
    """Detector and recogniser, loaded at first use; may be shared by threads."""

    @classmethod
    def of_export(
        cls,
        export: Export,
        *,
        licence_acknowledged: bool = False,
        progress: Progress = lambda line: None,
    ) -> "FaceAnalyzer":
        """An analyser with an export's face model, and with the portraits that its adapter needs.

        Of a folder only the files are opened that the manifest names. Raises `ExportIncomplete`
        where it names none, and what the constructor raises.
        """
        model, portraits = export.manifest.face_model, export.manifest.adapter_kind == "pulid"
        entries = [f for f in export.manifest.extra_files if f.path.startswith(f"{model}/")]
        if not entries and model not in PACKS:
            raise ExportIncomplete(
                f"The manifest of {export.folder} names no files of its face model {model}.",
                "It was changed, or comes from an earlier version: export the model again.",
            )
        return cls(
            export.folder / model if entries else model,
            licence_acknowledged=licence_acknowledged,
            portraits=portraits,
            progress=progress,
            files=partial(face_files.of_export, export.folder, entries) if entries else None,
        )

    def __init__(
        self,
        model: str | Path,
        *,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        licence_acknowledged: bool = False,
        portraits: bool = False,
        progress: Progress = lambda line: None,
        files: Callable[[], FaceFiles] | None = None,
    ) -> None:
        """`model` is a folder with a detector and a recogniser (ONNX), or a pack's name.

        A folder of a pack's name in the working directory is `./buffalo_l`, or a `Path`. With
        `portraits` faces get the portrait that PuLID looks at. `files` finds the files, where
        `face_files` shall not look for them in the folder.

        A pack is downloaded at first use, which `progress` is told. Raises `WeightsError` when the
        folder does not exist, `UnknownName` for an unknown pack, `LicenceNotAcknowledged` for a
        pack without `licence_acknowledged` or FASTFACE_ACCEPT_LICENCES=1 in the environment.
        Everything else that can be wrong with the models shows when they are loaded; `load` does
        that at once.
        """
        folder, pack = Path(model).expanduser(), model in PACKS  # a Path is not
        if files is not None or (folder.is_dir() and not pack):
            self._files = files or partial(face_files.of_folder, folder.resolve())
        elif isinstance(model, Path) or any(mark in model for mark in ("/", "\\", "~")):
            raise WeightsError(
                f"The face model folder {model} does not exist.",
                "Pass a folder with a detector and a recogniser as ONNX files, or 'buffalo_l'.",
            )
        elif not pack:
            raise UnknownName("face model", model, PACKS)
        elif not licence_acknowledged and os.environ.get(ACCEPT_VARIABLE) != "1":
            raise LicenceNotAcknowledged(
                f"InsightFace's model pack {model} is for non-commercial research only.",
                f"If that is your use, say so with --accept-licence, {ACCEPT_VARIABLE}=1 in the "
                "environment, or licence_acknowledged=True.",
            )
        else:
            self._files = partial(face_files.of_pack, model, progress)
        self._providers = tuple(providers)
        self._portraits = portraits
        self._models: _Models | None = None
        self._lock = threading.Lock()

    def load(self) -> None:
        """Load the models now instead of at first use.

        Raises `WeightsError` when they cannot be downloaded or opened, `ExportIncomplete` when they
        are not those of the export, `BackendUnavailable` when they would not run on the providers
        asked for.
        """
        self._loaded()

    def analyze(
        self,
        picture: NDArray[np.uint8],
        *,
        index: int | None = None,
        pad: bool = True,
        timeline: Timeline = NO_TIMELINE,
    ) -> Face:
        """The face number `index` by area (None and 0: the largest) of an RGB picture.

        `picture` is uint8 [H, W, 3]. The detector is tried at `DETECTOR_SIZES` until it finds
        something. A face that fills the whole picture is too large for any of them, so with `pad`
        all sizes are tried once more with a black border of half the picture's size on every side;
        the original IP-Adapter and the paper's evaluation do not do that. Raises `NoFaceFound`,
        `FaceIndexOutOfRange`, and what `load` raises.
        """
        bgr = _bgr(picture)
        with timeline.span("face_detection"):
            found = self._find(bgr, pad=pad)
        if found is None:
            raise NoFaceFound(
                f"No face was found at any detector size from {DETECTOR_SIZES[0]} "
                f"to {DETECTOR_SIZES[-1]}.",
                "Use a sharp, well-lit picture with one upright face that fills about half of it.",
            )
        count = len(found.boxes)
        chosen = 0 if index is None else index
        if not 0 <= chosen < count:
            raise FaceIndexOutOfRange(
                f"Face {chosen} was asked for, and the picture has {count}.",
                f"Use an index from 0 (the largest face) to {count - 1}.",
            )
        with timeline.span("face_recognition"):
            return replace(self._embed(bgr, found, chosen), by_index=index is not None)

    def faces(self, picture: NDArray[np.uint8], *, pad: bool = True) -> list[Face]:
        """All faces of an RGB picture (uint8 [H, W, 3]), largest first; see `analyze`."""
        bgr = _bgr(picture)
        found = self._find(bgr, pad=pad)
        return [self._embed(bgr, found, i) for i in range(len(found.boxes))] if found else []

    def _find(self, bgr: NDArray[np.uint8], *, pad: bool) -> _Found | None:
        found = self._detect(bgr)
        if found or not pad:
            return found
        # The detector shrinks it anyway; this keeps a huge picture from growing fourfold first.
        step = max(1, max(bgr.shape[:2]) // (2 * DETECTOR_SIZES[0]))
        small = bgr[::step, ::step]
        top, left = small.shape[0] // 2, small.shape[1] // 2
        # Black, because that is what the detector's and norm_crop's own borders are.
        found = self._detect(np.pad(small, ((top, top), (left, left), (0, 0))))
        if found is None:
            return None
        # Back to the picture's own pixels; norm_crop draws the same black beyond its edges.
        boxes, points = found.boxes.copy(), (found.points - (left, top)) * step
        boxes[:, :4] = (boxes[:, :4] - (left, top, left, top)) * step
        return _Found(boxes, points.astype(np.float32), found.detector_size)

    def _detect(self, bgr: NDArray[np.uint8]) -> _Found | None:
        detector = self._loaded().detector
        fixed = detector.static_input_size
        sizes = [tuple(fixed)] if fixed is not None else [(s, s) for s in DETECTOR_SIZES]
        height, width = bgr.shape[:2]
        for size in sizes:
            if min(height, width) * min(size) < max(height, width):
                continue  # the detector's scaled copy would have no pixel on its short side
            with _failures("The face detector"):
                boxes, points = detector.detect(bgr, size)
            if len(boxes) == 0:
                continue
            if points is None:
                raise WeightsError(
                    "The face detector gives no key points, so faces cannot be aligned.",
                    "Use a detector with SCRFD's nine outputs.",
                )
            areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
            order = np.argsort(-areas, kind="stable")
            return _Found(boxes[order], points[order], max(size))
        return None

    def _embed(self, bgr: NDArray[np.uint8], found: _Found, index: int) -> Face:
        models = self._loaded()
        box, points = found.boxes[index], found.points[index]
        if not np.isfinite(points).all() or not np.ptp(points, axis=0).any():
            raise EngineFailed(
                "The key points of the face lie on one spot, so it cannot be aligned.",
                "Use a sharp picture with one upright face.",
            )
        with _failures("The face recogniser"):
            aligned = models.crop(bgr, points, models.recogniser.input_size[0])
            raw = np.asarray(models.recogniser.get_feat(aligned), np.float32).ravel()
            crop = models.crop(bgr, points, CROP_SIZE)
        norm = np.linalg.norm(raw)
        with np.errstate(divide="ignore", invalid="ignore"):  # said below
            embedding = raw / norm
        if embedding.shape != (EMBEDDING_SIZE,):
            raise WeightsError(
                f"The face recogniser gives {embedding.size} numbers, not {EMBEDDING_SIZE}.",
                "Use an ArcFace model such as that of buffalo_l.",
            )
        if not np.isfinite(embedding).all():
            raise EngineFailed(
                "The face recogniser returned numbers that are not finite.",
                "Check the model file, or run it on CPUExecutionProvider.",
            )
        left, top, right, bottom = (float(v) for v in box[:4])
        return Face(
            embedding=embedding,
            embedding_norm=float(norm),
            crop_bgr=crop,
            box=(left, top, right, bottom),
            score=float(box[4]),
            index=index,
            count=len(found.boxes),
            detector_size=found.detector_size,
            portrait_bgr=align_portrait(bgr, points) if self._portraits else None,
        )

    def _loaded(self) -> _Models:
        # Once set, the attribute never changes, so only the first callers meet at the lock.
        if self._models is None:
            with self._lock:
                if self._models is None:
                    self._models = _open_models(self._files(), self._providers)
        return self._models


def _open_models(files: FaceFiles, providers: Sequence[str]) -> _Models:
    import onnxruntime

    _check_providers(providers, onnxruntime.get_available_providers(), "This machine")
    if "CUDAExecutionProvider" in providers:  # this may be the process's first session on a GPU
        open_libraries(onnxruntime, "cuda")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Their idle threads would spin on the cores that the UNet runs on next: half its speed, seen.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    opened = {"providers": list(providers), "sess_options": options}
    path = files.detector
    try:
        if whose_code()[1]:
            session = partial(onnxruntime.InferenceSession, **opened)
            detector: Any = ScrfdDetector(session(str(path)))
            path = files.recogniser
            recogniser: Any = ArcFaceRecogniser(session(str(path)), normalises=files.normalises)
            models = _Models(detector, recogniser, norm_crop)
        else:
            from insightface.model_zoo import get_model
            from insightface.utils import face_align

            # One dynamic session serves all detector sizes: with static ones, every size would
            # load the model again.
            detector = get_model(str(path), static_shape_sessions=False, **opened)
            path = files.recogniser
            recogniser = get_model(str(path), **opened)
            models = _Models(detector, recogniser, face_align.norm_crop)
    except FastFaceError:
        raise
    # A foreign ONNX file: protobuf, ONNX Runtime and InsightFace's assertions have no common base.
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "it is of no kind"
        raise WeightsError(
            f"The face model {path} cannot be opened: {reason.rstrip('.')}.",
            "Use a detector of SCRFD's layout and an ArcFace model, such as those of buffalo_l.",
        ) from error
    for name, part in (("detection", detector), ("recognition", recogniser)):
        _check_providers(providers, part.session.get_providers(), f"The face {name} model")
    return models


def whose_code() -> tuple[str, str]:
    """Whose code runs face models here, and why it is not InsightFace's, "" where it is."""
    ours = "this package's own code"
    try:
        version = importlib.metadata.version("insightface")
        if tuple(map(int, version.split(".")[:2])) < OLDEST_INSIGHTFACE:
            return ours, f"InsightFace {version} is older than 2.1"
        import insightface.model_zoo  # noqa: F401
    except importlib.metadata.PackageNotFoundError:
        return ours, "InsightFace is not installed"
    except Exception as error:  # OpenCV's libraries lack, say, or it was built for another numpy
        return ours, f"InsightFace cannot be imported: {error}"
    return f"InsightFace {version}", ""


def _check_providers(wanted: Sequence[str], used: Sequence[str], who: str) -> None:
    """ONNX Runtime falls back to the CPU without a word; here that is an error."""
    missing = [name for name in wanted if name not in used]
    if missing:
        raise BackendUnavailable(
            f"{who} does not run on {', '.join(missing)}, only on {', '.join(used)}.",
            "Install the ONNX Runtime package with that provider, or ask for CPUExecutionProvider.",
        )


@contextlib.contextmanager
def _failures(who: str) -> Iterator[None]:
    """Name the model in whatever ONNX Runtime raises, and hold back a deprecation of skimage's."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`estimate` is deprecated", FutureWarning)
            yield
    except FastFaceError:
        raise
    except Exception as error:  # ONNX Runtime's and OpenCV's errors have no common base
        raise EngineFailed(f"{who} failed: {error}.", "Check the model file.") from error


def _bgr(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise ValueError(f"picture is {picture.dtype} {picture.shape}, not uint8 [H, W, 3]")
    return np.ascontiguousarray(picture[:, :, ::-1])


def clip_pixels(
    crop_bgr: NDArray[np.uint8],
    *,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    channel_order: ChannelOrder = "bgr",
) -> NDArray[np.float32]:
    """The CLIP image encoder's input, float32 [3, size, size], from a crop, uint8 [H, W, 3].

    What transformers' CLIPImageProcessor does: the shorter edge is resized to `size` (bicubic), the
    centre cut out, divided by 255, and normalised with `mean` and `std` [3]. The original
    IP-Adapter example hands the crop over in BGR order, and the released results were made so:
    "bgr" keeps that, "rgb" gives CLIP the colours that it was trained with.
    """
    crop = crop_bgr if channel_order == "bgr" else crop_bgr[:, :, ::-1]
    height, width = crop.shape[:2]
    short, long = min(height, width), max(height, width)
    scaled = int(size * long / short)
    new_width, new_height = (size, scaled) if width <= height else (scaled, size)
    image = Image.fromarray(np.ascontiguousarray(crop))
    resized = np.asarray(image.resize((new_width, new_height), Image.Resampling.BICUBIC))
    top, left = (new_height - size) // 2, (new_width - size) // 2
    centre = resized[top : top + size, left : left + size]
    # The product is taken in float64 and the rest in float32, as transformers does it.
    unit = (centre.astype(np.float64) * (1 / 255)).astype(np.float32)
    pixels = (unit - np.asarray(mean, dtype=np.float32)) / np.asarray(std, dtype=np.float32)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


PORTRAIT_SIZE = 512
_POINTS = np.array(
    [
        [192.98138, 239.94708],  # eyes, left in the picture first
        [318.90277, 240.1936],
        [256.63416, 314.01935],  # tip of the nose
        [201.26117, 371.41043],  # corners of the mouth
        [313.08905, 371.15118],
    ],
    dtype=np.float32,
)
_BEYOND_BGR = (135, 133, 132)
_LUMA_RGB = np.array([0.299, 0.587, 0.114], dtype=np.float32)
_PARSER_MEAN = np.array([0.485, 0.456, 0.406], dtype=np.float32)
_PARSER_STD = np.array([0.229, 0.224, 0.225], dtype=np.float32)
PARSER_CLASSES = 19
NOT_THE_FACE = (0, 7, 8, 9, 14, 15, 16, 18)
"""Classes of the parser: background, ears and their rings, neck and necklace, clothes, hat."""


def align_portrait(bgr: NDArray[np.uint8], points: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The face with key points [5, 2] as an upright portrait, uint8 [512, 512, 3] in BGR order.

    A similarity transform that the median of the points' errors is least for. Raises
    `EngineFailed` when the points make no face.
    """
    matrix = median_similarity(points, _POINTS)
    if matrix is None:
        raise EngineFailed(
            "The key points of the face lie on one spot, so it cannot be aligned.",
            "Use a sharp picture with one upright face.",
        )
    return warp(bgr, matrix, PORTRAIT_SIZE, _BEYOND_BGR)


def median_similarity(
    source: NDArray[np.floating[Any]], target: NDArray[np.floating[Any]]
) -> NDArray[np.float64] | None:
    """Turn, scale and shift, [2, 3], of points [n, 2] to `target`; None for points on one spot.

    The one that two of them give whose errors have the least median tells which points are far off;
    the result is the best for the others, by least squares (OpenCV's LMEDS, which tries pairs that
    it draws).
    """
    source, target = source.astype(np.float64), target.astype(np.float64)
    best, least = None, np.inf
    for pair in combinations(range(len(source)), 2):
        if not np.ptp(source[[*pair]], axis=0).any():
            continue
        matrix = similarity(source[[*pair]], target[[*pair]])
        errors = np.square(source @ matrix[:, :2].T + matrix[:, 2] - target).sum(axis=1)
        median = np.sort(errors)[len(errors) // 2]
        if median < least:
            best, least = errors, median
    if best is None:
        return None
    deviation = max(2.5 * 1.4826 * (1 + 5 / (len(source) - 2)) * np.sqrt(least), 0.001)
    near = best <= deviation**2
    return similarity(source[near], target[near])


def portrait_pixels(
    portrait_bgr: NDArray[np.uint8],
    *,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    background: NDArray[np.bool_] | None = None,
) -> NDArray[np.float32]:
    """The vision tower's input, float32 [3, size, size], of a portrait, uint8 [H, W, 3].

    `background` [H, W] is what becomes white. Grey is resized as numbers, not as bytes, with a
    bicubic filter as wide as the reduction; all channels are the same before they are normalised.
    """
    rgb = portrait_bgr[:, :, ::-1].astype(np.float32) / 255
    grey = rgb @ _LUMA_RGB
    if background is not None:
        grey = np.where(background, np.float32(1), grey)
    image = Image.fromarray(np.ascontiguousarray(grey, dtype=np.float32))
    resized = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
    pixels = (resized[:, :, None] - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32)


class FaceParser:
    """A face parser in an ONNX file, opened at first use; may be shared by threads.

    Its input is float32 [1, 3, 512, 512], RGB normalised with ImageNet's mean and deviation, its
    first output the scores of 19 classes [1, 19, 512, 512].
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._session: Any = None
        self._lock = Lock()

    def background(self, portrait_bgr: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Where a portrait, uint8 [512, 512, 3], is not the face, [512, 512].

        Raises `WeightsError` when the file is no face parser.
        """
        rgb = portrait_bgr[:, :, ::-1].astype(np.float32) / 255
        pixels = ((rgb - _PARSER_MEAN) / _PARSER_STD).transpose(2, 0, 1)
        session = self._opened()
        try:
            scores = session.run(None, {session.get_inputs()[0].name: pixels[None]})[0]
        except Exception as error:  # ONNX Runtime's errors have no common base
            raise self._unusable(str(error).splitlines()[0]) from error
        if scores.shape != (1, PARSER_CLASSES, *portrait_bgr.shape[:2]):
            raise self._unusable(f"its output is {list(scores.shape)}")
        return np.isin(scores[0].argmax(axis=0), NOT_THE_FACE)

    def _opened(self) -> Any:
        with self._lock:
            if self._session is None:
                import onnxruntime

                try:
                    self._session = onnxruntime.InferenceSession(
                        str(self._path), providers=["CPUExecutionProvider"]
                    )
                except Exception as error:
                    raise self._unusable(str(error).splitlines()[0]) from error
            return self._session

    def _unusable(self, why: str) -> WeightsError:
        return WeightsError(
            f"{self._path.name} is no face parser: {why}.",
            "Use BiSeNet with CelebAMask-HQ's 19 classes as an ONNX file: "
            "float32 [1, 3, 512, 512] in, scores [1, 19, 512, 512] out.",
        )
