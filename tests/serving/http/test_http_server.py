"""The life of a server process: signals, drain, death."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest

from fastface_trt.errors import InvalidRequest
from fastface_trt.serving.http import server
from fastface_trt.serving.http.server import HUNG, STOPPED, WORKER_DIED
from fastface_trt.serving.settings import ServerSettings
from tests.serving.http.http_parts import FACE, PROMPT

SERVER = Path(__file__).parents[1] / "serve_scripted.py"


@contextlib.contextmanager
def running(kind, **environment):
    """A server process; `.url` and `.lines`, its log."""
    process = subprocess.Popen(
        [sys.executable, str(SERVER), kind],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    try:
        process.lines = []
        for line in process.stderr:
            process.lines.append(json.loads(line))
            if process.lines[-1]["message"] == "listening":
                break
        process.url = process.lines[-1]["address"]
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", process.url)
        yield process
    finally:
        process.kill()
        process.communicate()


def left(process):
    """Exit status and what it printed at the end."""
    out, err = process.communicate(timeout=60)
    process.lines += [json.loads(line) for line in err.splitlines()]
    return process.returncode, out.strip()


class Asking(threading.Thread):
    """A request in work, whose answer is looked at afterwards."""

    def __init__(self, process, **fields):
        super().__init__()
        self.process, self.fields, self.answer = process, fields, None
        self.start()

    def run(self):
        body = {"prompt": PROMPT, "face": FACE, **self.fields}
        url = f"{self.process.url}/v1/images/generations"
        self.answer = httpx.post(url, json=body, timeout=60)

    def joined(self):
        self.join(60)
        assert self.answer is not None
        return self.answer


def wait_for_tasks(process, count):
    gauge = f"fastface_tasks_waiting {count}.0"
    while gauge not in httpx.get(f"{process.url}/metrics", timeout=60).text:
        pass


def test_sigterm_lets_pictures_on_their_way_end():
    with running("patient") as process:
        asking = [Asking(process, n=2), Asking(process, stream=True)]
        wait_for_tasks(process, 3)
        process.send_signal(signal.SIGTERM)
        assert [one.joined().status_code for one in asking] == [200, 200]
        assert len(asking[0].answer.json()["data"]) == 2
        assert asking[1].answer.text.endswith("}\n\n")
        assert "image_generation.completed" in asking[1].answer.text
        assert left(process) == (STOPPED, "closed")
    messages = [line["message"] for line in process.lines]
    assert messages.index("draining") < messages.index("stopped")
    assert "the worker is dead" not in messages


def test_what_outlives_the_drain_ends_with_an_answer_and_the_server_is_unready_meanwhile():
    with running("deaf") as process:
        asking = Asking(process)
        wait_for_tasks(process, 1)
        process.send_signal(signal.SIGTERM)
        answer = asking.joined()
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "unavailable"
        assert left(process) == (STOPPED, "closed")


def test_while_it_drains_it_takes_nothing_and_says_so():
    with running("deaf", FASTFACE_TEST_DRAIN="30") as process:
        asking = Asking(process)
        wait_for_tasks(process, 1)
        process.send_signal(signal.SIGTERM)
        while (ready := httpx.get(f"{process.url}/v2/health/ready")).status_code == 200:
            pass
        assert ready.json() == {"state": "draining"}
        assert httpx.get(f"{process.url}/v2/health/live").status_code == 200
        refused = httpx.post(f"{process.url}/v1/images/generations", json={})
        assert refused.status_code == 503
        assert "retry-after" in refused.headers
        process.send_signal(signal.SIGTERM)  # the second one does not wait
        assert left(process) == (STOPPED, "closed")
        asking.join(60)


def test_a_dead_worker_ends_the_process_for_its_supervisor():
    with running("dying") as process:
        asking = Asking(process)
        assert left(process) == (WORKER_DIED, "closed")
        assert asking.joined().status_code == 503
    assert "the worker is dead" in [line["message"] for line in process.lines]


def test_a_worker_that_hangs_does_not_keep_the_process(monkeypatch):
    with running("stuck", FASTFACE_TEST_CLOSE="0.2") as process:
        process.send_signal(signal.SIGTERM)
        assert left(process)[0] == HUNG


def test_what_is_refused_before_it_is_a_request_is_counted():
    with running("patient") as process, contextlib.ExitStack() as stack:
        address = ("127.0.0.1", int(process.url.rpartition(":")[2]))
        for _ in range(300):
            stack.enter_context(socket.create_connection(address))
        other = stack.enter_context(socket.create_connection(address, None, ("127.0.0.2", 0)))
        other.sendall(b"GET / HTTP/2.0\r\n\r\n")
        assert other.recv(100).startswith(b"HTTP/1.1 505")
        third = httpx.HTTPTransport(local_address="127.0.0.3")
        with httpx.Client(transport=third, timeout=60) as client:
            text = client.get(f"{process.url}/metrics").text
        process.send_signal(signal.SIGTERM)
        assert left(process) == (STOPPED, "closed")
    refused = dict(re.findall(r'before_requests_total{reason="(\w+)"} (\S+)', text))
    assert refused.keys() == {"505", "connection"}
    assert 1 <= float(refused["connection"]) <= 100  # of 300, where 200 may be open
    messages = [line["message"] for line in process.lines]
    assert sum("connections are refused" in one for one in messages) == 1  # and no line for each


def test_everybody_is_let_in_only_on_purpose():
    for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost"):
        server.check_binding(ServerSettings(host=host), allow_anonymous=False)
    for host in ("0.0.0.0", "::", "192.168.1.2", "example.com", ""):
        settings = ServerSettings(host=host)
        with pytest.raises(InvalidRequest, match="API keys"):
            server.check_binding(settings, allow_anonymous=False)
        server.check_binding(settings, allow_anonymous=True)
        keyed = ServerSettings(host=host, api_keys=("a-long-key",))
        server.check_binding(keyed, allow_anonymous=False)


def test_a_port_that_is_taken_is_said_so():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InvalidRequest, match=f"127.0.0.1 port {port}"):
            server.listen(ServerSettings(port=port))
    with pytest.raises(InvalidRequest, match="cannot listen"):
        server.listen(ServerSettings(host="no such host"))
