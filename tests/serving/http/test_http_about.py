"""What a server tells of itself: models, presets, health, metrics, logs, traces, its document."""

import base64
import hashlib
import html
import json
import logging
import re

import pytest
from prometheus_client.parser import text_string_to_metric_families

from fastface_trt.runtime.presets import PRESETS
from fastface_trt.runtime.request import request_for
from fastface_trt.serving.http.logs import LOGGER, JsonLines
from fastface_trt.serving.http.reference import reference_page
from fastface_trt.serving.http.tracing import Spans
from fastface_trt.serving.work import State
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
from tests.serving.loopback import wait_until
from tests.serving.scripted_worker import ScriptedWorker, SecondFails


@pytest.fixture
def client():
    with client_of(app_options={"backend": "onnxruntime"}) as client:
        yield client


def metrics_of(client):
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(client.get("/metrics").text)
        for sample in family.samples
    }


def test_the_model(client):
    (model,) = client.get("/v1/models").json()["data"]
    assert model["id"] == model["checkpoint"] == "mini"
    assert model["size"] == "96x96"
    assert model["backend"] == "onnxruntime"
    assert model["steps"] in model["allowed_steps"]
    width = 96 + model["size_unit"]
    assert ask(client, size=f"{width}x96").status_code == 200
    assert ask(client, size=f"{width + 1}x96").status_code == 400


@pytest.mark.parametrize("name", PRESETS)
def test_the_fields_of_a_preset_are_the_preset(client, name):
    presets = {one["name"]: one["fields"] for one in client.get("/v1/presets").json()["data"]}
    assert set(presets) == set(PRESETS)
    assert ask(client, seed=0, **presets[name]).status_code == 200
    named = request_for(mini_manifest(), PROMPT, preset=name)
    assert client.worker.submitted[-1].request.to_dict() == named.to_dict()


def test_a_model_by_its_name_and_by_further_ones():
    with client_of(model_names=("gpt-image-1", "an/other")) as client:
        listed = client.get("/v1/models").json()["data"]
        assert [one["id"] for one in listed] == ["mini", "gpt-image-1", "an/other"]
        for one in listed:
            assert client.get(f"/v1/models/{one['id']}").json() == one
            assert ask(client, model=one["id"]).status_code == 200
        for path in ("/v1/models/dall-e-3", "/v1/models/"):
            error = error_of(client.get(path), 404, "model_not_found")
            assert "mini" in error["message"]
        error = error_of(ask(client, model="dall-e-3"), 400, "unknown_name")
        assert error["param"] == "model"


@pytest.mark.parametrize("path", ["/v2/health/ready", "/health", "/healthz"])
@pytest.mark.parametrize("state", State)
def test_readiness_is_the_workers(client, state, path):
    client.worker.state = state
    answer = client.get(path)
    assert answer.status_code == (200 if state is State.READY else 503)
    assert answer.json() == {"state": state.value}
    assert client.get("/v2/health/live").status_code == 200
    if path != "/v2/health/ready":
        assert client.head(path).status_code == answer.status_code


def test_metrics_count_requests_and_tasks_and_read_the_worker(client):
    ask(client, n=2)
    ask(client, prompt="")
    client.get("/v1/nothing/at/all")
    client.get("/v1/faces/face_x")
    found = metrics_of(client)
    route = ("route", "/v1/images/generations")
    for status, count in (("200", 1), ("400", 1)):
        labels = (("method", "POST"), route, ("status", status))
        assert found["fastface_requests_total", labels] == count
    assert found[
        "fastface_requests_total", (("method", "GET"), ("route", "other"), ("status", "404"))
    ]
    assert found["fastface_tasks_total", (("outcome", "picture"),)] == 2
    assert found["fastface_stage_seconds_sum", (("stage", "total"),)] == 2 * 0.875
    assert found["fastface_stage_seconds_count", (("stage", "queue"),)] == 2
    assert found["fastface_unet_calls_total", ()] == 8
    assert found["fastface_rows_per_call", ()] == 3
    assert found["fastface_state", (("state", "ready"),)] == 1
    assert found["fastface_state", (("state", "dead"),)] == 0
    assert found["fastface_requests_in_work", ()] == 1  # the one that reads them


def test_metrics_of_what_waits():
    with client_of(SecondFails(eager=False)) as client:
        ask(client, n=2)
        wait_until(lambda: not client.worker.open)
        client.post("/v1/faces", files={"image": FACE_BYTES})
        found = metrics_of(client)
    assert found["fastface_tasks_total", (("outcome", "cancelled"),)] == 1
    assert found["fastface_tasks_total", (("outcome", "engine_failed"),)] == 1
    assert found["fastface_tasks_waiting", ()] == 0
    assert found["fastface_registered_faces", ()] == 1


def lines_of(caplog):
    return [
        json.loads(JsonLines().format(record))
        for record in caplog.records
        if record.name.startswith(LOGGER)
    ]


def test_one_line_per_request_and_nobodys_words_in_it(client, caplog):
    caplog.set_level(logging.INFO, LOGGER)
    answer = ask(client, n=2, user="somebody", negative_prompt="blurred")
    (line,) = lines_of(caplog)
    assert line["id"] == answer.headers["x-request-id"]
    assert (line["route"], line["status"]) == ("/v1/images/generations", 200)
    assert (line["tasks"], line["outcome"]) == (2, "ok")
    assert line["ms"] > 0
    ask(client, preset="secret words")
    ask(client, stream=True)
    told = [line["outcome"] for line in lines_of(caplog)]
    assert told == ["ok", "unknown_name", "ok"]
    text = json.dumps(lines_of(caplog))
    assert not any(word in text for word in (PROMPT, "blurred", "secret", "somebody", FACE[:40]))


