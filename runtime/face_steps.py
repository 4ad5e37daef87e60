"""What is done around a face detector and a recogniser, in numpy: five steps.

A picture is resized (`resize`), what SCRFD's network answers is decoded (`ScrfdDetector`) and
thinned out (`suppress`), five key points give a similarity transform (`similarity`), and the face
is cut out by it (`warp`). The results are InsightFace's, which does these with OpenCV and
scikit-image: both resizing and warping round as OpenCV 5 does, so that crops are the same to the
byte, where its vectors are multiplied and added in one rounding (x86 from AVX2 on). OpenCV before
4.11 warps in steps of 1/32 pixel; there bytes differ.

Pictures are BGR, uint8 [H, W, 3]; sizes are (width, height), as OpenCV has them.
"""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fastface_trt.errors import WeightsError

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float32]

SCORE_THRESHOLD: Final = 0.5
OVERLAP_THRESHOLD: Final = 0.4
_ONE: Final = np.float32(2048)
"""A weight of one, in OpenCV's fixed point of 11 bits."""

_LAYOUTS: Final = {
    6: ((8, 16, 32), 2, False),
    9: ((8, 16, 32), 2, True),
    10: ((8, 16, 32, 64, 128), 1, False),
    15: ((8, 16, 32, 64, 128), 1, True),
}
"""By the number of SCRFD's outputs: strides in pixels, anchors per place, and whether there are key
points. Outputs are scores of all strides, then boxes, then points."""

TEMPLATE: Final = np.array(
    [
        [38.2946, 51.6963],  # eyes, left in the picture first
        [73.5318, 51.5014],
        [56.0252, 71.7366],  # tip of the nose
        [41.5493, 92.3655],  # corners of the mouth
        [70.7299, 92.2041],
    ],
    dtype=np.float32,
)
"""ArcFace's key points in a crop of 112 pixels."""


