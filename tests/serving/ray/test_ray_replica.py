"""A replica without its cluster: it changes its export under requests, and drops none."""

import asyncio
import base64
import io

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.serving.http.http_parts import FACE, PROMPT, error_of

pytest.importorskip("fastapi")

from fastface_trt import FastFace
from fastface_trt.errors import ExportIncomplete
from fastface_trt.runtime.images import load_picture
from fastface_trt.serving.ray.faces import FaceActor
from fastface_trt.serving.ray.replica import Replica
from fastface_trt.serving.work import State

ARGUMENTS = {"allow_anonymous": True, "threads": 1}


def replica_of(**arguments):
    """A replica with its face actor in this process."""
    actor = FaceActor(3600, 10)

    async def ask(method, *given):
        return actor.call(method, *given)

    return Replica(ARGUMENTS | arguments, ask)


def client_of(replica):
    transport = httpx.ASGITransport(replica.__serve_build_asgi_app__())
    return httpx.AsyncClient(transport=transport, base_url="http://x", timeout=60)


@pytest.fixture(scope="module")
def pictures():
    """Checkpoint of the schedule → the picture of seed 3, from a run by itself."""
    made = {}
    face = load_picture(base64.b64decode(FACE))
    for name, options in (("mini", {}), ("lightning", {"schedule_of": "lightning"})):
        with FastFace.load("mini", threads=1, **options) as fastface:
            made[name] = np.asarray(fastface(PROMPT, face, seed=3).images[0])
    assert not np.array_equal(made["mini"], made["lightning"])
    return made


def pixels_of(answer):
    assert answer.status_code == 200, answer.text
    data = base64.b64decode(answer.json()["data"][0]["b64_json"])
    return np.asarray(Image.open(io.BytesIO(data)))


def post(client, **fields):
    return client.post("/v1/images/generations", json={"prompt": PROMPT, "seed": 3} | fields)


def test_an_update_under_requests_drops_none(pictures):
    async def scenario():
        replica = replica_of()
        await replica.reconfigure({"export": "mini"})
        first = replica._current.worker
        answers, updated = [], asyncio.Event()

        async def ask_until_updated(client):
            while not updated.is_set():
                answers.append(await post(client, face=FACE))
            answers.append(await post(client, face=FACE))

        async with client_of(replica) as client:
            asking = [asyncio.create_task(ask_until_updated(client)) for _ in range(2)]
            while len(answers) < 2:
                await asyncio.sleep(0)
                done = [task for task in asking if task.done()]
                assert not done, done[0].exception()
            await replica.reconfigure({"export": "mini", "schedule_of": "lightning"})
            updated.set()
            await asyncio.gather(*asking)
        await replica.close()
        assert first.state is not State.READY
        return [pixels_of(answer) for answer in answers]

    made = asyncio.run(scenario())
    kinds = [
        next(name for name, picture in pictures.items() if np.array_equal(one, picture))
        for one in made
    ]
    assert kinds[:2] == ["mini", "mini"]
    assert kinds[-2:] == ["lightning", "lightning"]


def test_an_export_that_does_not_open_leaves_the_old_one(tmp_path):
    async def scenario():
        replica = replica_of()
        await replica.reconfigure({"export": "mini"})
        with pytest.raises(ExportIncomplete):
            await replica.reconfigure({"export": str(tmp_path)})
        async with client_of(replica) as client:
            assert (await client.get("/v2/health/ready")).status_code == 200
            assert (await post(client, face=FACE)).status_code == 200
            # The same again changes nothing.
            worker = replica._current.worker
            await replica.reconfigure({"export": "mini"})
            assert replica._current.worker is worker
        await replica.close()

    asyncio.run(scenario())


def test_faces_stay_through_an_update():
    async def scenario():
        replica = replica_of()
        await replica.reconfigure({"export": "mini"})
        async with client_of(replica) as client:
            answer = await client.post("/v1/faces", json={"image": FACE})
            name = answer.json()["id"]
            await replica.reconfigure({"export": "mini", "schedule_of": "lightning"})
            assert (await post(client, face_id=name)).status_code == 200
            assert [one["id"] for one in (await client.get("/v1/faces")).json()["data"]] == [name]
            assert (await client.delete(f"/v1/faces/{name}")).status_code == 204
            error_of(await post(client, face_id=name), 404, "unknown_face")
        await replica.close()

    asyncio.run(scenario())


def test_a_dead_worker_is_unhealthy():
    replica = replica_of()
    replica.check_health()  # before its first export it is starting

    class Dead:
        state = State.DEAD

    class Served:
        worker = Dead()

    replica._current._served = Served()
    with pytest.raises(RuntimeError):
        replica.check_health()
