"""Ours beside InsightFace, OpenCV and scikit-image, which need not be installed elsewhere."""

import cv2
import numpy as np
import onnxruntime
import pytest
from insightface.model_zoo import get_model
from insightface.utils import face_align
from PIL import Image

from fastface_trt.mini.folders import FACE_MODEL, SAMPLE_FACES
from fastface_trt.runtime import face, face_files
from fastface_trt.runtime.face import DETECTOR_SIZES, FaceAnalyzer, median_similarity
from fastface_trt.runtime.face_steps import (
    TEMPLATE,
    ArcFaceRecogniser,
    ScrfdDetector,
    norm_crop,
    resize,
    similarity,
    suppress,
    warp,
)
from tests.helpers import face_models

CPU = {"providers": ["CPUExecutionProvider"]}
pytestmark = pytest.mark.filterwarnings("ignore:`estimate` is deprecated")


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def assert_same_pixels(ours, theirs):
    """To the byte; where OpenCV rounds products before it adds them, a few differ by one."""
    apart = np.abs(ours.astype(int) - theirs)
    fused = cv2.checkHardwareSupport(cv2.CPU_FMA3) if hasattr(cv2, "CPU_FMA3") else False
    assert apart.max() <= (0 if fused else 1)
    assert (apart > 0).mean() < 1e-3


@pytest.mark.parametrize(
    ("source", "size"),
    [
        ((96, 96), (640, 640)),
        ((1, 1), (640, 640)),
        ((1, 20), (640, 32)),
        ((20, 1), (32, 640)),
        ((640, 640), (640, 640)),
        ((960, 1280), (640, 480)),  # exactly half
        ((960, 1280), (640, 481)),
        ((1280, 960), (320, 320)),  # a quarter and a third
        ((2999, 4001), (576, 431)),
        ((333, 517), (448, 288)),
        ((16, 3000), (640, 3)),
        ((700, 2), (1, 384)),
    ],
)
def test_a_picture_is_resized_as_opencv_does_it_to_the_byte(source, size):
    picture = noise(*source)
    np.testing.assert_array_equal(resize(picture, size), cv2.resize(picture, size))


def test_pictures_of_any_size_are_resized_as_opencv_does_it():
    rng = np.random.default_rng(3)
    for _ in range(60):
        picture = noise(*rng.integers(1, 500, 2), seed=4)
        size = tuple(int(side) for side in rng.integers(1, 500, 2))
        np.testing.assert_array_equal(resize(picture, size), cv2.resize(picture, size))


def key_points(rng, spread=3.0):
    """Five points of a face anywhere, also beyond a picture, of 20 to 800 pixels, turned."""
    angle, size = rng.uniform(-3, 3), rng.uniform(0.2, 8)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    bent = rng.normal(0, spread, (5, 2))
    return ((TEMPLATE + bent) @ turn.T * size + rng.uniform(-300, 900, 2)).astype(np.float32)


@pytest.mark.parametrize("size", [112, 128, 224, 256])
def test_a_face_is_cut_out_as_insightface_does_it_to_the_byte(size):
    rng = np.random.default_rng(size)
    for number in range(25):
        picture, points = noise(*rng.integers(1, 900, 2), number), key_points(rng)
        theirs = face_align.norm_crop(picture, points, size)
        assert_same_pixels(norm_crop(picture, points, size), theirs)


