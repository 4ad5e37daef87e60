import base64
import io

import numpy as np
import pytest
from PIL import Image

from fastface_trt.runtime.guidance import NamedSchedule
from fastface_trt.runtime.manipulation import AttentionManipulation, PartManipulation
from fastface_trt.runtime.picture_file import DIGITAL_SOURCE_TYPE, read_parameters
from fastface_trt.runtime.request import request_for
from tests.serving.http.http_parts import (
    FACE,
    FACE_BYTES,
    PROMPT,
    ask,
    client_of,
    error_of,
    events_of,
    mini_manifest,
)
from tests.serving.scripted_worker import PIXELS, ScriptedWorker


@pytest.fixture(scope="module")
def client():
    with client_of() as client:
        yield client


def last_request(client):
    return client.worker.submitted[-1].request


def test_a_picture_comes_back_as_a_marked_png(client, tmp_path):
    answer = ask(client, seed=7).json()
    (picture,) = answer["data"]
    data = base64.b64decode(picture["b64_json"])
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), PIXELS)
    assert DIGITAL_SOURCE_TYPE.encode() in data
    path = tmp_path / "picture.png"
    path.write_bytes(data)
    assert read_parameters(path) == picture["parameters"]
    assert picture["seed"] == picture["parameters"]["seed"] == 7
    assert picture["warnings"] == ["a warning"]
    assert picture["seconds"] == {"queue": 0.25, "denoise": 0.5, "decode": 0.125}
    assert answer["usage"]["pictures"] == 1
    assert answer["usage"]["unet_samples"] == last_request(client).unet_samples


@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_other_formats_are_marked_too(client, tmp_path, format):
    sizes = []
    for quality in (30, None, 100):
        answer = ask(client, output_format=format, output_compression=quality).json()
        assert answer["output_format"] == format
        (picture,) = answer["data"]
        data = base64.b64decode(picture["b64_json"])
        sizes.append(len(data))
        assert DIGITAL_SOURCE_TYPE.encode() in data
        path = tmp_path / "picture"
        path.write_bytes(data)
        assert read_parameters(path) == picture["parameters"]
        with Image.open(path) as image:
            assert (image.format, image.size) == (format.upper(), PIXELS.shape[1::-1])
    assert sizes == sorted(set(sizes))
    events = events_of(ask(client, stream=True, partial_images=1, output_format=format).text)
    shown = [data for _, data in events if "b64_json" in data]
    assert [data["output_format"] for data in shown] == [format] * 2
    for data in shown:
        with Image.open(io.BytesIO(base64.b64decode(data["b64_json"]))) as image:
            assert image.format == format.upper()


def test_a_png_takes_the_compression_that_loses_nothing(client):
    assert ask(client, output_format="png", output_compression=100).status_code == 200


def test_parameters_that_no_jpeg_holds_are_refused(client):
    answer = ask(client, prompt="\U0001f600" * 8000, output_format="jpeg")
    assert "too long for a JPEG" in error_of(answer, 400, "invalid_request")["message"]


def test_without_the_mark_when_the_operator_says_so():
    with client_of(ai_mark=False) as client:
        data = base64.b64decode(ask(client).json()["data"][0]["b64_json"])
    assert DIGITAL_SOURCE_TYPE.encode() not in data


def test_a_bare_request_is_the_one_that_the_library_makes(client):
    seed = ask(client).json()["data"][0]["seed"]
    assert last_request(client) == request_for(mini_manifest(), PROMPT, seed=seed)
    assert client.worker.submitted[-1].channel_order == "bgr"


def test_every_field_reaches_the_request(client):
    part = {"kind": "softmask", "scale": [1.0, 1.5, 1.5, 1.5], "sharpness": 7.5}
    ask(
        client,
        seed=2**64 - 1,
        negative_prompt="blurred",
        preset="am1+dcg",
        steps=4,
        size="128x96",
        ip_adapter_scale={"down": 0.5, "up": 1},
        alpha="cosine:high=3",
        beta=[1, 2.0, 2, 1],
        guidance_rescale=None,
        dcg_variant=3,
        manipulation={"up": part},
        scope="branch",
        plan="lean",
        channel_order="rgb",
    )
    assert last_request(client) == request_for(
        mini_manifest(),
        PROMPT,
        steps=4,
        width=128,
        height=96,
        seed=2**64 - 1,
        negative_prompt="blurred",
        ip_adapter_scale={"down": 0.5, "up": 1.0},
        alpha=NamedSchedule("cosine", 3.0),
        beta=[1.0, 2.0, 2.0, 1.0],
        guidance_rescale=None,
        dcg_variant=3,
        manipulation=AttentionManipulation(up=PartManipulation(**part)),
        scope="branch",
        plan="lean",
    )
    assert client.worker.submitted[-1].channel_order == "rgb"


