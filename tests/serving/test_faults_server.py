"""What goes wrong around a whole server: killed workers, damaged engines, full disks, signals.

Whoever survives gets the picture that a single run gives.
"""

import asyncio
import os
import shutil
import signal
import threading
from time import monotonic, sleep

import psutil
import pytest

from benchmarks.load.client import ask
from benchmarks.load.requests import pictures
from benchmarks.load.run import GENERATE, register_face
from benchmarks.load.server import serve
from fastface_trt import FastFace
from fastface_trt.engines.cache import EngineCache

pytestmark = pytest.mark.serving
PATIENCE = 120


@pytest.fixture(scope="module")
def made():
    with FastFace.load("mini") as fastface:
        return pictures(fastface)


def workers_of(server):
    return [
        child
        for child in psutil.Process(server.process.pid).children()
        if any("serving.workers.child" in part for part in child.cmdline())
    ]


async def everything(address, made, *, while_running=lambda: None, count=24):
    """Ask for `count` pictures at once; do something as soon as the first is there."""
    face = await register_face(address)
    asked = [made[index % len(made)] for index in range(count)]
    tasks = [
        asyncio.create_task(ask(address, "POST", GENERATE, {**one.fields, "face_id": face}))
        for one in asked
    ]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    while_running()
    return asked, await asyncio.gather(*tasks)


def assert_right(asked, answers):
    for picture, answer in zip(asked, answers, strict=True):
        assert answer.status == 200, answer.body
        (data,) = answer.json()["data"]
        assert picture.equals(data["b64_json"])


@pytest.mark.parametrize("count", [1, 2])
def test_a_worker_is_killed_in_the_middle(made, count):
    with serve("--workers", str(count), "--threads", "1") as server:
        address = server.wait_until_ready()
        (first, *_) = workers_of(server)
        asked, answers = asyncio.run(everything(address, made, while_running=first.kill))
        assert_right(asked, answers)
        until = monotonic() + PATIENCE
        while len(workers_of(server)) < count and monotonic() < until:
            asyncio.run(asyncio.sleep(0.05))
        assert first.pid not in {worker.pid for worker in workers_of(server)}
        assert len(workers_of(server)) == count
        assert server.stop() == 0


def test_sigterm_under_load_finishes_what_was_begun(made):
    with serve() as server:
        address = server.wait_until_ready()

        def terminate():
            server.process.send_signal(signal.SIGTERM)

        asked, answers = asyncio.run(everything(address, made, while_running=terminate))
        assert_right(asked, answers)
        assert server.process.wait(timeout=PATIENCE) == 0
        assert asyncio.run(ask(address, "GET", "/v2/health/live")).status == 0


def test_a_server_that_is_killed_leaves_no_worker_behind(made):
    with serve("--workers", "2", "--threads", "1") as server:
        server.wait_until_ready()
        workers = workers_of(server)
        assert len(workers) == 2
        server.process.kill()
        _, alive = psutil.wait_procs(workers, timeout=PATIENCE)
        assert not alive


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_worker_computes_on_for_a_server_that_has_gone(made, number):
    """The engine is in one call of minutes, in which a worker reads no message and no signal."""
    huge = {"prompt": "photo", "size": "2048x2048", "steps": 1}
    options = ("--threads", "1", "--drain-seconds", "1", "--max-output-pixels", str(2048**2))
    with serve(*options) as server:
        address = server.wait_until_ready()
        (worker,) = workers_of(server)
        huge["face_id"] = asyncio.run(register_face(address))
        asked = threading.Thread(
            target=lambda: asyncio.run(ask(address, "POST", GENERATE, huge)), daemon=True
        )
        before = worker.cpu_times().user
        asked.start()
        until = monotonic() + PATIENCE
        while worker.cpu_times().user < before + 3 and monotonic() < until:
            sleep(0.05)
        assert asked.is_alive()
        server.process.send_signal(number)
        _, alive = psutil.wait_procs([worker], timeout=15 if number == signal.SIGKILL else 60)
        for one in alive:
            one.kill()
        assert not alive
        assert server.process.wait(timeout=PATIENCE) == (-number if number == signal.SIGKILL else 0)


def test_a_damaged_engine_is_not_used(made, tmp_path):
    cache = tmp_path / "cache"
    with FastFace.load("mini", cache=cache) as fastface:
        fastface.warm_up()
        key = fastface.engines()["unet"].key
    damaged = [
        path
        for entry in EngineCache(cache).entries()
        if entry.key == key
        for path in entry.folder.rglob("*")
        if path.suffix in (".onnx", ".ort", ".bin", ".data")
    ]
    assert damaged
    for path in damaged:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0xFF
        os.chmod(path, 0o600)
        path.write_bytes(content)
    with serve("--cache", str(cache)) as server:
        address = server.wait_until_ready()
        assert_right(*asyncio.run(everything(address, made, count=4)))


def test_a_cache_that_cannot_be_written_stops_the_server_with_a_sentence(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with serve("--cache", str(tmp_path / "file" / "cache")) as server:
        status = server.process.wait(timeout=PATIENCE)
        log = "".join(server.log)
    assert status == 2, log
    assert "Traceback" not in log
    assert "Error: " in log


def test_a_full_disk_leaves_nothing_behind(made, tmp_path):
    cache = tmp_path / "cache"
    # A limit on the size of files fails like a disk that is full, in the middle of an engine.
    with serve("--cache", str(cache), prefix=("prlimit", "--fsize=300000")) as server:
        assert server.process.wait(timeout=PATIENCE) == 2
        assert "Traceback" not in "".join(server.log)
    assert all(entry.manifest is not None for entry in EngineCache(cache).entries())
    with serve("--cache", str(cache)) as server:
        assert_right(*asyncio.run(everything(server.wait_until_ready(), made, count=2)))


def test_two_servers_share_a_cache_that_is_empty(made, tmp_path):
    cache = tmp_path / "cache"
    try:
        with serve("--cache", str(cache)) as one, serve("--cache", str(cache)) as other:
            for server in (one, other):
                address = server.wait_until_ready()
                assert_right(*asyncio.run(everything(address, made, count=2)))
    finally:
        shutil.rmtree(cache, ignore_errors=True)
