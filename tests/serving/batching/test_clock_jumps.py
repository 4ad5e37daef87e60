"""The wall clock jumps by days in both directions: nothing that has a time limit notices."""

import time
from time import monotonic

import pytest

from fastface_trt.serving.batching import Batcher
from fastface_trt.serving.settings import WorkerSettings
from fastface_trt.serving.work import PictureDone
from tests.serving.batching.batching_fakes import ArithmeticFastFace, Events, task
from tests.serving.http.http_parts import FACE_BYTES, ask, client_of, error_of

DAYS = 10 * 86400.0


@pytest.fixture
def jump(monkeypatch):
    """Move the wall clock by so many seconds against its true time."""
    true_time = time.time

    def jump(seconds):
        monkeypatch.setattr(time, "time", lambda: true_time() + seconds)

    return jump


@pytest.mark.parametrize("seconds", [DAYS, -DAYS])
def test_faces_rates_and_deadlines_of_requests(jump, seconds):
    with client_of(requests_per_minute=4, default_deadline=600, faces_ttl=3600) as client:
        answer = client.post("/v1/faces", files={"image": FACE_BYTES})
        assert answer.status_code == 201
        jump(seconds)
        face = answer.json()["id"]
        for _ in range(3):
            assert ask(client, face_id=face).status_code == 200
        error_of(ask(client, face_id=face), 429, "rate_limit_exceeded")


@pytest.mark.parametrize("seconds", [DAYS, -DAYS])
def test_deadlines_of_tasks(jump, seconds):
    fastface, events = ArithmeticFastFace(), Events()
    with Batcher(fastface, WorkerSettings(latency_budget=600)) as batcher:
        fastface.unet.hold()
        batcher.submit(task(fastface, "a", deadline=monotonic() + 600), events)
        fastface.unet.wait_until_held()
        jump(seconds)
        batcher.submit(task(fastface, "b", deadline=monotonic() + 600), events)
        fastface.unet.release()
        for name in "ab":
            assert isinstance(events.ending(name), PictureDone)
