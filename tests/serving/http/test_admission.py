import asyncio
import gc
import json
import platform
import random
import subprocess
import sys
import time
import tracemalloc
from concurrent.futures import Future

import pytest

from fastface_trt.errors import Busy, NoFaceFound
from fastface_trt.serving.http.admission import Admission, Shares
from fastface_trt.serving.http.app import create_app
from fastface_trt.serving.http.context import Context, Turns
from fastface_trt.serving.http.errors import Overloaded
from fastface_trt.serving.settings import ServerSettings
from tests.serving.http.http_parts import (
    FACE,
    FACE_BYTES,
    PROMPT,
    client_of,
    error_of,
    mini_manifest,
)
from tests.serving.loopback import connect, exchange, read_to_end, serving, wait_until
from tests.serving.scripted_worker import ScriptedWorker, make_face

KEYS = ("key-of-ada", "key-of-bruno")
GENERATIONS = "/v1/images/generations"


def filled(shares, owner):
    count = 0
    while shares.allows(owner):
        shares.take(owner)
        count += 1
    return count


@pytest.mark.parametrize(("capacity", "alone"), [(1, 1), (2, 2), (4, 3), (8, 6), (512, 384)])
def test_one_alone_has_all_of_a_small_capacity_and_three_quarters_of_a_large_one(capacity, alone):
    shares = Shares(capacity)
    assert filled(shares, "ada") == alone
    assert not shares.is_full() or capacity == alone


def test_however_many_take_all_they_can_the_next_one_finds_something():
    shares = Shares(512)
    got = [filled(shares, str(owner)) for owner in range(4)]
    assert got == sorted(got, reverse=True)
    assert got[-1] >= 1
    assert not shares.is_full()


def test_when_others_come_a_share_shrinks_and_all_are_even_in_the_end():
    shares, draw = Shares(512), random.Random(1)
    for _ in range(50_000):
        owner = draw.choice("abc")
        if draw.random() < 0.9:
            if shares.allows(owner):
                shares.take(owner)
        elif shares.of(owner):
            shares.give_back(owner)
        assert 0 <= shares.total <= 512
    for owner in "abc":  # 3 x / (1 + 3 n)
        assert shares.of(owner) == pytest.approx(512 * 3 / 10, rel=0.15)
    for owner in "abc":
        shares.give_back(owner, shares.of(owner))
    assert filled(shares, "ada") == 384


def test_amounts_are_counted_as_they_are():
    shares = Shares(100)
    assert shares.allows("ada", 100)
    assert not shares.allows("ada", 101)
    shares.take("ada", 60)
    assert shares.allows("ada", 40)
    assert not shares.allows("ada", 41)
    assert shares.is_full(41)
    assert shares.allows("bruno", 40)


def admission_of(**settings):
    return Admission(ScriptedWorker(), ServerSettings(**settings))


def test_a_body_that_is_read_takes_no_place_for_work_and_gives_back_what_it_took():
    admission = admission_of(max_body_bytes=100, max_body_memory=200, max_bodies=2)
    with admission.reading("ada") as one:
        one.add(60)
        assert (admission.in_work, admission.bodies) == (0, 1)
        with admission.reading("ada") as other:
            other.add(90)
            with pytest.raises(Busy, match="150 bytes of bodies are in memory for you") as caught:
                other.add(45)
            assert not isinstance(caught.value, Overloaded)
            with pytest.raises(Overloaded):
                other.add(51)
        with admission.reading("bruno") as other:
            other.add(140)
            with pytest.raises(Overloaded, match="2 bodies are being read here"):
                admission.reading("carla").__enter__()
    assert admission.bodies == 0
    with admission.reading("ada") as one:
        one.add(200)
    assert admission.bytes_read == 60 + 90 + 140 + 200


@pytest.fixture(params=["enter", "reading"])
def places(request):
    admission = admission_of(max_requests=4, max_bodies=4)
    return lambda owner: getattr(admission, request.param)(owner)


def test_a_refusal_says_whose_limit_it_is(places):
    held = [places("ada") for _ in range(3)]
    for one in held:
        one.__enter__()
    with pytest.raises(Busy, match=r"3 .* for you already") as caught:
        places("ada").__enter__()
    assert caught.value.code == "busy"
    held.append(places("bruno"))
    held[-1].__enter__()
    with pytest.raises(Overloaded, match=r"4 .* here already"):
        places("carla").__enter__()
    for one in held:
        one.__exit__(None, None, None)
    with places("ada"), places("ada"), places("ada"), pytest.raises(Busy):
        places("ada").__enter__()


def post(key, body=None):
    head = (
        f"POST {GENERATIONS} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
        "Content-Type: application/json\r\nConnection: close\r\n"
    )
    return f"{head}Content-Length: {10_000 if body is None else len(body)}\r\n\r\n{body or ''}"


