"""Hundreds of clients that wait for events of pictures that do not come."""

import contextlib
import json
import threading
import time

import httpx
import psutil
import pytest

from fastface_trt.serving.http import images
from fastface_trt.serving.http.app import create_app
from fastface_trt.serving.http.protocol import guarded_protocol
from fastface_trt.serving.settings import ServerSettings
from tests.serving.http.http_parts import FACE_BYTES, PROMPT, mini_manifest
from tests.serving.loopback import connect, read_to_end, serving, wait_until
from tests.serving.scripted_worker import ScriptedWorker

pytestmark = pytest.mark.serving
STREAMS = 500
KEYS = tuple(f"the-key-of-{number}" for number in range(10))
BEAT = b": still working\n\n"


def request_with(port, key):
    """The bytes of a request for a stream, with a face that the key registered."""
    sent = httpx.post(
        f"http://127.0.0.1:{port}/v1/faces",
        files={"image": FACE_BYTES},
        headers={"Authorization": f"Bearer {key}"},
    )
    fields = {"prompt": PROMPT, "face_id": sent.json()["id"], "stream": True}
    body = json.dumps(fields)
    head = (
        "POST /v1/images/generations HTTP/1.1",
        *("Host: x", f"Authorization: Bearer {key}", "Content-Type: application/json"),
        f"Content-Length: {len(body)}",
    )
    return ("\r\n".join(head) + "\r\n\r\n" + body).encode()


def test_idle_streams_cost_others_nothing_and_leave_nothing(monkeypatch):
    monkeypatch.setattr(images, "HEARTBEAT", 1.0)  # ten times as many as there would be
    settings = ServerSettings(
        api_keys=KEYS, max_requests=2 * STREAMS, max_connections_per_address=None
    )
    worker = ScriptedWorker(eager=False, capacity=10 * STREAMS)
    app = create_app(worker, settings, mini_manifest())
    protocol = guarded_protocol(settings)
    with serving(app, lifespan="on", http=protocol) as port, contextlib.ExitStack() as stack:
        requests = [request_with(port, key) for key in KEYS]
        before, threads = psutil.Process().memory_info().rss, threading.active_count()
        streams = []
        for number in range(STREAMS):
            streams.append(stack.enter_context(connect(port, requests[number % len(KEYS)])))
            wait_until(lambda: len(worker.open) == len(streams), 60)
        assert psutil.Process().memory_info().rss - before < STREAMS * 500_000
        assert threading.active_count() - threads < 40

        probe = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        waits = []
        for _ in range(20):
            began = time.monotonic()
            with connect(port, probe) as connection:
                assert read_to_end(connection).startswith(b"HTTP/1.1 200")
            waits.append(time.monotonic() - began)
        assert sorted(waits)[10] < 1, waits

        for one in streams[::50]:  # and they are told that it goes on
            answer = b""
            while BEAT not in answer:
                part = one.recv(65536)
                assert part
                answer += part
        for one in streams:
            one.close()
        wait_until(lambda: not worker.open and not protocol.open_connections.open, 120)
        wait_until(lambda: not app.state.context.admission.in_work)
        assert len(worker.cancelled) == STREAMS
