"""Several CPU replicas on one machine: the surface, overload, an update, a kill, the end.

The tests share one server and run in this order; the last one stops it.
"""

import base64
import io
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.serving.http.http_parts import FACE, PROMPT, error_of, events_of

pytest.importorskip("ray.serve")
import psutil

from fastface_trt import FastFace
from fastface_trt.engines.manifest import EXPORT_MANIFEST, ExportManifest, read_manifest
from fastface_trt.mini import folders
from fastface_trt.runtime.export_folder import with_schedule_of
from fastface_trt.runtime.images import load_picture
from fastface_trt.serving.storage.distribution import publish
from fastface_trt.serving.storage.release import object_name, sha256_of, to_json

pytestmark = pytest.mark.serving

SERVER = Path(__file__).with_name("ray_server.py")
REPLICAS, ONGOING, QUEUED = 2, 4, 4
SECONDS = 120
"""How long anything may take before a test gives up; nothing is measured."""


def wait_until(condition):
    give_up = time.monotonic() + SECONDS
    while not (found := condition()):
        assert time.monotonic() < give_up, "it did not happen"
        time.sleep(0.05)
    return found


class Cluster:
    """The server process, and how to ask it."""

    def __init__(self, storage, home):
        self.storage = storage
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.home = home
        self.environment = os.environ | {
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(16),
        }
        self.process = self._run(
            ray_options={
                "num_cpus": 2,
                "object_store_memory": 100_000_000,
                "_temp_dir": str(home),
            }
        )
        said = []
        while not (said and said[-1].startswith("Serving")):
            said.append(self.process.stdout.readline())  # after warnings of Ray's
            assert said[-1], "".join(said)
        self.address = said[-1].split()[-1]

    def _run(self, **more):
        given = {
            "worker": {"export": f"{self.storage}#production", "threads": 1},
            "server": {"port": self.port},
            "placement": {
                "min_replicas": REPLICAS,
                "num_cpus": 0.5,
                "max_ongoing_requests": ONGOING,
                "max_queued_requests": QUEUED,
                "retry_after": 3,
                "health_check_period": 1,
            },
        }
        return subprocess.Popen(
            [sys.executable, str(SERVER), json.dumps(given | more)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=self.environment,
        )

    def update(self):
        """Deploy again what the tag means now, as an operator would."""
        with self._run(address=self.address) as process:
            said = process.stdout.read()
        return process.returncode, said

    def ask(self, path="/v1/images/generations", **fields):
        """Over a connection of its own, so that any replica may answer."""
        body = {"prompt": PROMPT, "seed": 3} | fields
        return httpx.post(f"http://127.0.0.1:{self.port}{path}", json=body, timeout=SECONDS)

    def get(self, path):
        return httpx.get(f"http://127.0.0.1:{self.port}{path}", timeout=SECONDS)

    def descendants(self):
        return psutil.Process(self.process.pid).children(recursive=True)

    def replicas(self):
        """Processes of replicas that have started."""
        found = {}
        for process in self.descendants():
            try:
                if " ".join(process.cmdline()).startswith("ray::ServeReplica"):
                    found[process.pid] = process
            except psutil.Error:
                continue
        return found


class Load:
    """Clients that ask again and again until they are stopped; every answer is kept."""

    def __init__(self, cluster, clients=4):
        self._cluster, self._stop = cluster, threading.Event()
        self.answers = []
        self._pool = ThreadPoolExecutor(clients)
        self._running = [self._pool.submit(self._ask) for _ in range(clients)]

    def _ask(self):
        while not self._stop.is_set():
            self.answers.append(self._cluster.ask(face=FACE))

    def wait_for_more(self, count=4):
        goal = len(self.answers) + count
        wait_until(lambda: len(self.answers) >= goal or any(one.done() for one in self._running))

    def stop(self):
        """All answers; raises what a client raised: a connection without an answer, a timeout."""
        self._stop.set()
        self._pool.shutdown()
        for one in self._running:
            one.result()
        return self.answers


def changed_export(folder, name="mini-2"):
    """The mini export with another sampler and name: other pictures from the same engines."""
    shutil.copytree(folders.EXPORT, folder)
    manifest = read_manifest(folder / EXPORT_MANIFEST, ExportManifest)
    other = with_schedule_of(manifest, "lightning").model_copy(update={"checkpoint": name})
    (folder / EXPORT_MANIFEST).write_bytes(to_json(other))
    return folder


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    return {
        "mini": folders.EXPORT,
        "mini-2": changed_export(tmp_path_factory.mktemp("exports") / "mini-2"),
    }


@pytest.fixture(scope="module")
def pictures(exports):
    """Checkpoint → its picture from a run by itself."""
    made, face = {}, load_picture(base64.b64decode(FACE))
    for name, folder in exports.items():
        with FastFace.load(folder, threads=1) as fastface:
            made[name] = np.asarray(fastface(PROMPT, face, seed=3).images[0]).astype(int)
    assert np.abs(made["mini"] - made["mini-2"]).max() > 10
    return made


@pytest.fixture(scope="module")
def cluster(exports, tmp_path_factory):
    storage = tmp_path_factory.mktemp("storage")
    publish(exports["mini"], str(storage), tag="production")
    # Ray's sockets lie in here, and their paths may have no more than 107 bytes.
    home = Path(tempfile.mkdtemp(prefix="ff", dir="/tmp"))
    cluster = None
    try:
        cluster = Cluster(storage, home)
        yield cluster
    finally:
        if cluster is not None:
            left = cluster.descendants() if cluster.process.poll() is None else []
            cluster.process.kill()
            cluster.process.wait()
            cluster.process.stdout.close()
            for process in left:
                process.kill()
        shutil.rmtree(home, ignore_errors=True)


def check_picture(answer, pictures):
    """The checkpoint that made the picture, which must be what it makes alone."""
    assert answer.status_code == 200, answer.text
    (one,) = answer.json()["data"]
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(one["b64_json"])))).astype(int)
    checkpoint = one["parameters"]["checkpoint"]
    # Rows of strangers change the last bits of the sums, so a value may round the other way.
    assert np.abs(pixels - pictures[checkpoint]).max() <= 1
    return checkpoint


