from concurrent.futures import Future

import pytest

from fastface_trt.errors import (
    Busy,
    DeadlinePassed,
    EngineFailed,
    FaceIndexOutOfRange,
    NoFaceFound,
    OutOfMemory,
    StorageError,
    Unavailable,
)
from fastface_trt.serving.work import State
from tests.serving.http.http_parts import FACE, PROMPT, ask, client_of, error_of
from tests.serving.scripted_worker import ScriptedWorker, SecondFails

GENERATIONS = "/v1/images/generations"


@pytest.fixture(scope="module")
def client():
    with client_of() as client:
        yield client


class Failing(ScriptedWorker):
    def __init__(self, error):
        super().__init__(eager=False)
        self.error = error

    def submit(self, task, on_event):
        super().submit(task, on_event)
        self.fail(task.id, self.error)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ...}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"quality": "high"}, "quality"),
        ({"manipulation": {"up": {"power": 2, "colour": 1}}}, "manipulation.up.colour"),
        ({"n": 0}, "n"),
        ({"n": 5}, "n"),
        ({"n": "two"}, "n"),
        ({"n": 1.5}, "n"),
        ({"n": True}, "n"),
        ({"size": "1024"}, "size"),
        ({"size": "０x0"}, "size"),
        ({"response_format": "url"}, "response_format"),
        ({"output_format": "gif"}, "output_format"),
        ({"output_compression": 50}, "output_compression"),
        ({"output_format": "webp", "output_compression": 101}, "output_compression"),
        ({"output_format": "jpeg", "output_compression": -1}, "output_compression"),
        ({"partial_images": 4, "stream": True}, "partial_images"),
        ({"partial_images": 1}, "partial_images"),
        ({"seed": -2}, "seed"),
        ({"stream": "perhaps"}, "stream"),
        ({"seed": 2**64}, "seed"),
        ({"alpha": []}, "alpha"),
        ({"alpha": 10**400}, "alpha"),
        ({"ip_adapter_scale": {"left": 1.0}}, "ip_adapter_scale.left"),
        ({"rescale": 1.5}, "rescale"),
        ({"deadline": 0}, "deadline"),
        ({"deadline": 601}, "deadline"),
        ({"face": "x"}, None),
        ({"face": ...}, None),
        ({"face_id": "face_x", "face": FACE}, None),
        ({"face_url": "http://example.com/a.png"}, "face_url"),
    ],
)
def test_a_field_that_does_not_fit_is_named(client, fields, param):
    answer = ask(client, **fields)
    code = answer.json()["error"]["code"]
    assert code in ("invalid_request", "bad_picture")
    assert error_of(answer, 400, code)["param"] == param


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"prompt": "  "}, "invalid_request"),
        ({"size": "100x100"}, "invalid_request"),
        ({"steps": 5}, "invalid_request"),
        ({"alpha": [1, 2]}, "invalid_request"),
        ({"alpha": "cosine"}, "invalid_request"),
        ({"alpha": "wave:high=3"}, "unknown_name"),
        ({"preset": "am3"}, "unknown_name"),
        ({"model": "dall-e-3"}, "unknown_name"),
        ({"manipulation": {"up": {"kind": "softmask", "quantile": 2}}}, "invalid_request"),
        ({"face_id": "face_none"}, "unknown_face"),
    ],
)
def test_what_the_request_itself_refuses(client, fields, code):
    status = 404 if code == "unknown_face" else 400
    error = error_of(ask(client, **fields), status, code)
    assert error["type"] == "invalid_request_error"
    assert error["message"]


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (NoFaceFound("There is no face."), 400, "no_face_found"),
        (FaceIndexOutOfRange("There is one face."), 400, "face_index_out_of_range"),
        (Unavailable("Restarting."), 503, "unavailable"),
    ],
)
def test_errors_of_the_face(error, status, code):
    worker = ScriptedWorker()
    worker.analysis_error = error
    with client_of(worker) as client:
        answer = ask(client)
        assert error_of(answer, status, code)["message"] == str(error)
        assert error_of(client.post("/v1/faces", json={"image": FACE}), status, code)
    assert worker.submitted == []


@pytest.mark.parametrize(
    ("error", "status", "code", "kind"),
    [
        (DeadlinePassed("Too late."), 504, "deadline_passed", "server_error"),
        (Unavailable("The worker died."), 503, "unavailable", "server_error"),
        (Busy("Full."), 429, "busy", "rate_limit_error"),
        (OutOfMemory("12 GB of /dev/gpu0"), 503, "out_of_memory", "server_error"),
        (EngineFailed("NaN in /srv/unet"), 500, "internal_error", "server_error"),
        (StorageError("/var is full"), 500, "internal_error", "server_error"),
    ],
)
def test_errors_of_the_worker(error, status, code, kind, caplog):
    with client_of(Failing(error)) as client:
        answer = ask(client)
    told = error_of(answer, status, code)
    assert told["type"] == kind
    assert ("retry-after" in answer.headers) == (status in (429, 503))
    if code in ("internal_error", "out_of_memory"):
        assert "/" not in told["message"]
        assert answer.headers["x-request-id"] in told["message"]
        failures = [r for r in caplog.records if r.getMessage() == "a request failed"]
        assert [failure.exc_info[1] for failure in failures] == [error]


