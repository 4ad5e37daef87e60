"""The official client of OpenAI, against a real server on a loopback port."""

import base64
import io

import openai
import pytest
from PIL import Image

from fastface_trt.serving.http.app import create_app
from fastface_trt.serving.settings import ServerSettings
from tests.serving.http.http_parts import FACE, FACE_BYTES, PROMPT, mini_manifest
from tests.serving.loopback import serving
from tests.serving.scripted_worker import PIXELS, ScriptedWorker

KEY = "a-key-of-ours"


@pytest.fixture(scope="module")
def server():
    worker = ScriptedWorker()
    app = create_app(worker, ServerSettings(api_keys=(KEY,)), mini_manifest())
    with serving(app) as port:
        yield port, worker, app.state.context.admission
    app.state.context.close()


@pytest.fixture
def worker(server):
    _, worker, admission = server
    yield worker
    worker.capacity = 100
    admission._refused.clear()


@pytest.fixture
def client(server):
    with openai.OpenAI(
        api_key=KEY, base_url=f"http://127.0.0.1:{server[0]}/v1", max_retries=0
    ) as client:
        yield client


def size_of(b64_json):
    return Image.open(io.BytesIO(base64.b64decode(b64_json))).size


def test_generate(client, worker):
    answer = client.images.generate(
        prompt=PROMPT,
        n=2,
        size="128x96",
        response_format="b64_json",
        user="somebody",
        extra_body={"face": FACE, "preset": "am1+dcg", "seed": 5, "alpha": [1, 2, 2, 1]},
    )
    assert [size_of(one.b64_json) for one in answer.data] == [PIXELS.shape[1::-1]] * 2
    assert answer.output_format == "png"
    assert answer.usage.total_tokens == 0
    assert answer.data[1].parameters["image_index"] == 1
    request = worker.submitted[-1].request
    assert (request.seed, request.width, request.alpha) == (5, 128, [1, 2, 2, 1])


def test_edit(client, worker):
    answer = client.images.edit(
        image=("ada.png", FACE_BYTES),
        prompt=PROMPT,
        n=1,
        size="auto",
        output_format="webp",
        output_compression=80,
        extra_body={
            "seed": 6,
            "beta": [1, 3, 3, 1],
            "manipulation": {"up": {"kind": "scale_power", "scale": 1.5}},
        },
    )
    assert size_of(answer.data[0].b64_json) == PIXELS.shape[1::-1]
    assert answer.output_format == "webp"
    request = worker.submitted[-1].request
    assert request.seed == 6
    assert request.beta == [1, 3, 3, 1]
    assert request.manipulation.up.scale == 1.5


def test_every_field_of_the_client_at_its_neutral_value(client):
    fields = {"n": 1, "quality": "auto", "size": "auto", "background": "auto", "user": "somebody"}
    fields |= {"output_format": "png", "output_compression": 100, "response_format": "b64_json"}
    fields |= {"safety_identifier": "a hash", "stream": False, "partial_images": 0, "model": "mini"}
    for background in ("auto", "opaque", None):
        fields["background"] = background
        made = client.images.generate(
            prompt=PROMPT, moderation="auto", style="vivid", extra_body={"face": FACE}, **fields
        )
        edited = client.images.edit(
            image=FACE_BYTES, prompt=PROMPT, input_fidelity="high", **fields
        )
        assert size_of(made.data[0].b64_json) == size_of(edited.data[0].b64_json)


def test_what_the_client_can_ask_for_and_is_not_done_here(client):
    for fields, param in (
        ({"mask": FACE_BYTES}, "mask"),
        ({"image": [FACE_BYTES, FACE_BYTES]}, "image"),
        ({"background": "transparent"}, "background"),
        ({"quality": "high"}, "quality"),
        ({"output_format": "svg"}, "output_format"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.images.edit(**{"image": FACE_BYTES, "prompt": PROMPT} | fields)
        assert (caught.value.code, caught.value.param) == ("invalid_request", param)


def test_edit_takes_the_one_picture_of_a_list(client):
    assert client.images.edit(image=[FACE_BYTES], prompt=PROMPT).data


def test_stream_of_generate(client):
    with client.images.generate(
        prompt=PROMPT, stream=True, partial_images=2, extra_body={"face": FACE}
    ) as stream:
        events = list(stream)
    kinds = [event.type for event in events]
    assert kinds.count("image_generation.progress") == 4
    partial = [one for one in events if one.type == "image_generation.partial_image"]
    assert [one.partial_image_index for one in partial] == [0, 1]
    assert size_of(partial[0].b64_json) == (12, 8)
    assert events[-1].type == "image_generation.completed"
    assert isinstance(events[-1], openai.types.ImageGenCompletedEvent)
    assert size_of(events[-1].b64_json) == PIXELS.shape[1::-1]
    assert events[-1].usage.total_tokens == 0


def test_stream_of_edit(client):
    with client.images.edit(
        image=FACE_BYTES, prompt=PROMPT, stream=True, partial_images=1
    ) as stream:
        events = list(stream)
    assert isinstance(events[-1], openai.types.ImageEditCompletedEvent)
    assert [e.type for e in events].count("image_edit.partial_image") == 1


def test_models(client):
    (model,) = client.models.list().data
    assert model.id == "mini"
    assert client.models.retrieve("mini") == model
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-image-1")
    assert client.images.generate(prompt=PROMPT, model=model.id, extra_body={"face": FACE}).data


def test_its_errors(client, worker):
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(prompt=PROMPT, quality="high", extra_body={"face": FACE})
    assert (caught.value.code, caught.value.param) == ("invalid_request", "quality")
    assert caught.value.request_id.startswith("req_")
    with pytest.raises(openai.NotFoundError):
        client.images.generate(prompt=PROMPT, extra_body={"face_id": "face_none"})
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="no-key").models.list()
    worker.capacity = 0
    with pytest.raises(openai.RateLimitError) as limited:
        client.images.generate(prompt=PROMPT, extra_body={"face": FACE})
    assert limited.value.response.headers["retry-after"] == "8"
    with pytest.raises(openai.RateLimitError):
        client.images.generate(prompt=PROMPT, stream=True, extra_body={"face": FACE})


def test_an_error_in_the_midst_of_a_stream(client, worker):
    from fastface_trt.errors import DeadlinePassed

    submit = worker.submit

    def late(task, on_event):
        worker.eager = False
        submit(task, on_event)
        worker.step(task.id)
        worker.fail(task.id, DeadlinePassed("Too late."))

    worker.submit = late
    try:
        stream = client.images.generate(prompt=PROMPT, stream=True, extra_body={"face": FACE})
        with pytest.raises(openai.APIError, match="Too late"):
            list(stream)
    finally:
        del worker.submit
        worker.eager = True