def test_the_surface_is_that_of_one_machine(cluster, pictures):
    assert check_picture(cluster.ask(face=FACE), pictures) == "mini"
    assert cluster.get("/v1/models").json()["data"][0]["id"] == "mini"
    assert cluster.get("/v2/health/ready").json()["state"] == "ready"
    assert "fastface_requests" in cluster.get("/metrics").text
    assert "/v1/images/edits" in cluster.get("/openapi.json").json()["paths"]
    error_of(cluster.ask(face=FACE, colour="red"), 400, "invalid_request")
    assert len(cluster.get("/v1/models").headers.get_list("x-request-id")) == 1
    events = events_of(cluster.ask(face=FACE, stream=True).text)
    names = [name.partition(".")[2] for name, _ in events]
    assert names == ["progress"] * 4 + ["completed"]


def test_a_face_is_known_to_every_replica(cluster, pictures):
    url = f"http://127.0.0.1:{cluster.port}/v1/faces"
    registered = httpx.post(url, json={"image": FACE}, timeout=SECONDS)
    name = registered.json()["id"]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: cluster.ask(face_id=name), range(8)))
    assert {check_picture(answer, pictures) for answer in answers} == {"mini"}
    assert httpx.delete(f"{url}/{name}", timeout=SECONDS).status_code == 204
    for _ in range(4):
        error_of(cluster.ask(face_id=name), 404, "unknown_face")


def test_overload_is_refused_with_a_time(cluster, pictures):
    count = 3 * (REPLICAS * ONGOING + QUEUED)
    with ThreadPoolExecutor(count) as pool:
        answers = list(pool.map(lambda _: cluster.ask(face=FACE), range(count)))
    refused = [answer for answer in answers if answer.status_code != 200]
    assert refused
    for answer in refused:
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "overloaded"
        assert answer.headers["retry-after"] == "3"
    made = [answer for answer in answers if answer.status_code == 200]
    assert len(made) >= ONGOING
    assert {check_picture(answer, pictures) for answer in made} == {"mini"}


def test_an_update_of_the_tag_drops_nothing(cluster, exports, pictures):
    before = set(cluster.replicas())
    load = Load(cluster)
    load.wait_for_more()
    address = publish(exports["mini-2"], str(cluster.storage), tag="production")
    code, said = cluster.update()
    assert code == 0, said
    assert address.reference in said
    load.wait_for_more()
    made = [check_picture(answer, pictures) for answer in load.stop()]
    assert made[0] == "mini"
    assert made[-1] == "mini-2"
    assert cluster.get("/v1/models").json()["data"][0]["id"] == "mini-2"
    assert set(cluster.replicas()) == before, "a replica was started again for an update"


def test_a_release_that_does_not_open_stops_its_update(cluster, tmp_path, pictures):
    bad = changed_export(tmp_path / "bad", name="mini-3")
    publish(bad, str(cluster.storage), tag="production")
    content = (bad / EXPORT_MANIFEST).read_bytes()
    stored = cluster.storage / object_name(sha256_of(content))
    stored.write_bytes(content[:-1])
    load = Load(cluster, clients=2)
    load.wait_for_more()
    code, said = cluster.update()
    assert code != 0
    (last,) = [line for line in said.splitlines() if "could not start the replicas" in line]
    assert "is damaged" in last
    load.wait_for_more()
    assert {check_picture(answer, pictures) for answer in load.stop()} == {"mini-2"}
    publish(changed_export(tmp_path / "good"), str(cluster.storage), tag="production")
    assert cluster.update()[0] == 0
    wait_until(lambda: len(cluster.replicas()) == REPLICAS)


def test_a_killed_replica_takes_only_its_requests_with_it(cluster, pictures):
    before = cluster.replicas()
    assert len(before) == REPLICAS
    load = Load(cluster)
    load.wait_for_more()
    victim = next(iter(before))
    os.kill(victim, signal.SIGKILL)
    load.wait_for_more()
    wait_until(lambda: len(cluster.replicas().keys() - {victim}) == REPLICAS)
    load.wait_for_more(8)
    answers = load.stop()
    for answer in answers:
        if answer.status_code == 200:
            check_picture(answer, pictures)
        else:
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "unavailable"
            assert int(answer.headers["retry-after"]) > 0
    failed = sum(answer.status_code != 200 for answer in answers)
    assert failed <= ONGOING, "more failed than can have been inside"
    assert {check_picture(cluster.ask(face=FACE), pictures) for _ in range(4)} == {"mini-2"}


def test_sigterm_ends_requests_with_pictures_and_leaves_nothing(cluster, pictures):
    family = cluster.descendants()
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(cluster.ask, face=FACE, n=4) for _ in range(2)]
        wait_until(lambda: in_work(cluster))
        cluster.process.send_signal(signal.SIGTERM)
        for one in asked:
            answer = one.result()
            assert answer.status_code == 200
            assert len(answer.json()["data"]) == 4
    assert cluster.process.wait(SECONDS) == 0
    _, alive = psutil.wait_procs(family, SECONDS)
    assert alive == []


def in_work(cluster):
    """Whether a replica is at work on more than this question."""
    text = cluster.get("/metrics").text
    return float(re.search(r"^fastface_requests_in_work (\S+)", text, re.M)[1]) >= 1