def test_a_mistake_of_ours_is_a_generic_500(caplog):
    class Broken(ScriptedWorker):
        def submit(self, task, on_event):
            raise KeyError("secret words")

    with client_of(Broken()) as client:
        answer = ask(client)
    assert "secret" not in error_of(answer, 500, "internal_error")["message"]
    assert any(record.exc_info for record in caplog.records)


def test_one_picture_of_several_that_fails_ends_the_others():
    with client_of(SecondFails(eager=False)) as client:
        error_of(ask(client, n=3), 500, "internal_error")
    worker = client.worker
    assert set(worker.cancelled) == {worker.submitted[0].id, worker.submitted[2].id}
    assert worker.open == {}


@pytest.mark.parametrize("state", [State.STARTING, State.DRAINING, State.DEAD])
def test_a_worker_that_is_not_ready_is_503_before_the_body_is_read(client, state):
    client.worker.state = state
    try:
        answer = client.post(GENERATIONS, content=b"not even JSON")
    finally:
        client.worker.state = State.READY
    error_of(answer, 503, "unavailable")
    assert int(answer.headers["retry-after"]) >= 1


def test_a_full_queue_lets_none_of_several_pictures_in():
    with client_of(ScriptedWorker(eager=False, capacity=2)) as client:
        answer = ask(client, n=3)
        error_of(answer, 429, "busy")
        assert answer.headers["retry-after"] == "8"
    assert len(client.worker.submitted) == 2
    assert client.worker.open == {}


def test_while_the_queue_is_as_full_as_when_it_refused_no_face_is_looked_at():
    with client_of(ScriptedWorker(capacity=0)) as client:
        for _ in range(3):
            error_of(ask(client), 429, "busy")
        assert len(client.worker.analysed) == 1


@pytest.mark.parametrize(
    ("content", "kind", "status", "code"),
    [
        (b"{", "application/json", 400, "invalid_request"),
        (b"[1]", "application/json", 400, "invalid_request"),
        (b'{"prompt": "\\ud800"}', "application/json", 400, "invalid_request"),
        (b"[" * 100_000, "application/json", 400, "invalid_request"),
        (b'{"\\ud800": 1, "prompt": "x"}', "application/json", 400, "invalid_request"),
        (b'{"prompt": "x", "alpha": NaN}', "application/json", 400, "invalid_request"),
        (b"prompt=x", "application/x-www-form-urlencoded", 415, "unsupported_media_type"),
        (b"", "", 415, "unsupported_media_type"),
    ],
)
def test_bodies_that_are_none(client, content, kind, status, code):
    answer = client.post(GENERATIONS, content=content, headers={"Content-Type": kind})
    error_of(answer, status, code)


@pytest.mark.parametrize(
    "content",
    [b"", b"--x", b"--x\r\nContent-Disposition: form-data\r\n\r\n\r\n--x--", b"\x00" * 100],
)
def test_forms_that_are_none(client, content):
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    error_of(client.post("/v1/images/edits", content=content, headers=kind), 400, "invalid_request")
    bare = {"Content-Type": "multipart/form-data"}
    error_of(client.post("/v1/images/edits", content=content, headers=bare), 400, "invalid_request")


@pytest.mark.parametrize(
    ("data", "files"),
    [
        ({"prompt": [PROMPT, PROMPT]}, {"image": b"x"}),
        ({"prompt": PROMPT, "alpha": "1", "alpha[]": "2"}, {"image": b"x"}),
        ({"prompt": PROMPT, "alpha[x]": "1", "alpha[]": "2"}, {"image": b"x"}),
        ({"prompt": PROMPT, "n": "two"}, {"image": b"x"}),
        ({"prompt": PROMPT, "n": "[" * 5000}, {"image": b"x"}),
        ({"prompt": PROMPT}, {"mask": b"x"}),
        ({"prompt": PROMPT}, [("image", b"x"), ("image", b"y")]),
    ],
)
def test_forms_with_fields_that_do_not_fit(client, data, files):
    error_of(client.post("/v1/images/edits", data=data, files=files), 400, "invalid_request")


def test_addresses_and_methods_that_are_none(client):
    error_of(client.get("/v1/nothing"), 404, "not_found")
    error_of(client.get(GENERATIONS), 405, "method_not_allowed")
    error_of(client.get("/v1/presets/"), 404, "not_found")


def test_a_body_that_is_too_large():
    with client_of(max_body_bytes=1000) as client:
        error_of(client.post(GENERATIONS, content=b"x" * 2000), 413, "request_too_large")
        chunks = (b"x" * 100 for _ in range(20))
        kind = {"Content-Type": "application/json"}
        streamed = client.post(GENERATIONS, content=chunks, headers=kind)
        error_of(streamed, 413, "request_too_large")


def test_too_many_requests_in_work():
    with client_of(max_requests=1) as client:
        context = client.app.state.context
        with context.admission.enter("somebody"):
            answer = ask(client)
        error_of(answer, 503, "overloaded")
        assert "retry-after" in answer.headers
        assert ask(client).status_code == 200


def test_a_silent_worker_does_not_hold_a_request_past_its_deadline(monkeypatch):
    monkeypatch.setattr("fastface_trt.serving.http.tasks.GRACE", 0.0)
    with client_of(ScriptedWorker(eager=False)) as client:
        error_of(ask(client, deadline=0.2), 504, "deadline_passed")
    assert client.worker.open == {}
    worker = ScriptedWorker()
    worker.analysis = Future()
    with client_of(worker) as client:
        error_of(ask(client, deadline=0.2), 504, "deadline_passed")
    assert worker.analysis.cancelled()
