"""A whole server on the GPU under load: every picture is compared with that of a single run."""

import asyncio
from time import perf_counter

import numpy as np
import pytest

from benchmarks.load.client import ask
from benchmarks.load.requests import bodies, pictures
from benchmarks.load.run import GENERATE, register_face
from benchmarks.load.server import serve

pytestmark = pytest.mark.gpu

CLIENTS = 8


def test_every_picture_under_load_is_that_of_a_single_run(backend, store, cpu, record):
    made = pictures(cpu)
    count = 16 if backend == "onnxruntime" else 160
    with serve("--backend", backend, "--cache", str(store.root)) as server:
        address = server.wait_until_ready()

        async def load():
            face = await register_face(address)
            asked = bodies(made, face, count, np.random.default_rng(0))
            waiting, wrong = iter(asked), []

            async def client():
                for picture, body in waiting:
                    body.pop("deadline", None)
                    answer = await ask(address, "POST", GENERATE, body)
                    same = answer.status == 200 and picture.equals(
                        answer.json()["data"][0]["b64_json"]
                    )
                    if not same:
                        wrong.append((picture.fields, answer.status))

            started = perf_counter()
            await asyncio.gather(*(client() for _ in range(CLIENTS)))
            return wrong, perf_counter() - started

        wrong, seconds = asyncio.run(load())
        assert server.stop() == 0
    record(pictures_per_second=count / seconds, clients=CLIENTS, pictures=count)
    assert wrong == []
