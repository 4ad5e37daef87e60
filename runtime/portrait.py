"""A face as PuLID's vision tower takes it: upright, grey, on white, 336 pixels.

The face is aligned to five points of a 512-pixel portrait, as face restoration does (FFHQ's pose),
turned grey so that light and colour say nothing, and everything that is not the face (background,
hair, hat, ears, neck, clothes) is made white by a face parser. The parser is an ONNX file of one's
own (BiSeNet's 19 classes on CelebAMask-HQ); without one the surroundings stay, in grey. PuLID finds
the five points with a detector of its own (RetinaFace), here they are those of the face model.
"""

from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastface_trt.errors import EngineFailed, WeightsError

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
    import cv2

    matrix, _ = cv2.estimateAffinePartial2D(points, _POINTS, method=cv2.LMEDS)
    if matrix is None:
        raise EngineFailed(
            "The key points of the face lie on one spot, so it cannot be aligned.",
            "Use a sharp picture with one upright face.",
        )
    portrait: Any = cv2.warpAffine(
        bgr,
        matrix,
        (PORTRAIT_SIZE, PORTRAIT_SIZE),
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=_BEYOND_BGR,
    )
    return np.asarray(portrait, dtype=np.uint8)


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