def test_probes_are_not_worth_a_line(client, caplog):
    caplog.set_level(logging.INFO, LOGGER)
    for path in ("/metrics", "/v2/health/live", "/v2/health/ready"):
        client.get(path)
    assert lines_of(caplog) == []


def test_a_failure_is_told_by_its_place_and_not_by_its_text(caplog):
    class Broken(ScriptedWorker):
        def submit(self, task, on_event):
            raise KeyError(task.request.prompt)

    with client_of(Broken()) as client:
        answer = ask(client)
    (failure,) = (line for line in lines_of(caplog) if line["message"] == "a request failed")
    assert failure["id"] == answer.headers["x-request-id"]
    assert failure["error"] == "KeyError"
    assert "submit" in failure["traceback"][-1]
    assert PROMPT not in json.dumps(lines_of(caplog))


def test_prompts_only_when_asked_for(caplog):
    caplog.set_level(logging.INFO, LOGGER)
    with client_of(log_prompts=True) as client:
        ask(client)
    assert lines_of(caplog)[-1]["prompt"] == PROMPT


def test_traces_are_children_of_the_clients_and_hold_no_words():
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    with client_of(app_options={"tracing": Spans(exporter)}) as client:
        parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        body = {"prompt": PROMPT, "face": FACE, "n": 2}
        path = "/v1/images/generations"
        answer = client.post(path, json=body, headers={"traceparent": parent})
    (span,) = exporter.get_finished_spans()  # sent when the server stopped
    assert span.name == f"POST {path}"
    assert f"{span.parent.span_id:016x}" == "b7ad6b7169203331"
    assert span.attributes["fastface.request_id"] == answer.headers["x-request-id"]
    assert span.attributes["fastface.tasks"] == 2
    assert [event.attributes["denoise_seconds"] for event in span.events] == [0.5, 0.5]
    assert PROMPT not in span.to_json()


def test_the_document_has_bodies_answers_and_errors(client):
    document = client.get("/openapi.json").json()
    names = document["components"]["schemas"]
    operations = {
        (path, method): operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }
    for operation in operations.values():
        assert "422" not in operation["responses"]
        for status, response in operation["responses"].items():
            if int(status) >= 400 and status != "503":
                schema = response["content"]["application/json"]["schema"]
                assert schema["$ref"].endswith("/ErrorAnswer")
    body = operations["/v1/images/generations", "post"]["requestBody"]
    assert body["content"]["application/json"]["schema"]["$ref"].endswith("/GenerationBody")
    assert names["GenerationBody"]["additionalProperties"] is False
    ours = names["GenerationBody"]["properties"]
    assert all("description" in field for field in ours.values())
    form = operations["/v1/images/edits", "post"]["requestBody"]["content"]["multipart/form-data"]
    assert form["schema"]["properties"]["image"]["format"] == "binary"
    assert "face" not in form["schema"]["properties"]
    assert "HTTPValidationError" not in names
    text = json.dumps(document)
    used = {name for name in names if f'"#/components/schemas/{name}"' in text}
    assert used == set(names)


def test_the_document_says_where_keys_are_needed():
    with client_of(api_keys=("a-long-key",)) as client:
        paths = client.get("/openapi.json").json()["paths"]
    assert paths["/v1/models"]["get"]["security"] == [{"key": []}]
    assert "security" not in paths["/v2/health/ready"]["get"]


def test_events_of_a_stream_are_what_the_document_names(client):
    document = client.get("/openapi.json").json()
    told = document["paths"]["/v1/images/generations"]["post"]["responses"]["200"]
    assert "text/event-stream" in told["content"]
    for name, _ in events_of(ask(client, stream=True, partial_images=1).text):
        assert name in told["description"]


def test_the_reference_shows_every_operation_and_field_of_the_document(client):
    document = client.get("/openapi.json").json()
    page = html.unescape(re.sub(r"<[^>]*>", " ", client.get("/docs").text))
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert f"{method.upper()} {path}" in page
            assert operation["summary"] in page
    for name, schema in document["components"]["schemas"].items():
        for word in (name, *schema["properties"]):
            assert re.search(rf"\b{word}\b", page), word
        for field in schema["properties"].values():
            assert field.get("description", "") in page


def test_the_reference_is_closed_and_complete_in_itself(client):
    answer = client.get("/docs")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "script" not in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert not re.search(r"<script|\son\w+=|\sstyle=|\ssrc=|https?://", answer.text)
    targets = set(re.findall(r'href="([^"]*)"', answer.text))
    assert targets - {"openapi.json"} <= {
        f"#{name}" for name in re.findall(r'id="(\w+)"', answer.text)
    }
    style = re.search("<style>(.*)</style>", answer.text, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in answer.headers["content-security-policy"]
    assert client.get("/docs/oauth2-redirect").status_code == 404
    assert client.get("/redoc").status_code == 404


def test_words_of_the_document_are_no_markup_in_the_reference():
    evil = "<b>&\"'"
    document = {
        "info": dict.fromkeys(("title", "version", "description"), evil),
        "paths": {evil: {"get": {"summary": evil, "responses": {"200": {"description": evil}}}}},
        "components": {"schemas": {evil: {"properties": {evil: {"const": evil}}}}},
    }
    assert evil[:3] not in reference_page(document)


@pytest.mark.parametrize("path", ["/v1/models", "/nothing", "/metrics", "/openapi.json"])
def test_no_answer_is_taken_for_another_type(client, path):
    assert client.get(path).headers.get_list("x-content-type-options") == ["nosniff"]
