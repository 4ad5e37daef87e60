"""Requests as clients that were made for other servers write them.

Which fields, and how they are written, is in the public sources of LibreChat's image tools, Open
WebUI's image router, OpenAI's package and its documentation, and vLLM-Omni's and diffusers' names.
"""

import base64
import io
import re

import pytest
from PIL import Image

from tests.serving.http.http_parts import FACE, FACE_BYTES, PROMPT, ask, client_of, error_of
from tests.serving.scripted_worker import PIXELS

EDITS = "/v1/images/edits"
ONE = [("image", ("face.png", FACE_BYTES, "image/png"))]
LIST = [("image[]", ("face.png", FACE_BYTES, "image/png"))]
NEUTRAL = [
    {"quality": "auto"},
    {"quality": "standard", "style": "vivid"},
    {"background": "auto"},
    {"background": "opaque"},
    {"moderation": "auto"},
    {"moderation": "low"},
    {"output_format": "png", "output_compression": 100},
    {"input_fidelity": "high"},
    {"input_fidelity": "low"},
    {"response_format": "b64_json"},
    {"user": "somebody", "safety_identifier": "a hash"},
    {"stream": False, "partial_images": 0},
    {"size": "auto", "n": 1, "model": "mini"},
]
NAMES = (
    *("quality", "background", "moderation", "output_format", "output_compression", "size", "n"),
    *("input_fidelity", "style", "response_format", "user", "safety_identifier", "stream", "model"),
    *("partial_images", "mask", "markup", "svg", "complexity", "frame_count", "frame_duration_ms"),
    *("seed", "negative_prompt", "steps", "num_inference_steps", "face_id", "face_url"),
)


@pytest.fixture(scope="module")
def client():
    with client_of() as client:
        yield client


def edit(client, files=ONE, **fields):
    return client.post(EDITS, data={"prompt": PROMPT, **fields}, files=files)


def last(client):
    return client.worker.submitted[-1].request


@pytest.mark.parametrize("fields", NEUTRAL, ids=str)
def test_a_field_that_asks_for_nothing_changes_nothing(client, fields):
    assert ask(client, seed=5).status_code == 200
    plain = last(client)
    assert ask(client, seed=5, **fields).status_code == 200
    assert last(client) == plain
    answer = edit(client, seed=5, **{name: str(value) for name, value in fields.items()})
    assert answer.status_code == 200, answer.text
    assert last(client) == plain


@pytest.mark.parametrize("name", NAMES)
def test_null_and_empty_text_are_a_field_that_was_left_out(client, name):
    ask(client, seed=5)
    plain = last(client)
    seed = {} if name == "seed" else {"seed": 5}
    for nothing in (None, ""):
        assert ask(client, face=FACE, **seed, **{name: nothing}).status_code == 200
        assert name == "seed" or last(client) == plain
    for nothing in ("null", "", "undefined", "None"):
        answer = edit(client, **seed, **{name: nothing})
        assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("quality", "high", "preset or steps"),
        ("quality", "hd", "preset or steps"),
        ("background", "transparent", "none with a transparent background"),
        ("style", "natural", "in the prompt"),
        ("response_format", "url", "b64_json"),
        ("mask", "aGVsbG8=", "none is repainted"),
        ("frame_count", 4, "do not move"),
        ("width", 96, "size"),
        ("guidance_scale", 1.5, "alpha and beta"),
        ("ip_adaptor_scale", 0.5, "Did you mean ip_adapter_scale?"),
        ("promt", "x", "Did you mean prompt?"),
        ("negativePrompt", "x", "Did you mean negative_prompt?"),
        ("ip_adaptor_scale", "", "Did you mean ip_adapter_scale?"),
        ("colour", "red", "/docs"),
    ],
)
def test_what_is_not_done_here_is_refused_with_the_reason(client, name, value, reason):
    for answer in (ask(client, **{name: value}), edit(client, **{name: str(value)})):
        error = error_of(answer, 400, "invalid_request")
        assert error["param"] == name
        assert name in error["message"]
        assert reason in error["message"]


def test_a_misspelled_field_inside_another_has_its_nearest_name_too(client):
    error = error_of(ask(client, manipulation={"up": {"scal": 1.5}}), 400, "invalid_request")
    assert "Did you mean manipulation.up.scale?" in error["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"n": "2", "seed": "7", "steps": "4"},
        {"n": 2.0, "seed": 7.0, "steps": 4},
        {"n": 2, "seed": 7, "num_inference_steps": 4},
    ],
    ids=str,
)
def test_numbers_may_be_text(client, fields):
    for answer in (ask(client, **fields), edit(client, **{k: str(v) for k, v in fields.items()})):
        assert answer.status_code == 200, answer.text
        assert [one["seed"] for one in answer.json()["data"]] == [7, 7]


@pytest.mark.parametrize("value", ["true", "True", "1", "on"])
def test_a_stream_is_asked_for_in_any_of_these_ways(client, value):
    """`requests.post(data={"stream": True})` sends True; JavaScript sends true."""
    for answer in (edit(client, stream=value), ask(client, stream=value), ask(client, stream=1)):
        assert answer.headers["content-type"].startswith("text/event-stream")
    for no in ("false", "False", "0"):
        assert edit(client, stream=no).headers["content-type"] == "application/json"


