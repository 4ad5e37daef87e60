"""Clients that leave, at every stage, against a real server on a loopback port."""

import json
import threading
from concurrent.futures import Future

import pytest

from fastface_trt.serving.http.app import create_app
from fastface_trt.serving.settings import ServerSettings
from tests.serving.http.http_parts import FACE, PROMPT, mini_manifest
from tests.serving.loopback import connect, read_to_end, serving, wait_until
from tests.serving.scripted_worker import ScriptedWorker, make_face

PATH = "/v1/images/generations"


@pytest.fixture
def worker():
    return ScriptedWorker(eager=False)


@pytest.fixture
def server(worker):
    app = create_app(worker, ServerSettings(), mini_manifest())
    with serving(app) as port:
        yield app, port
        wait_until(lambda: app.state.context.admission.in_work == 0)
        assert worker.open == {}
    app.state.context.close()


def request(**fields):
    body = json.dumps({"prompt": PROMPT, "face": FACE, **fields}).encode()
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def outcomes(app):
    text = app.state.context.metrics.text().decode()
    return [line for line in text.splitlines() if PATH in line and "requests_total" in line]


def test_while_the_body_is_sent(server, worker):
    app, port = server
    connection = connect(port, request()[:1000])
    wait_until(lambda: app.state.context.admission.bodies == 1)
    assert app.state.context.admission.in_work == 0
    connection.close()
    wait_until(lambda: app.state.context.admission.bodies == 0)
    assert worker.analysed == []
    assert ['status="499"' in line for line in outcomes(app)] == [True]


def test_while_the_face_is_looked_for(server, worker):
    worker.analysis = Future()
    connection = connect(server[1], request())
    wait_until(lambda: worker.analysed)
    connection.close()
    wait_until(worker.analysis.cancelled)
    assert worker.submitted == []


@pytest.mark.parametrize("stream", [False, True])
def test_while_a_task_is_being_submitted(server, worker, stream):
    inside, go_on = threading.Event(), threading.Event()
    submit = worker.submit

    def slowly(task, on_event):
        inside.set()
        assert go_on.wait(20)
        submit(task, on_event)

    worker.submit = slowly
    connection = connect(server[1], request(n=3, stream=stream))
    assert inside.wait(20)
    connection.close()
    wait_until(lambda: server[0].state.context.admission.in_work == 0)
    go_on.set()
    wait_until(lambda: worker.cancelled.count(worker.submitted[0].id if worker.submitted else ""))
    wait_until(lambda: not worker.open)
    assert len(worker.submitted) == 1  # the others never went in


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("steps_done", [0, 2])
def test_while_the_pictures_are_made(server, worker, stream, steps_done):
    connection = connect(server[1], request(n=2, stream=stream))
    wait_until(lambda: len(worker.submitted) == 2)
    for _ in range(steps_done):
        worker.step(worker.submitted[0].id)
    connection.close()
    wait_until(lambda: not worker.open)
    assert sorted(worker.cancelled) == sorted(task.id for task in worker.submitted)
    wait_until(lambda: outcomes(server[0]))
    assert ['status="499"' in line for line in outcomes(server[0])] == [True]


def test_after_the_first_of_two_pictures(server, worker):
    connection = connect(server[1], request(n=2))
    wait_until(lambda: len(worker.submitted) == 2)
    first, second = (task.id for task in worker.submitted)
    worker.finish(first)
    connection.close()
    wait_until(lambda: not worker.open)
    assert worker.cancelled == [second]


def test_a_client_that_stays_gets_its_picture_while_another_leaves(server, worker):
    leaving, staying = (connect(server[1], request(seed=seed)) for seed in (1, 2))
    wait_until(lambda: len(worker.submitted) == 2)
    leaving.close()
    wait_until(lambda: len(worker.cancelled) == 1)
    (task,) = (task for task, _ in worker.open.values())
    assert task.request.seed == 2
    worker.finish(task.id)
    staying.settimeout(20)
    assert staying.recv(12) == b"HTTP/1.1 200"
    staying.close()


def test_an_answer_before_the_body_frees_the_request(server, worker):
    worker.analysis = Future()
    worker.analysis.set_result(make_face())
    data = request().replace(b"application/json", b"text/plain")
    with connect(server[1], data) as connection:
        connection.shutdown(1)
        assert read_to_end(connection).startswith(b"HTTP/1.1 415")