@pytest.mark.parametrize("sent", ["", '{"prompt": "'])
def test_posts_whose_bodies_do_not_come_keep_nobody_from_working(sent):
    settings = ServerSettings(api_keys=KEYS, max_requests=2, max_bodies=8, body_timeout=60)
    app = create_app(ScriptedWorker(), settings, mini_manifest())
    admission = app.state.context.admission
    with serving(app) as port:
        silent = [connect(port, (post(KEYS[0]) + sent).encode()) for _ in range(6)]
        wait_until(lambda: admission.bodies == 6)
        refused = exchange(port, post(KEYS[0]).encode())
        assert refused.startswith(b"HTTP/1.1 429"), refused
        assert b"6 bodies are being read for you already" in refused
        body = f'{{"prompt": "{PROMPT}", "face": "{FACE}"}}'
        for _ in range(4):
            assert exchange(port, post(KEYS[1], body).encode()).startswith(b"HTTP/1.1 200")
        assert admission.in_work == 0
        for one in silent:
            one.close()
        wait_until(lambda: admission.bodies == 0)
    app.state.context.close()


def test_one_key_has_three_quarters_of_the_faces_and_others_the_rest():
    with client_of(max_faces=8, api_keys=KEYS) as client:
        answers = {key: [] for key in KEYS}
        for key in (*KEYS[:1] * 8, *KEYS[1:] * 2):
            answers[key].append(
                client.post(
                    "/v1/faces",
                    files={"image": FACE_BYTES},
                    headers={"Authorization": f"Bearer {key}"},
                )
            )
    assert [one.status_code for one in answers[KEYS[0]]] == [201] * 6 + [429] * 2
    error = error_of(answers[KEYS[0]][-1], 429, "busy")
    assert "You keep 6 faces" in error["message"]
    assert [one.status_code for one in answers[KEYS[1]]] == [201] * 2


@pytest.mark.parametrize("key", [None, *KEYS])
def test_a_task_says_who_asked(key):
    with client_of(api_keys=KEYS if key else (), key=key) as client:
        client.post(GENERATIONS, json={"prompt": PROMPT, "face": FACE, "n": 2})
        owners = [task.owner for task in client.worker.submitted]
    assert owners[0] == owners[1]
    assert owners[0].startswith("key " if key else "address ")
    assert key is None or key not in owners[0]


def test_owners_take_turns_and_none_has_all_places():
    async def run():
        turns, order, go_on = Turns(3, 2), [], asyncio.Event()

        async def work(owner, index):
            async with turns.of(owner):
                order.append(f"{owner}{index}")
                await go_on.wait()

        async def settle():
            for _ in range(10):
                await asyncio.sleep(0)

        tasks = [asyncio.create_task(work("a", index)) for index in range(5)]
        await settle()
        assert order == ["a0", "a1"]
        tasks += [asyncio.create_task(work(owner, 0)) for owner in "bc"]
        await settle()
        assert order == ["a0", "a1", "b0"]
        tasks[2].cancel()  # before its turn
        tasks[1].cancel()  # in its turn
        await settle()
        go_on.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert order == ["a0", "a1", "b0", "c0", "a3", "a4"]
        tasks = [asyncio.create_task(work("a", index)) for index in range(2)]
        await asyncio.wait_for(asyncio.gather(*tasks), 20)

    asyncio.run(run())


def test_a_turn_that_comes_together_with_a_cancellation_goes_to_the_next():
    async def run():
        turns = Turns(2, 1)
        await turns.take("a")
        left = asyncio.create_task(turns.take("a"))
        await asyncio.sleep(0)
        turns.give_back("a")
        left.cancel()
        await asyncio.wait([left])
        await asyncio.wait_for(turns.take("a"), 20)

    asyncio.run(run())


def test_owners_who_wait_come_one_after_the_other():
    async def run():
        turns, order = Turns(1, 1), []

        async def work(name):
            async with turns.of(name[0]):
                order.append(name)
                await asyncio.sleep(0)

        await asyncio.gather(*map(work, ("a0", "a1", "a2", "a3", "b0", "b1", "c0")))
        assert order == ["a0", "a1", "b0", "c0", "a2", "b1", "a3"]

    asyncio.run(run())


@pytest.mark.parametrize("stream", ["true", "false"])
def test_a_request_is_in_work_until_it_is_answered_and_its_body_is_not_kept(stream):
    """The picture is ten megabytes of line breaks around a small one."""
    worker = ScriptedWorker(eager=False)
    app = create_app(worker, ServerSettings(api_keys=KEYS, max_requests=1), mini_manifest())
    admission = app.state.context.admission
    fields = f'"prompt": "{PROMPT}", "stream": {stream}, "face": "{FACE}'
    body = f"{{{fields}{chr(92)}n{' ' * 10_000_000}{chr(34)}}}"
    sent = post(KEYS[0], body).encode()
    with serving(app) as port:
        tracemalloc.start()
        connection = connect(port, sent)
        wait_until(lambda: worker.open)
        wait_until(lambda: admission.bodies == 0)
        assert admission.in_work == 1
        assert tracemalloc.get_traced_memory()[0] < 5_000_000
        tracemalloc.stop()
        assert exchange(port, post(KEYS[1], "{}").encode()).startswith(b"HTTP/1.1 503")
        worker.finish(next(iter(worker.open)))
        assert read_to_end(connection).startswith(b"HTTP/1.1 200")
        wait_until(lambda: admission.in_work == 0)
    app.state.context.close()