class ScrfdDetector:
    """SCRFD in an ONNX Runtime session; the interface is that of InsightFace's class."""

    def __init__(self, session: Any) -> None:
        """Raises `WeightsError` for a network with other outputs than SCRFD's."""
        outputs = session.get_outputs()
        if len(outputs) not in _LAYOUTS:
            raise WeightsError(
                f"The face detector has {len(outputs)} outputs.",
                "Use a detector of SCRFD's layout, such as that of buffalo_l.",
            )
        self.session = session
        self._strides, self._anchors, self._has_points = _LAYOUTS[len(outputs)]
        self._batched = len(outputs[0].shape) == 3
        height, width = session.get_inputs()[0].shape[2:4]
        fixed = isinstance(height, int) and isinstance(width, int)
        self.static_input_size: tuple[int, int] | None = (width, height) if fixed else None

    def detect(self, bgr: Pixels, input_size: tuple[int, int]) -> tuple[Floats, Floats | None]:
        """Boxes [n, 5] with scores and key points [n, 5, 2], in pixels, highest score first.

        Points are None where the network gives none.
        """
        height, width = bgr.shape[:2]
        if height / width > input_size[1] / input_size[0]:
            inner = max(1, int(input_size[1] / (height / width))), input_size[1]
        else:
            inner = input_size[0], max(1, int(input_size[0] * (height / width)))
        canvas = np.zeros((input_size[1], input_size[0], 3), np.uint8)
        canvas[: inner[1], : inner[0]] = resize(bgr, inner)
        answers = _run(self.session, canvas, 127.5, 128)
        boxes, points = self._decode(answers, input_size)
        order = np.argsort(-boxes[:, 4], kind="stable")
        kept = order[suppress(boxes[order])]
        scale = np.array([inner[1] / height] * 4 + [1], np.float32)
        return boxes[kept] / scale, None if points is None else points[kept] / scale[0]

    def _decode(
        self, answers: Sequence[Floats], size: tuple[int, int]
    ) -> tuple[Floats, Floats | None]:
        """Boxes [n, 5] and points of every place whose score is high enough, in input pixels."""
        levels = len(self._strides)
        if self._batched:
            answers = [answer[0] for answer in answers]
        boxes, points = [], []
        for level, stride in enumerate(self._strides):
            scores = answers[level].reshape(-1)
            seen = np.flatnonzero(scores >= SCORE_THRESHOLD)
            at = seen // self._anchors
            across = size[0] // stride
            centres = (np.stack([at % across, at // across], axis=1) * stride).astype(np.float32)
            sides = answers[level + levels][seen] * np.float32(stride)
            corners = centres - sides[:, :2], centres + sides[:, 2:4]
            boxes.append(np.concatenate([*corners, scores[seen, None]], axis=1))
            if self._has_points:
                moved = answers[level + 2 * levels][seen] * np.float32(stride)
                points.append(centres[:, None] + moved.reshape(len(seen), moved.shape[1] // 2, 2))
        return np.concatenate(boxes), np.concatenate(points) if points else None


class ArcFaceRecogniser:
    """ArcFace in an ONNX Runtime session; the interface is that of InsightFace's class.

    `normalises`: the network brings its crop's bytes into range itself, as those made by MXNet do.
    """

    def __init__(self, session: Any, *, normalises: bool) -> None:
        self.session = session
        height, width = session.get_inputs()[0].shape[2:4]
        self.input_size = width, height
        self._range = (0.0, 1.0) if normalises else (127.5, 127.5)

    def get_feat(self, crop: Pixels) -> Floats:
        """The embedding [1, n] of an aligned crop of `input_size`."""
        embedding: Floats = _run(self.session, crop, *self._range)[0]
        return embedding


def _run(session: Any, bgr: Pixels, mean: float, deviation: float) -> list[Any]:
    """Outputs for a picture, as RGB float32 [1, 3, H, W], normalised."""
    unit = (bgr[:, :, ::-1].astype(np.float32) - np.float32(mean)) * np.float32(1 / deviation)
    blob = np.ascontiguousarray(unit.transpose(2, 0, 1)[None])
    outputs: list[Any] = session.run(None, {session.get_inputs()[0].name: blob})
    return outputs


def suppress(boxes: Floats) -> list[int]:
    """Which of boxes [n, 5], highest score first, overlap none that is kept before them."""
    left, top, right, bottom = boxes[:, :4].T
    areas = (right - left + 1) * (bottom - top + 1)
    order, kept = np.arange(len(boxes)), []
    while order.size:
        first, rest = order[0], order[1:]
        kept.append(int(first))
        wide = np.minimum(right[first], right[rest]) - np.maximum(left[first], left[rest]) + 1
        high = np.minimum(bottom[first], bottom[rest]) - np.maximum(top[first], top[rest]) + 1
        shared = np.maximum(wide, 0) * np.maximum(high, 0)
        order = rest[shared / (areas[first] + areas[rest] - shared) <= OVERLAP_THRESHOLD]
    return kept


def norm_crop(bgr: Pixels, points: Floats, image_size: int) -> Pixels:
    """The face with key points [5, 2], upright, [image_size, image_size, 3]; black beyond edges.

    `image_size` is a multiple of 112 pixels, or of 128, which leaves a margin at the sides.
    """
    unit, margin = (112, 0.0) if image_size % 112 == 0 else (128, 8.0)
    target = TEMPLATE * (image_size / unit)
    target[:, 0] += margin * image_size / unit
    return warp(bgr, similarity(points, target), image_size, (0, 0, 0))


def similarity(
    source: NDArray[np.floating[Any]], target: NDArray[np.floating[Any]]
) -> NDArray[np.float64]:
    """Turn, scale and shift, [2, 3], that bring points [n, 2] nearest to `target`; no reflection.

    Umeyama's solution (1991). Points that lie on one spot have none.
    """
    from_mean, to_mean = source.mean(axis=0), target.mean(axis=0)
    centred = source - from_mean
    left, lengths, right = np.linalg.svd((target - to_mean).T @ centred / len(source))
    signs = np.array([1, np.sign(np.linalg.det(left) * np.linalg.det(right))])
    turn = left @ np.diag(signs) @ right
    scale = 1.0 / centred.var(axis=0).sum() * (lengths @ signs)
    return np.column_stack([scale * turn, to_mean - scale * (turn @ from_mean)])


def warp(
    bgr: Pixels, matrix: NDArray[np.float64], size: int, beyond: tuple[int, int, int]
) -> Pixels:
    """A picture [size, size, 3] by a transform [2, 3], linear between pixels, `beyond` outside."""
    place = np.arange(size)
    inverse = np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))[:2]
    narrow = inverse.astype(np.float32)
    height, width = bgr.shape[:2]
    # In float32 from here on, with the roundings of OpenCV: a row's beginning, then along the row.
    where = []
    for (along, down, shift), side in zip(narrow, (width, height), strict=True):
        start = place.astype(np.float32) * down + shift
        where.append(np.clip(_fused(along, place[None, :], start[:, None]), -2, side + 1))
    whole_x, whole_y = (np.floor(one) for one in where)
    part_x, part_y = (where[0] - whole_x)[..., None], (where[1] - whole_y)[..., None]
    x, y = whole_x.astype(np.intp), whole_y.astype(np.intp)

    def pixels(x: NDArray[np.intp], y: NDArray[np.intp]) -> Floats:
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
        found: Floats = bgr[y.clip(0, height - 1), x.clip(0, width - 1)].astype(np.float32)
        found[~inside] = beyond
        return found

    upper, lower = pixels(x, y), pixels(x, y + 1)
    upper = _fused(part_x, pixels(x + 1, y) - upper, upper)
    lower = _fused(part_x, pixels(x + 1, y + 1) - lower, lower)
    return np.rint(_fused(part_y, lower - upper, upper)).astype(np.uint8)


def _fused(factor: Any, value: NDArray[Any], added: Floats) -> Floats:
    """factor · value + added of float32, rounded once: float64 holds the product exactly."""
    rounded: Floats = (np.asarray(factor, np.float64) * value + added).astype(np.float32)
    return rounded


def resize(bgr: Pixels, size: tuple[int, int]) -> Pixels:
    """A picture of another size, between pixels linearly, without a wider filter for reductions."""
    height, width = bgr.shape[:2]
    if size == (width, height):
        return bgr
    if (2 * size[0], 2 * size[1]) == (width, height):  # OpenCV takes means then
        blocks = bgr.reshape(size[1], 2, size[0], 2, 3).sum(axis=(1, 3), dtype=np.uint16)
        means: Pixels = ((blocks + 2) >> 2).astype(np.uint8)
        return means
    # Rows of bytes [H, W · 3], because numpy is slow along an axis of three.
    flat = np.ascontiguousarray(bgr).reshape(height, width * 3)
    left, right, across = _taps(size[0], width)
    left, right = ((3 * at[:, None] + np.arange(3)).reshape(-1) for at in (left, right))
    across = across.repeat(3, axis=1)
    upper, lower, down = _taps(size[1], height)
    rows, which = np.unique(np.concatenate([upper, lower]), return_inverse=True)
    flat = flat[rows]
    sums = (flat.take(left, axis=1) * across[0] + flat.take(right, axis=1) * across[1]) >> 4
    first, second = sums[which[: size[1]]], sums[which[size[1] :]]
    rounded = ((first * down[0][:, None]) >> 16) + ((second * down[1][:, None]) >> 16) + 2
    resized: Pixels = (rounded >> 2).astype(np.uint8).reshape(size[1], size[0], 3)
    return resized


def _taps(
    count: int, available: int
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.int32]]:
    """For each of `count` pixels along a side both that it lies between, and weights [2, count]."""
    at = ((np.arange(count) + 0.5) * (1 / (count / available)) - 0.5).astype(np.float32)
    whole = np.floor(at)
    part = at - whole
    weights = np.rint(np.stack([np.float32(1) - part, part]) * _ONE).astype(np.int32)
    first = whole.astype(np.intp)
    return first.clip(0, available - 1), (first + 1).clip(0, available - 1), weights
