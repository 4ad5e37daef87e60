import base64
import io

import numpy as np
import pytest
from PIL import Image

from fastface_trt.errors import Busy, DeadlinePassed, EngineFailed
from fastface_trt.serving.http.images import partial_steps
from tests.serving.http.http_parts import FACE_BYTES, PROMPT, ask, client_of, error_of, events_of
from tests.serving.scripted_worker import PIXELS, PREVIEW, ScriptedWorker


def pixels_of(event):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(event["b64_json"]))))


def test_every_step_then_the_picture():
    with client_of() as client:
        answer = ask(client, stream=True, seed=3)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-request-id"].startswith("req_")
    events = events_of(answer.text)
    assert [name for name, _ in events] == [
        *["image_generation.progress"] * 4,
        "image_generation.completed",
    ]
    assert all(data["type"] == name for name, data in events)
    assert [(data["step"], data["steps"], data["index"]) for _, data in events[:4]] == [
        (step, 4, 0) for step in (1, 2, 3, 4)
    ]
    completed = events[-1][1]
    assert np.array_equal(pixels_of(completed), PIXELS)
    assert completed["seed"] == completed["parameters"]["seed"] == 3
    assert completed["usage"]["pictures"] == 1
    assert not client.worker.submitted[0].previews


@pytest.mark.parametrize("wanted", [1, 2, 3])
def test_previews_on_request(wanted):
    with client_of() as client:
        events = events_of(ask(client, stream=True, partial_images=wanted, n=2).text)
    for index in (0, 1):
        partial = [
            data
            for name, data in events
            if name == "image_generation.partial_image" and data["index"] == index
        ]
        assert [data["partial_image_index"] for data in partial] == list(range(wanted))
        assert all(np.array_equal(pixels_of(data), PREVIEW) for data in partial)
        assert {data["preview_size"] for data in partial} == {"12x8"}


def test_steps_of_previews():
    assert partial_steps(4, 0) == {}
    assert partial_steps(4, 1) == {2: 0}
    assert partial_steps(4, 3) == {1: 0, 2: 1, 3: 2}
    assert partial_steps(2, 3) == {1: 0}
    assert partial_steps(1, 3) == {}
    assert list(partial_steps(30, 3).values()) == [0, 1, 2]
    assert max(partial_steps(30, 3)) < 30


def test_events_of_edits_are_named_after_them():
    with client_of() as client:
        answer = client.post(
            "/v1/images/edits",
            data={"prompt": PROMPT, "stream": "true", "partial_images": "1"},
            files={"image": FACE_BYTES},
        )
    assert {name for name, _ in events_of(answer.text)} == {
        "image_edit.progress",
        "image_edit.partial_image",
        "image_edit.completed",
    }


def test_errors_before_the_first_event_are_ordinary_answers():
    with client_of(ScriptedWorker(capacity=0)) as client:
        error_of(ask(client, stream=True, preset="no"), 400, "unknown_name")
        error_of(ask(client, stream=True), 429, "busy")


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (DeadlinePassed("Too late."), "deadline_passed", "Too late."),
        (EngineFailed("NaN in /srv"), "internal_error", None),
        (Busy("Full."), "busy", "Full."),
    ],
)
def test_errors_afterwards_are_the_last_event(error, code, told, caplog):
    class FailsAfterAStep(ScriptedWorker):
        def submit(self, task, on_event):
            super().submit(task, on_event)
            self.step(task.id)
            if len(self.submitted) == 2:
                self.fail(task.id, error)

    with client_of(FailsAfterAStep(eager=False)) as client:
        answer = ask(client, stream=True, n=2)
    events = events_of(answer.text)
    assert client.worker.open == {}  # the other one was cancelled
    assert answer.status_code == 200
    name, data = events[-1]
    assert name == data["type"] == "error"
    assert data["error"]["code"] == code
    assert told in (None, data["error"]["message"])
    assert "/srv" not in answer.text
    failures = [r for r in caplog.records if r.getMessage() == "a request failed"]
    assert len(failures) == (code == "internal_error")


def test_silence_is_filled(monkeypatch):
    monkeypatch.setattr("fastface_trt.serving.http.images.HEARTBEAT", 0.01)
    monkeypatch.setattr("fastface_trt.serving.http.tasks.GRACE", 0.0)
    with client_of(ScriptedWorker(eager=False)) as client:
        answer = ask(client, stream=True, deadline=0.3)
    assert answer.text.startswith(": still working\n\n")
    assert events_of(answer.text)[-1][1]["error"]["code"] == "deadline_passed"