def test_a_client_has_one_picture_in_hand_and_others_are_analysed_beside_it():
    worker = ScriptedWorker()
    worker.analysis = Future()
    app = create_app(worker, ServerSettings(api_keys=KEYS), mini_manifest())
    body = f'{{"prompt": "{PROMPT}", "face": "{FACE}"}}'
    with serving(app) as port:
        crowd = [connect(port, post(KEYS[0], body).encode()) for _ in range(3)]
        wait_until(lambda: app.state.context.admission.in_work == 3)
        wait_until(lambda: worker.analysed)
        other = connect(port, post(KEYS[1], body).encode())
        wait_until(lambda: len(worker.analysed) == 2)
        worker.analysis.set_result(make_face())
        for one in (*crowd, other):
            assert read_to_end(one).startswith(b"HTTP/1.1 200")
    assert len(worker.analysed) == 4
    app.state.context.close()


def test_a_hundred_pictures_of_one_client_do_not_come_before_one_of_another():
    with client_of() as client:
        context: Context = client.app.state.context
        order = []

        async def run():
            crowd = [context.in_thread("ada", order.append, "ada") for _ in range(100)]
            crowd = [asyncio.ensure_future(one) for one in crowd]
            await asyncio.sleep(0)
            await context.in_thread("bruno", order.append, "bruno")
            await asyncio.gather(*crowd)

        asyncio.run(run())
    assert order.index("bruno") < 20
    assert len(order) == 101


def test_memory_of_bodies_goes_back_to_the_system_once_they_were_read(monkeypatch):
    given = []
    monkeypatch.setattr("fastface_trt.serving.http.app.SWEEP_SECONDS", 0.02)
    monkeypatch.setattr(
        "fastface_trt.serving.http.app.give_memory_back", lambda: given.append(True)
    )
    with client_of() as client:
        time.sleep(0.2)
        assert given == []
        client.post(GENERATIONS, json={"prompt": PROMPT, "face": FACE})
        wait_until(lambda: given)


REFUSED = {
    "an unknown field": lambda: {"prompt": PROMPT, "face": FACE + " " * 9_000_000, "colour": 1},
    "a long prompt": lambda: {"prompt": "x" * 9_000_000},
    "no JSON object": lambda: [FACE + " " * 90_000] * 90,
    "no picture": lambda: {"prompt": PROMPT, "face": "A" * 9_000_000},
    "no base64": lambda: {"prompt": PROMPT, "face": "!" * 9_000_000},
    "no face": lambda: {"prompt": PROMPT, "face": FACE + " " * 9_000_000},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_refused_request_held_is_free_without_a_garbage_collection(name):
    """An error whose traceback leads back to it would keep the body until one."""
    worker = ScriptedWorker()
    worker.analysis_error = NoFaceFound("There is no face.")
    app = create_app(worker, ServerSettings(api_keys=KEYS), mini_manifest())
    sent = post(KEYS[0], json.dumps(REFUSED[name]())).encode()
    with serving(app) as port:
        exchange(port, sent)  # what is made once and kept
        gc.collect()
        gc.disable()
        tracemalloc.start()
        try:
            assert exchange(port, sent).startswith(b"HTTP/1.1 400")
            wait_until(lambda: app.state.context.admission.bodies == 0)
            time.sleep(0.1)
            assert tracemalloc.get_traced_memory()[0] < 2_000_000
        finally:
            gc.enable()
            tracemalloc.stop()
    app.state.context.close()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is another")
def test_memory_that_threads_have_freed_is_not_the_processes_any_more():
    program = """
import os
from concurrent.futures import ThreadPoolExecutor
from fastface_trt.measure.memory import give_memory_back, keep_no_large_memory
from fastface_trt.serving.http.errors import InvalidField
from fastface_trt.serving.http.json_text import read_json

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def work(_):
    body = bytearray()
    while len(body) < 19_000_000:
        body += sent[len(body) : len(body) + 65_536]
    try:
        read_json(body)
    except InvalidField:
        pass

keep_no_large_memory()
sent = b'{"prompt": "' + b"x" * 19_000_000 + b'"}'
before = resident()
with ThreadPoolExecutor(3) as threads:
    list(threads.map(work, range(8)))
    give_memory_back()
    print(resident() - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert int(done.stdout) < 15_000_000


def test_a_refusal_of_the_worker_is_remembered_for_its_owner_only():
    now = [0.0]
    admission = Admission(ScriptedWorker(), ServerSettings(), lambda: now[0])
    admission.remember("greedy", Busy("56 pictures wait already.", retry_after=1.5))
    with pytest.raises(Busy, match="56 pictures wait") as refused:
        admission.check("greedy")
    assert refused.value.retry_after == 1.5
    admission.check("honest")
    now[0] = 1.6
    admission.check("greedy")