@pytest.mark.parametrize("flat", [False, True])
def test_the_transform_is_scikit_images(flat):
    rng = np.random.default_rng(5)
    for _ in range(100):
        points = key_points(rng, spread=30)
        if flat:  # all on a line
            points[:, 1] = points[0, 1]
        theirs = face_align.estimate_norm(points)
        np.testing.assert_allclose(similarity(points, TEMPLATE), theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("beyond", [(0, 0, 0), (135, 133, 132)])
@pytest.mark.parametrize("shift", [0.0, 0.5, -90.25, 5e4, -1e9])
def test_a_warp_is_opencvs_inside_and_beyond_the_picture(beyond, shift):
    picture = noise(70, 90)
    matrix = np.array([[1.7, 0.3, shift], [-0.3, 1.7, shift / 2]])
    theirs = cv2.warpAffine(picture, matrix, (128, 128), borderValue=beyond)
    assert_same_pixels(warp(picture, matrix, 128, beyond), theirs)


def test_the_portraits_transform_is_opencvs_least_median():
    """OpenCV tries 13 pairs that it draws, so that it rarely misses the best of all ten."""
    rng = np.random.default_rng(6)
    apart = []
    for number in range(200):
        points = key_points(rng)
        if number % 3 == 0:  # one is far off
            points[rng.integers(5)] += rng.uniform(-200, 200, 2).astype(np.float32)
        theirs, _ = cv2.estimateAffinePartial2D(points, face._POINTS, method=cv2.LMEDS)
        ours = median_similarity(points, face._POINTS)
        moved = [points @ one[:, :2].T + one[:, 2] for one in (ours, theirs)]
        apart.append(np.abs(moved[0] - moved[1]).max())
    assert np.quantile(apart, 0.95) < 1e-2
    assert median_similarity(np.ones((5, 2), np.float32), face._POINTS) is None


def test_an_outlier_among_the_points_moves_no_portrait():
    exact = (face._POINTS / 2 + 40).astype(np.float32)
    wrong = exact.copy()
    wrong[3] += 60
    for points in (exact, wrong):
        expected = np.array([[2, 0, -80], [0, 2, -80]])
        np.testing.assert_allclose(median_similarity(points, face._POINTS), expected, atol=1e-3)


def test_of_overlapping_boxes_the_best_is_kept():
    boxes = [[0, 0, 99, 99, 0.9], [10, 0, 109, 99, 0.8], [60, 0, 159, 99, 0.7], [0, 0, 9, 9, 0.6]]
    assert suppress(np.array(boxes, np.float32)) == [0, 2, 3]
    assert suppress(np.zeros((0, 5), np.float32)) == []


def assert_same_detections(path, picture, sizes=DETECTOR_SIZES):
    """Returns how many faces were found."""
    theirs = get_model(str(path), static_shape_sessions=False, **CPU)
    ours = ScrfdDetector(onnxruntime.InferenceSession(str(path), **CPU))
    assert ours.static_input_size == theirs.static_input_size
    found = 0
    for size in sizes:
        size = ours.static_input_size or (size, size)
        boxes, points = ours.detect(picture, size)
        expected, expected_points = theirs.detect(picture, size)
        found += len(boxes)
        np.testing.assert_allclose(boxes, expected, rtol=0, atol=1e-4)
        assert (points is None) == (expected_points is None)
        if points is not None:
            np.testing.assert_allclose(points, expected_points, rtol=0, atol=1e-4)
    return found


def sample(name):
    return np.ascontiguousarray(np.asarray(Image.open(name).convert("RGB"))[:, :, ::-1])


@pytest.mark.parametrize("path", sorted(SAMPLE_FACES.glob("*.png")), ids=lambda path: path.stem)
def test_faces_of_the_samples_are_found_where_insightface_finds_them(path):
    assert assert_same_detections(FACE_MODEL / "detection.onnx", sample(path)) >= 1


ADA = sample(SAMPLE_FACES / "ada.png")
PAIR = np.concatenate([ADA, sample(SAMPLE_FACES / "elsa.png")], axis=1)
CROWD = np.concatenate([PAIR, PAIR[:, ::-1]])


@pytest.mark.parametrize(
    "picture",
    {
        "strip": noise(1, 320),
        "column": noise(320, 1),
        "16 pixels": noise(16, 16),
        "one pixel": noise(1, 1),
        "noise": noise(300, 500),
        "black": np.zeros((50, 60, 3), np.uint8),
        "grey": np.repeat(ADA.mean(axis=2, keepdims=True).astype(np.uint8), 3, axis=2),
        "huge": ADA.repeat(30, axis=0).repeat(30, axis=1),
        "half a face": ADA[:, : ADA.shape[1] // 2],
        "at the edge": ADA[ADA.shape[0] // 4 :, ADA.shape[1] // 5 :],
        "many": CROWD,
    }.items(),
    ids=lambda item: item[0],
)
def test_hostile_pictures_give_what_insightface_gives(picture):
    name, picture = picture
    found = assert_same_detections(FACE_MODEL / "detection.onnx", picture, (640, 320))
    assert found >= {"grey": 1, "huge": 1, "many": 4}.get(name, 0)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("outputs", [6, 9, 10, 15])
@pytest.mark.parametrize("fixed", [None, 320])
def test_every_layout_of_scrfd_is_decoded_as_insightface_does_it(tmp_path, batched, outputs, fixed):
    model = face_models.detector(outputs=outputs, batched=batched, fixed=fixed)
    folder = face_models.write(tmp_path / "m", det=model)
    picture = np.full((500, 640, 3), 60, np.uint8)
    for centre, half in (((100, 120), 50), ((420, 200), 90), ((630, 480), 70), ((4, 300), 60)):
        face_models.draw(picture[:, :, ::-1], centre, 40, half=half)
    assert assert_same_detections(folder / "det.onnx", picture) >= 3


@pytest.mark.parametrize("normalises", [False, True])
def test_both_kinds_of_recognisers_get_the_numbers_that_they_expect(tmp_path, normalises):
    rec = face_models.recogniser(normalises=normalises)
    folder = face_models.write(tmp_path / "m", rec=rec)
    files = face_files.of_folder(folder)
    assert files.normalises is normalises
    session = onnxruntime.InferenceSession(str(files.recogniser), **CPU)
    ours = ArcFaceRecogniser(session, normalises=files.normalises)
    theirs = get_model(str(files.recogniser), **CPU)
    assert ours.input_size == theirs.input_size
    np.testing.assert_array_equal(ours.get_feat(noise(112, 112)), theirs.get_feat(noise(112, 112)))


@pytest.mark.parametrize(
    "picture",
    [*(sample(path) for path in sorted(SAMPLE_FACES.glob("*.png"))), CROWD, ADA[20:, 30:]],
)
def test_whole_faces_are_insightfaces(picture, monkeypatch):
    rgb = np.ascontiguousarray(picture[:, :, ::-1])
    assert not face.whose_code()[1]
    theirs = FaceAnalyzer(FACE_MODEL, portraits=True).faces(rgb)
    monkeypatch.setattr(face, "whose_code", lambda: ("ours", "asked for"))
    ours = FaceAnalyzer(FACE_MODEL, portraits=True).faces(rgb)
    assert len(ours) == len(theirs) >= 1
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one.box, other.box, rtol=0, atol=1e-4)
        np.testing.assert_allclose(one.embedding, other.embedding, rtol=0, atol=1e-4)
        assert_same_pixels(one.crop_bgr, other.crop_bgr)
        assert one.score == pytest.approx(other.score, abs=1e-6)
        assert one.embedding_norm == pytest.approx(other.embedding_norm, rel=1e-4)
