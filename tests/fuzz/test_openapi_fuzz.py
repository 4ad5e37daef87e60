"""Requests made from our own OpenAPI document, and from what it forbids, against a whole server.

The worker is scripted, so that a request takes milliseconds; HTTP, bodies, pictures and errors are
the real ones. Whatever is sent, the answer is one that the document has, in time, and never 5xx:
but for 504 where the request itself names a deadline that nobody could meet.
"""

import io
import json
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastface_trt.serving.http.app import create_app
from fastface_trt.serving.http.protocol import guarded_protocol
from fastface_trt.serving.settings import ServerSettings
from tests.serving.http.http_parts import FACE, FACE_BYTES, PROMPT, mini_manifest
from tests.serving.loopback import serving
from tests.serving.scripted_worker import ScriptedWorker

pytestmark = pytest.mark.serving
schemathesis = pytest.importorskip("schemathesis")
EXAMPLES = 250
SECONDS = 30
SETTINGS = ServerSettings(max_picture_pixels=1_000_000, max_connections_per_address=None)
WITH_BODY = ("POST /v1/images/generations", "POST /v1/images/edits", "POST /v1/faces")
PLAIN = (
    "GET /v1/faces",
    "DELETE /v1/faces/{id}",
    "GET /v1/models",
    "GET /v1/models/{id}",
    "GET /v1/presets",
    "GET /v2/health/live",
    "GET /v2/health/ready",
    "GET /metrics",
)


@pytest.fixture(scope="module")
def server():
    """The document, and the server's address."""
    app = create_app(ScriptedWorker(), SETTINGS, mini_manifest())
    with serving(app, lifespan="on", http=guarded_protocol(SETTINGS)) as port:
        address = f"http://127.0.0.1:{port}"
        schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
        operations = {one.ok().label: one.ok() for one in schema.get_all_operations()}
        assert set(operations) == {*WITH_BODY, *PLAIN}
        yield operations, address


def checks(answer):
    """What must hold for an answer; schemathesis reads a stream's schema as that of each event."""
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi import checks

    streamed = answer.headers["content-type"][0].startswith("text/event-stream")
    return (
        not_a_server_error,
        checks.status_code_conformance,
        checks.content_type_conformance,
        checks.response_headers_conformance,
        *(() if streamed else (checks.response_schema_conformance,)),
    )


def named_deadline(case):
    return isinstance(case.body, dict) and "deadline" in case.body


def run(server, label, mode, change=None):
    """Send `EXAMPLES` requests; how many ended with which status."""
    operations, address = server
    statuses = Counter()

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operations[label].as_strategy(generation_mode=mode), data=st.data())
    def send(case, data):
        if change is not None:
            change(case, data.draw)
        answer = case.call(base_url=address, timeout=SECONDS)
        statuses[answer.status_code] += 1
        assert "x-request-id" in answer.headers
        late = answer.status_code == 504 and named_deadline(case)
        case.validate_response(answer, checks=checks(answer)[1 if late else 0 :])

    send()
    print(f"{label}, {mode.value}: {statuses.total()} requests, {dict(statuses)}")
    return statuses


@pytest.mark.parametrize("label", PLAIN)
def test_addresses_without_a_body(server, label):
    assert run(server, label, schemathesis.GenerationMode.POSITIVE)


@pytest.mark.parametrize("label", WITH_BODY)
@pytest.mark.parametrize("mode", ["POSITIVE", "NEGATIVE"])
def test_bodies_that_the_document_allows_or_forbids(server, label, mode):
    statuses = run(server, label, schemathesis.GenerationMode[mode])
    assert set(statuses) <= {200, 201, 400, 404, 413, 415, 504}


@pytest.mark.parametrize("label", WITH_BODY)
def test_bodies_that_come_near_a_good_one(server, label):
    """A face that is there, and only some of the other fields, so that many get a picture."""

    def change(case, draw):
        if not isinstance(case.body, dict):
            return
        kept = draw(st.sets(st.sampled_from(sorted(case.body)), max_size=2)) if case.body else set()
        case.body = {name: value for name, value in case.body.items() if name in kept}
        if label == "POST /v1/images/generations":
            case.body |= {"prompt": PROMPT, "face": FACE}
        elif case.media_type == "application/json":
            case.body["image"] = FACE
        else:
            case.body["image"] = FACE_BYTES
            if "edits" in label:
                case.body["prompt"] = PROMPT

    statuses = run(server, label, schemathesis.GenerationMode.POSITIVE, change)
    assert statuses[201 if "faces" in label else 200] > EXAMPLES / 10


def test_pictures_that_are_hostile(server):
    """The corpus through the front door."""
    import httpx

    from tests.fuzz.make_hostile import hostile

    statuses = Counter()
    with httpx.Client(base_url=server[1], timeout=SECONDS) as client:
        for name, data in hostile().items():
            file = {"image": (name, io.BytesIO(data), "image/png")}
            for answer in (
                client.post("/v1/faces", files=file),
                client.post("/v1/images/edits", files=file, data={"prompt": PROMPT}),
            ):
                statuses[answer.status_code] += 1
                if answer.status_code not in (200, 201):
                    assert answer.status_code == 400, (name, answer.text)
                    assert json.loads(answer.content)["error"]["code"] in (
                        "bad_picture",
                        "invalid_request",
                    )
    print(f"hostile pictures: {statuses.total()} requests, {dict(statuses)}")
    assert statuses[200] == statuses[201] > 10