def test_what_a_picture_tells_of_itself_can_be_asked_again(client):
    ask(client, preset="am2+dcg", seed=5)
    first = last_request(client)
    told = first.to_dict()
    names = (
        "alpha",
        "beta",
        "guidance_rescale",
        "manipulation",
        "seed",
        "scope",
        "plan",
        "dcg_variant",
    )
    assert ask(client, **{name: told[name] for name in names}).status_code == 200
    assert last_request(client).to_dict() == told


def test_n_pictures_differ_only_in_their_number(client):
    answer = ask(client, n=3, seed=9).json()
    tasks = client.worker.submitted[-3:]
    assert [task.request.image_index for task in tasks] == [0, 1, 2]
    assert {task.request.seed for task in tasks} == {9}
    assert [one["parameters"]["image_index"] for one in answer["data"]] == [0, 1, 2]
    assert answer["usage"]["pictures"] == 3


def test_pictures_are_in_order_whichever_is_done_first():
    class Backwards(ScriptedWorker):
        def submit(self, task, on_event):
            super().submit(task, on_event)
            if len(self.open) == 3:
                for name in reversed(list(self.open)):
                    self.finish(name)

    with client_of(Backwards(eager=False)) as client:
        answer = ask(client, n=3).json()
    assert [one["parameters"]["image_index"] for one in answer["data"]] == [0, 1, 2]


def test_a_form_is_the_same_request(client):
    fields = {"prompt": "123", "n": "1", "seed": "4", "rescale": "0.5", "size": "auto"}
    nested = {"alpha[]": ["1", "2", "2", "1"], "manipulation[up][kind]": "scale_power"}
    answer = client.post(
        "/v1/images/edits",
        data=fields | nested | {"manipulation[up][scale]": "1.5", "beta": "linear:high=2"},
        files={"image": ("anything.png", FACE_BYTES)},
    )
    assert answer.status_code == 200, answer.text
    assert last_request(client) == request_for(
        mini_manifest(),
        "123",
        seed=4,
        guidance_rescale=0.5,
        alpha=[1, 2, 2, 1],
        beta=NamedSchedule("linear", 2.0),
        manipulation=AttentionManipulation(up=PartManipulation("scale_power", scale=1.5)),
    )
    pixels, index = client.worker.analysed[-1]
    assert np.array_equal(pixels, np.asarray(Image.open(io.BytesIO(FACE_BYTES)).convert("RGB")))
    assert index is None


def test_a_large_file_of_a_form_stays_in_memory(client, monkeypatch):
    def on_disk(*arguments, **options):
        raise AssertionError("a face was written to the disk")

    monkeypatch.setattr("tempfile.SpooledTemporaryFile.rollover", on_disk)
    noise = np.random.default_rng(0).integers(0, 256, (900, 900, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    assert len(file.getvalue()) > 2**21
    answer = client.post(
        "/v1/images/edits", data={"prompt": PROMPT}, files={"image": file.getvalue()}
    )
    assert answer.status_code == 200, answer.text


def test_the_face_may_be_a_data_url_and_chosen_by_size(client):
    assert ask(client, face=f"data:image/png;base64,{FACE}", face_index=3).status_code == 200
    assert client.worker.analysed[-1][1] == 3


def test_a_task_has_its_deadline_on_the_monotonic_clock(client):
    import time

    before = time.monotonic()
    ask(client, deadline=33.5)
    named = client.worker.submitted[-1].deadline
    ask(client)
    default = client.worker.submitted[-1].deadline
    after = time.monotonic()
    assert before + 33.5 <= named <= after + 33.5
    assert before + 120 <= default <= after + 120


def test_task_ids_begin_with_the_id_of_the_request(client):
    answer = ask(client, n=2)
    name = answer.headers["x-request-id"]
    assert [task.id for task in client.worker.submitted[-2:]] == [f"{name}-0", f"{name}-1"]


def test_a_file_and_another_face_are_one_too_many(client):
    answer = client.post(
        "/v1/images/edits",
        data={"prompt": PROMPT, "face_id": "face_x"},
        files={"image": FACE_BYTES},
    )
    assert "image, face_id" in error_of(answer, 400, "invalid_request")["message"]
