"""What a Triton request asks for, read from its tensors."""

import json

import numpy as np
import pytest

from fastface_trt.engines.manifest import EXPORT_MANIFEST, ExportManifest, read_manifest
from fastface_trt.errors import BadPicture, FastFaceError, InvalidRequest, UnknownName
from fastface_trt.mini.folders import EXPORT, SAMPLE_FACES
from fastface_trt.runtime.face import Face
from fastface_trt.runtime.images import load_picture
from fastface_trt.runtime.request import GenerationRequest
from fastface_trt.serving.triton.served import read_pictures
from tests.serving.triton.triton_server import text

FILE = (SAMPLE_FACES / "ada.png").read_bytes()
PIXELS = load_picture(FILE)


@pytest.fixture(scope="module")
def manifest():
    return read_manifest(EXPORT / EXPORT_MANIFEST, ExportManifest)


def asked(manifest, *rows, **arrays):
    if rows:
        arrays["PARAMETERS"] = text(*(json.dumps(row) for row in rows))
    count = max(len(rows), 1)
    base = {"PROMPT": text(*["a person"] * count)}
    if not any(name.startswith("FACE") for name in arrays):
        base["FACE_FILE"] = text(*[FILE] * count)
    return read_pictures(base | arrays, manifest)


def test_defaults_are_the_exports(manifest):
    (picture,) = asked(manifest)
    assert picture.request == GenerationRequest(
        "a person", steps=manifest.steps, height=96, width=96
    )
    np.testing.assert_array_equal(picture.face, PIXELS)
    assert picture.deadline is None


def test_a_preset_then_the_fields_then_the_seed(manifest):
    one, two = asked(
        manifest,
        {"preset": "am1+dcg", "steps": 3, "ip_adapter_scale": 0.5},
        {
            "preset": "dcg",
            "rescale": 0.5,
            "channel_order": "rgb",
            "face_index": 1,
            "previews": True,
        },
        SEED=np.array([[2**64 - 1], [1]], np.uint64),
    )
    base = GenerationRequest("a person", seed=2**64 - 1, steps=3, height=96, width=96)
    assert one.request == base.with_preset("am1+dcg", ip_adapter_scale=0.5)
    assert two.request.alpha == [1.0, 1.5, 1.5, 1.0]
    assert two.request.guidance_rescale == 0.5  # not the preset's
    assert two.request.seed == 1
    assert (two.channel_order, two.face_index, two.previews) == ("rgb", 1, True)


def test_what_to_dict_gives_is_taken(manifest):
    request = GenerationRequest("a person", height=96, width=96).with_preset("am2+dcg")
    fields = request.to_dict()
    fields.pop("prompt")
    (picture,) = asked(manifest, json.loads(json.dumps(fields)))
    assert picture.request.to_dict() == request.to_dict()


def test_schedules_may_be_named(manifest):
    (picture,) = asked(manifest, {"alpha": "constant:high=2", "beta": "1,2,2,1"})
    (listed,) = asked(manifest, {"alpha": [2.0] * 4, "beta": [1, 2, 2, 1]})
    assert picture.request.guidance_steps() == listed.request.guidance_steps()


def test_pixels_are_copied(manifest):
    face = PIXELS.copy()[None]
    (picture,) = asked(manifest, FACE=face)
    face[...] = 0
    np.testing.assert_array_equal(picture.face, PIXELS)


def test_an_embedding_with_its_crop_is_a_face(manifest):
    embedding = np.zeros((1, 512), np.float32)
    embedding[0, 3] = 20.0
    crop = np.full((1, 224, 224, 3), 9, np.uint8)
    (picture,) = asked(manifest, FACE_EMBEDDING=embedding, FACE_CROP_BGR=crop)
    embedding[...], crop[...] = 0, 0
    assert isinstance(picture.face, Face)
    assert picture.face.embedding_norm == 20.0
    assert picture.face.embedding[3] == 1.0
    assert picture.face.crop_bgr.min() == 9


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"no_such_field": 1}, InvalidRequest),
        ({"height": 97}, InvalidRequest),
        ({"alpha": "no_such:high=3"}, FastFaceError),
        ({"preset": "am9"}, UnknownName),
        ({"steps": 5}, InvalidRequest),
        ({"steps": "4"}, InvalidRequest),
        ({"steps": [4]}, InvalidRequest),
        ({"prompt": "another"}, InvalidRequest),
        ({"manipulation": 3}, InvalidRequest),
        ({"manipulation": {"up": 3}}, InvalidRequest),
        ({"alpha": {"a": 1}}, InvalidRequest),
        ({"rescale": "much"}, InvalidRequest),
        ({"plan": ["exact"]}, FastFaceError),
        ({"deadline": 0}, InvalidRequest),
        ({"face_index": -1}, InvalidRequest),
        ({"channel_order": "gbr"}, InvalidRequest),
        ([1], InvalidRequest),
    ],
)
def test_wrong_parameters_are_refused_in_a_sentence(row, kind, manifest):
    with pytest.raises(kind):
        asked(manifest, row)


@pytest.mark.parametrize(
    ("arrays", "kind"),
    [
        ({"PARAMETERS": text("{")}, InvalidRequest),
        ({"PARAMETERS": text("[" * 100_000)}, InvalidRequest),
        ({"PROMPT": text(b"\xff\xfe")}, InvalidRequest),
        ({"PROMPT": text("  ")}, InvalidRequest),
        ({"PROMPT": text("two", "rows")}, InvalidRequest),
        ({"FACE_FILE": text(b"not a picture")}, BadPicture),
        ({"FACE": PIXELS[None], "FACE_FILE": text(FILE)}, InvalidRequest),
        ({"FACE": PIXELS[None, :8]}, BadPicture),
        ({"FACE_EMBEDDING": np.ones((1, 512), np.float32)}, InvalidRequest),
        (
            {
                "FACE_EMBEDDING": np.zeros((1, 512), np.float32),
                "FACE_CROP_BGR": np.zeros((1, 224, 224, 3), np.uint8),
            },
            InvalidRequest,
        ),
    ],
)
def test_wrong_tensors_are_refused_in_a_sentence(arrays, kind, manifest):
    with pytest.raises(kind):
        asked(manifest, **arrays)


def test_no_face_and_two_seeds_are_refused(manifest):
    with pytest.raises(InvalidRequest, match="no face"):
        read_pictures({"PROMPT": text("a")}, manifest)
    with pytest.raises(InvalidRequest, match="twice"):
        asked(manifest, {"seed": 1}, SEED=np.array([[1]], np.uint64))


def test_pictures_of_one_request_have_one_size(manifest):
    with pytest.raises(InvalidRequest, match="sizes"):
        asked(manifest, {"height": 96}, {"height": 128})


def test_a_face_beyond_the_pixel_cap_is_refused(manifest):
    with pytest.raises(BadPicture, match="at most 1,599"):
        read_pictures(
            {"PROMPT": text("a"), "FACE": np.zeros((1, 40, 40, 3), np.uint8)},
            manifest,
            max_pixels=1599,
        )
