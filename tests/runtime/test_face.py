import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest

from fastface_trt.errors import (
    BackendUnavailable,
    EngineFailed,
    FaceIndexOutOfRange,
    LicenceNotAcknowledged,
    NoFaceFound,
    UnknownName,
    WeightsError,
)
from fastface_trt.runtime import face as face_module
from fastface_trt.runtime.face import FaceAnalyzer, clip_pixels
from tests.helpers import face_models
from tests.helpers.face_models import draw


@pytest.fixture(autouse=True, params=["InsightFace", "ours"])
def code(request, monkeypatch):
    """Whose code runs the models: what is said of faces holds for both."""
    if request.param == "ours":
        monkeypatch.setattr(face_module, "whose_code", lambda: ("ours", "asked for"))
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return face_models.write(tmp_path_factory.mktemp("models") / "face")


@pytest.fixture
def analyzer(folder):
    return FaceAnalyzer(folder)


def scene():
    """A 640-pixel picture, so that at size 640 detector pixels are picture pixels."""
    y, x = np.mgrid[:640, :640]
    return np.stack([x // 8, y // 4, (x + y) // 8], axis=-1).astype(np.uint8)


def three_faces():
    picture = scene()
    draw(picture, (120, 120), 24, half=50)
    draw(picture, (440, 200), 32, half=100)
    draw(picture, (200, 480), 24, half=70)
    return picture


def test_largest_face_is_the_default(analyzer):
    face = analyzer.analyze(three_faces())
    assert (face.index, face.count, face.detector_size) == (0, 3, 640)
    assert face.score == pytest.approx(1)
    # The detector's anchors sit on its grid of 8 pixels inside the square.
    left, top, right, bottom = face.box
    assert right - left == pytest.approx(200, abs=2)
    assert bottom - top == pytest.approx(200, abs=2)
    assert (left + right) / 2 == pytest.approx(440, abs=16)
    assert (top + bottom) / 2 == pytest.approx(200, abs=16)
    assert face.embedding.shape == (512,)
    assert face.embedding.dtype == np.float32
    assert np.linalg.norm(face.embedding) == pytest.approx(1, abs=1e-6)
    assert face.crop_bgr.shape == (224, 224, 3)
    assert face.crop_bgr.dtype == np.uint8


def test_faces_are_ordered_by_area_and_chosen_by_index(analyzer):
    faces = analyzer.faces(three_faces())
    sides = [f.box[2] - f.box[0] for f in faces]
    assert sides == pytest.approx([200, 140, 100], abs=2)
    assert [f.index for f in faces] == [0, 1, 2]
    for i, expected in enumerate(faces):
        face = analyzer.analyze(three_faces(), index=i)
        assert face.box == expected.box
        np.testing.assert_array_equal(face.embedding, expected.embedding)
        np.testing.assert_array_equal(face.crop_bgr, expected.crop_bgr)
    assert not np.allclose(faces[0].embedding, faces[1].embedding)


@pytest.mark.filterwarnings("ignore:`estimate` is deprecated")
@pytest.mark.parametrize(("index", "told"), [(None, True), (0, False), (2, False)])
def test_of_several_faces_it_says_which_is_used_unless_one_was_asked_for(analyzer, index, told):
    face = analyzer.analyze(three_faces(), index=index)
    assert (face.warning is not None) == told
    if told:
        assert "has 3 faces; the largest is used" in face.warning
        assert f"x {round(face.box[0])} to {round(face.box[2])}" in face.warning
        assert "face_index" in face.warning


def test_equals_insightface_called_directly(analyzer, folder):
    from insightface.app import FaceAnalysis
    from insightface.utils.face_align import norm_crop

    bgr = np.ascontiguousarray(three_faces()[:, :, ::-1])
    direct = FaceAnalysis(str(folder), providers=["CPUExecutionProvider"])
    direct.prepare(ctx_id=0, det_size=(640, 640))
    theirs = max(direct.get(bgr), key=lambda f: (f.bbox[2] - f.bbox[0]) * (f.bbox[3] - f.bbox[1]))
    ours = analyzer.analyze(three_faces())
    np.testing.assert_array_equal(ours.embedding, theirs.normed_embedding)
    np.testing.assert_array_equal(ours.crop_bgr, norm_crop(bgr, theirs.kps, image_size=224))
    np.testing.assert_array_equal(ours.box, theirs.bbox)


@pytest.mark.parametrize("index", [3, 7, -1])
def test_index_out_of_range_says_how_many_there_are(analyzer, index):
    with pytest.raises(FaceIndexOutOfRange, match="picture has 3") as caught:
        analyzer.analyze(three_faces(), index=index)
    assert "0 (the largest face) to 2" in caught.value.hint


def test_no_face(analyzer):
    with pytest.raises(NoFaceFound, match="640 to 320") as caught:
        analyzer.analyze(scene())
    assert caught.value.hint
    assert analyzer.faces(scene()) == []


@pytest.mark.parametrize(
    ("until", "size"),
    [(640, 640), (639, 576), (576, 576), (512, 512), (500, 448), (400, 384), (320, 320)],
)
def test_detector_sizes_are_tried_from_the_largest(analyzer, until, size):
    picture = scene()
    draw(picture, (320, 320), 48, half=110, until=until)
    face = analyzer.analyze(picture, pad=False)
    assert face.detector_size == size
    # `half` counts at the detector's scale: the box in the picture grows as the input shrinks.
    assert face.box[2] - face.box[0] == pytest.approx(220 * 640 / size, rel=0.02)


def test_face_too_small_for_every_size_is_not_found(analyzer):
    picture = scene()
    draw(picture, (320, 320), 48, half=110, until=316)
    with pytest.raises(NoFaceFound):
        analyzer.analyze(picture)


@pytest.mark.parametrize("scale", [1, 4])
def test_padding_finds_a_face_that_fills_the_picture(tmp_path, scale):
    model = face_models.detector(needs_border=True)
    analyzer = FaceAnalyzer(face_models.write(tmp_path / "m", det=model))
    picture = np.full((320 * scale, 640 * scale, 3), 90, dtype=np.uint8)
    draw(picture, (400 * scale, 160 * scale), 64 * scale, half=80)
    with pytest.raises(NoFaceFound):
        analyzer.analyze(picture, pad=False)
    face = analyzer.analyze(picture)
    left, top, right, bottom = face.box
    # Twice as wide with its border, so a detector pixel is two of the picture's.
    assert right - left == pytest.approx(320 * scale, abs=4 * scale)
    assert (left + right) / 2 == pytest.approx(400 * scale, abs=32 * scale)
    assert (top + bottom) / 2 == pytest.approx(160 * scale, abs=32 * scale)
    # The key points moved with the box: the crop shows the square where the box has it. The box's
    # centre lies at (112, 137) of the crop, where ArcFace's template puts the models' POINTS.
    rows, columns = np.nonzero((face.crop_bgr == (255, 80, 255)).all(axis=2))
    per_pixel = np.sqrt(len(rows)) / (64 * scale)
    assert per_pixel * scale == pytest.approx(0.62, abs=0.02)
    moved = (columns.mean() - 112) / per_pixel, (rows.mean() - 137) / per_pixel
    assert moved == pytest.approx(
        (400 * scale - (left + right) / 2, 160 * scale - (top + bottom) / 2), abs=4 * scale
    )


@pytest.mark.parametrize("shape", [(16, 20_000), (20_000, 16), (1, 1)])
def test_extreme_shapes_have_no_face(analyzer, shape):
    with pytest.raises(NoFaceFound):
        analyzer.analyze(np.zeros((*shape, 3), dtype=np.uint8))


@pytest.mark.parametrize("wrong", [np.zeros((64, 64, 3)), np.zeros((64, 64), np.uint8)])
def test_other_arrays_are_refused(analyzer, wrong):
    with pytest.raises(ValueError, match="not uint8"):
        analyzer.analyze(wrong)


def test_detector_with_a_fixed_input_is_used_at_that_size(tmp_path):
    model = face_models.detector(fixed=320)
    analyzer = FaceAnalyzer(face_models.write(tmp_path / "m", det=model))
    picture = scene()
    draw(picture, (320, 320), 64, half=80)
    assert analyzer.analyze(picture).detector_size == 320


def test_provider_that_is_not_installed(folder):
    analyzer = FaceAnalyzer(folder, providers=("NoSuchExecutionProvider", "CPUExecutionProvider"))
    with pytest.raises(BackendUnavailable, match="This machine does not run on NoSuch") as caught:
        analyzer.load()
    assert caught.value.hint


def test_silent_fallback_to_the_cpu_is_an_error(folder, monkeypatch):
    import onnxruntime

    # Installed by the list, but the session comes up without it, as with a missing CUDA library.
    available = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: available)
    analyzer = FaceAnalyzer(folder, providers=("CUDAExecutionProvider",))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(BackendUnavailable, match=r"detection.*CUDAExecutionProvider"):
            analyzer.analyze(three_faces())


def test_pack_needs_its_licence_acknowledged(monkeypatch):
    monkeypatch.delenv("FASTFACE_ACCEPT_LICENCES", raising=False)
    with pytest.raises(LicenceNotAcknowledged, match="non-commercial research") as caught:
        FaceAnalyzer("buffalo_l")
    assert "FASTFACE_ACCEPT_LICENCES=1" in caught.value.hint
    FaceAnalyzer("buffalo_l", licence_acknowledged=True)
    monkeypatch.setenv("FASTFACE_ACCEPT_LICENCES", "0")
    with pytest.raises(LicenceNotAcknowledged):
        FaceAnalyzer("buffalo_l")
    monkeypatch.setenv("FASTFACE_ACCEPT_LICENCES", "1")
    FaceAnalyzer("buffalo_l")


def test_unknown_pack_and_missing_folder(tmp_path):
    with pytest.raises(UnknownName, match="buffalo_l"):
        FaceAnalyzer("bufalo_l", licence_acknowledged=True)
    for missing in [tmp_path / "none", str(tmp_path / "none"), "./none"]:
        with pytest.raises(WeightsError, match="does not exist"):
            FaceAnalyzer(missing)


def test_models_of_another_kind(tmp_path):
    small = face_models.write(tmp_path / "a", rec=face_models.recogniser(128))
    with pytest.raises(WeightsError, match="128 numbers, not 512"):
        FaceAnalyzer(small).analyze(three_faces())
    blind = face_models.write(tmp_path / "b", det=face_models.detector(outputs=6))
    with pytest.raises(WeightsError, match="no key points"):
        FaceAnalyzer(blind).analyze(three_faces())
    broken = face_models.write(tmp_path / "c", rec=face_models.recogniser(factor=np.nan))
    with pytest.raises(EngineFailed, match="not finite"):
        FaceAnalyzer(broken).analyze(three_faces())


def test_models_are_loaded_once_and_at_first_use(folder, monkeypatch):
    made = []
    opening = face_module._open_models
    monkeypatch.setattr(
        face_module, "_open_models", lambda *given: made.append(given) or opening(*given)
    )
    analyzer = FaceAnalyzer(folder)
    assert made == []
    faces, start = [], threading.Barrier(6)

    def work():
        start.wait()
        faces.append(analyzer.analyze(three_faces()))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert len(faces) == 6
    for face in faces:
        np.testing.assert_array_equal(face.embedding, faces[0].embedding)


def test_a_failed_load_can_be_tried_again(tmp_path):
    folder = face_models.write(tmp_path / "m")
    (folder / "rec.onnx").rename(folder / "rec.aside")
    analyzer = FaceAnalyzer(folder)
    with pytest.raises(WeightsError):
        analyzer.load()
    (folder / "rec.aside").rename(folder / "rec.onnx")
    assert analyzer.analyze(three_faces()).count == 3


def test_stdout_and_warnings_stay_clean(folder, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        FaceAnalyzer(folder).analyze(three_faces())
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("points", [np.zeros((5, 2)), np.full((5, 2), np.nan)])
def test_key_points_on_one_spot_are_no_face_that_can_be_aligned(tmp_path, points):
    model = face_models.detector(points=points.astype(np.float32))
    analyzer = FaceAnalyzer(face_models.write(tmp_path / "m", det=model))
    with pytest.raises(EngineFailed, match="on one spot"):
        analyzer.analyze(three_faces())


def test_importing_loads_neither_torch_nor_insightface():
    code = (
        "import sys, fastface_trt.runtime.face, fastface_trt.runtime.images, "
        "fastface_trt.runtime.picture_file, fastface_trt.runtime.tokenizer; "
        "print({'torch', 'diffusers', 'transformers', 'insightface'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.mark.parametrize("shape", [(224, 224), (112, 112), (300, 200), (201, 333), (64, 65)])
@pytest.mark.parametrize("size", [224, 64, 33])
def test_clip_pixels_equal_transformers(shape, size):
    module = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    crop = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    processor = module.CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    for order, given in [("bgr", crop), ("rgb", np.ascontiguousarray(crop[:, :, ::-1]))]:
        ours = clip_pixels(crop, size=size, mean=MEAN, std=STD, channel_order=order)
        theirs = np.asarray(processor(given, return_tensors="np")["pixel_values"][0])
        assert ours.dtype == np.float32
        assert ours.shape == (3, size, size)
        np.testing.assert_allclose(ours, theirs, atol=1e-6, rtol=0)


def test_clip_pixels_keep_bgr_by_default():
    crop = np.zeros((32, 32, 3), np.uint8)
    crop[:, :, 0] = 255  # blue, in BGR
    unit = {"mean": (0, 0, 0), "std": (1, 1, 1), "size": 32}
    assert clip_pixels(crop, **unit)[:, 0, 0].tolist() == [1, 0, 0]
    assert clip_pixels(crop, channel_order="rgb", **unit)[:, 0, 0].tolist() == [0, 0, 1]