def test_without_a_seed_every_request_has_another_which_the_answer_tells(client):
    seeds = []
    for fields in ({}, {"seed": None}, {"seed": -1}, {"seed": "-1"}):
        (first, second) = ask(client, n=2, **fields).json()["data"]
        assert first["seed"] == second["seed"] == first["parameters"]["seed"] == last(client).seed
        assert 0 <= first["seed"] < 2**32
        seeds.append(first["seed"])
    assert len(set(seeds)) == 4
    assert ask(client, seed=2**64 - 1).json()["data"][0]["seed"] == 2**64 - 1
    assert ask(client, seed=0).json()["data"][0]["seed"] == 0
    assert error_of(ask(client, seed=2**64), 400, "invalid_request")["param"] == "seed"


def test_the_forms_of_librechat_and_open_webui(client):
    for fields, files in (
        ({"model": "mini", "quality": "auto", "size": "auto"}, LIST),
        ({"model": "mini", "n": "1", "size": "96x96", "response_format": "b64_json"}, ONE),
        ({"model": "mini", "n": "1", "background": "auto", "response_format": "b64_json"}, ONE),
    ):
        answer = edit(client, files, **fields)
        assert answer.status_code == 200, answer.text
        assert answer.json()["background"] == "opaque"


@pytest.mark.parametrize("name", ["image", "image[]", "image[0]"])
def test_the_file_of_a_form_has_any_of_these_names(client, name):
    answer = edit(client, [(name, ("face.png", FACE_BYTES, "image/png"))])
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("files", "param"),
    [
        ([*ONE, ("mask", ("mask.png", FACE_BYTES, "image/png"))], "mask"),
        ([*ONE, *LIST], "image"),
        ([*LIST, *LIST, *LIST], "image"),
        ([("picture", ("face.png", FACE_BYTES, "image/png"))], "picture"),
    ],
)
def test_a_file_that_is_of_no_use_is_named(client, files, param):
    error = error_of(edit(client, files), 400, "invalid_request")
    assert error["param"] == param
    assert param in error["message"]


def raw_form(*parts):
    """A form's body as a browser writes it."""
    body = b"".join(
        b"--x\r\nContent-Disposition: form-data; " + head.encode() + b"\r\n\r\n" + data + b"\r\n"
        for head, data in parts
    )
    return {
        "content": body + b"--x--\r\n",
        "headers": {"Content-Type": "multipart/form-data; boundary=x"},
    }


def test_files_that_nobody_chose_in_a_pages_form_are_none(client):
    answer = client.post(
        EDITS,
        **raw_form(
            ('name="image"; filename="face.png"', FACE_BYTES),
            ('name="prompt"', PROMPT.encode()),
            ('name="mask"; filename=""', b""),
            ('name="image"; filename=""', b""),
        ),
    )
    assert answer.status_code == 200, answer.text


PICTURE = f"data:image/png;base64,{FACE}"


@pytest.mark.parametrize(
    "fields",
    [
        {"image": FACE},
        {"image": PICTURE},
        {"image": [PICTURE]},
        {"images": [{"image_url": PICTURE}]},
        {"images": [{"image_url": {"url": PICTURE}}], "mask": None},
        {"face": FACE},
    ],
)
def test_the_picture_of_a_json_body(client, fields):
    before = len(client.worker.analysed)
    for path in (EDITS, "/v1/images/generations"):
        answer = client.post(path, json={"prompt": PROMPT, **fields})
        assert answer.status_code == 200, answer.text
    assert len(client.worker.analysed) == before + 2
    answer = client.post(
        EDITS, **raw_form(('name="prompt"', b"x"), ('name="image"', b"" + FACE.encode()))
    )
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"images": [PICTURE, PICTURE]}, "images"),
        ({"image": PICTURE, "face": FACE}, "image"),
        ({"images": [{"file_id": "file_x"}]}, "images"),
        ({"image": 5}, "image"),
        ({"image": "https://example.com/a.png"}, "face_url"),
    ],
)
def test_pictures_of_a_json_body_that_cannot_be_used(client, fields, param):
    answer = client.post(EDITS, json={"prompt": PROMPT, **fields})
    assert error_of(answer, 400, "invalid_request")["param"] == param


@pytest.mark.parametrize(
    "written",
    [
        lambda text: re.sub("(.{76})", r"\1\n", text),
        lambda text: text.replace("+", "-").replace("/", "_").rstrip("="),
        lambda text: f"data:image/jpg;charset=utf-8;base64,{text}",
    ],
)
def test_base64_of_a_face_however_it_is_written(client, written):
    assert ask(client, face=written(FACE)).status_code == 200
    assert client.post("/v1/faces", json={"image": written(FACE)}).status_code == 201


@pytest.mark.parametrize("form", ["png", "jpeg", "jpg", "webp"])
def test_the_files_of_an_answer_are_what_was_asked_for(client, form):
    fields = {} if form == "png" else {"output_compression": "40"}
    answer = edit(client, output_format=form, **fields).json()
    with Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"]))) as picture:
        assert answer["output_format"] == picture.format.lower() == form.replace("jpg", "jpeg")
        assert picture.size == PIXELS.shape[1::-1]


def test_a_registered_picture_of_two_people_says_so_once_and_with_every_picture():
    from dataclasses import replace

    from tests.serving.scripted_worker import ScriptedWorker, make_face

    class Looking(ScriptedWorker):
        def analyze(self, pixels, index=None, owner=""):
            future = super().analyze(pixels, index)
            found = replace(make_face(index=index or 0), by_index=index is not None)
            future = type(future)()
            future.set_result(found)
            return future

    with client_of(Looking()) as client:
        one = client.post("/v1/faces", json={"image": FACE}).json()
        assert "has 2 faces; the largest is used" in one["warnings"][0]
        chosen = client.post("/v1/faces", json={"image": FACE, "face_index": 1}).json()
        assert chosen["warnings"] == []
        ask(client, face_id=one["id"])
        assert client.worker.submitted[-1].face.warning == one["warnings"][0]
