"""The pool over workers without engines: dispatch, deaths, restarts, deadlines, draining."""

import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from time import monotonic

import numpy as np
import pytest

from fastface_trt.errors import (
    Busy,
    Cancelled,
    DeadlinePassed,
    EngineFailed,
    ExportIncomplete,
    NoFaceFound,
    Unavailable,
)
from fastface_trt.runtime.request import GenerationRequest
from fastface_trt.serving.settings import WorkerSettings
from fastface_trt.serving.work import PictureDone, State, StepDone, Task, TaskFailed
from fastface_trt.serving.workers import process
from fastface_trt.serving.workers.messages import DEAD_ENGINES, CallRecord
from fastface_trt.serving.workers.pool import WorkerPool
from fastface_trt.serving.workers.process import MAX_DEATHS
from tests.serving.batching.batching_fakes import ENGINE_LOST
from tests.serving.workers.fake_worker import face, picture

PROGRAM = (str(Path(__file__).with_name("fake_worker.py")),)
PATIENCE = 60


class Client:
    """Submits tasks and keeps what it is told about each."""

    def __init__(self, pool):
        self.pool = pool
        self.events = {}
        self.ended = threading.Condition()

    def ask(self, name, prompt, *, seed=0, deadline=None, owner=""):
        self.events[name] = []
        request = GenerationRequest(prompt, seed=seed, width=96, height=96)
        task = Task(name, request, face(), deadline=deadline, owner=owner)
        self.pool.submit(task, self.told)

    def told(self, event):
        with self.ended:
            self.events[event.id].append(event)
            self.ended.notify_all()

    def last(self, name):
        with self.ended:
            over = self.ended.wait_for(lambda: self.over(name), PATIENCE)
        assert over, f"{name} never ended: {self.events[name]}"
        return self.events[name][-1]

    def over(self, name):
        return any(isinstance(e, PictureDone | TaskFailed) for e in self.events[name])

    def stepped(self, name):
        with self.ended:
            assert self.ended.wait_for(lambda: self.events[name], PATIENCE)


def open_pool(count=1, **settings):
    pool = WorkerPool(WorkerSettings(**settings), count, program=PROGRAM)
    pool.start()
    return pool


@pytest.fixture
def pool():
    with open_pool(2) as pool:
        assert pool.wait_until_ready(PATIENCE)
        yield pool


def until(pool, condition):
    with pool._changed:
        assert pool._changed.wait_for(condition, PATIENCE)


def test_a_task_ends_in_its_picture_after_its_steps(pool):
    client = Client(pool)
    client.ask("a", "paint", seed=5)
    done = client.last("a")
    np.testing.assert_array_equal(done.pixels, picture(5))
    steps = [e.step for e in client.events["a"][:-1]]
    assert steps == [1, 2]
    assert pool.load().memory_bytes > 2000


def test_tasks_go_to_the_least_busy_worker(pool):
    client = Client(pool)
    client.ask("a", "wait")
    client.ask("b", "wait")
    client.stepped("a")
    client.stepped("b")
    assert {assigned.process.name for assigned in pool._ledger._tasks.values()} == {
        "worker 0",
        "worker 1",
    }


def test_a_killed_worker_comes_back_and_its_tasks_end_elsewhere(pool, tmp_path):
    client = Client(pool)
    before = set(pool.pids)
    client.ask("a", f"die once {tmp_path / 'flag'}", seed=3)
    np.testing.assert_array_equal(client.last("a").pixels, picture(3))
    until(pool, lambda: len(pool.pids) == 2 and all(slot.ready for slot in pool._slots))
    assert len(set(pool.pids) - before) == 1


class Deaths:
    """Counts the deaths of a pool's workers, and how many of them the slots did."""

    def __init__(self, pool):
        self.statuses, self._pool, self._told = [], pool, pool._on_death
        pool._on_death = self

    def __call__(self, process, status):
        self.statuses.append(status)
        self._told(process, status)

    @property
    def of_slots(self):
        return sum(slot._deaths for slot in self._pool._slots)


@pytest.fixture
def client():
    """Of a pool of one worker, whose deaths it counts."""
    pool = WorkerPool(WorkerSettings(stall_seconds=1), 1, program=PROGRAM)
    client = Client(pool)
    client.deaths = Deaths(pool)
    with pool:
        assert pool.wait_until_ready(PATIENCE)
        yield client


@pytest.mark.parametrize("prompt", ["die", "stand still"])
def test_who_kills_a_worker_alone_in_its_call_gets_no_second_one(client, prompt):
    client.ask("wait", "wait")
    client.stepped("wait")
    client.ask("bad", prompt)
    assert isinstance(client.last("bad").error, EngineFailed)
    until(client.pool, lambda: client.pool.state is State.READY)
    client.ask("fine", "paint", seed=1)
    np.testing.assert_array_equal(client.last("fine").pixels, picture(1))
    client.stepped("wait")
    assert not client.over("wait"), "it was not in the call, and goes on"
    assert len(client.deaths.statuses) == 1


def test_of_several_in_a_call_all_but_the_one_to_blame_are_made_again(client):
    for name, prompt in (("a", "join"), ("bad", "poison"), ("b", "join")):
        client.ask(name, prompt, seed=ord(name[0]))
    for name in ("a", "b"):
        np.testing.assert_array_equal(client.last(name).pixels, picture(ord(name)))
    assert isinstance(client.last("bad").error, EngineFailed)
    assert len(client.deaths.statuses) == 2


def test_any_number_of_killers_leaves_the_server_alive(client):
    for index in range(MAX_DEATHS + 1):
        until(client.pool, lambda: client.pool.state is State.READY)
        client.ask(str(index), "die")
        assert isinstance(client.last(str(index)).error, EngineFailed)
    until(client.pool, lambda: client.pool.state is State.READY)
    client.ask("fine", "paint")
    client.last("fine")
    assert len(client.deaths.statuses) == MAX_DEATHS + 1


def test_an_owner_whose_requests_kill_workers_again_and_again_is_kept_out(client, monkeypatch):
    def ready():
        until(client.pool, lambda: client.pool.state is State.READY)

    client.ask("0", "die", owner="bad")
    client.last("0")
    ready()
    with pytest.raises(Unavailable):
        client.pool.analyze(np.full((9, 9, 3), 13, np.uint8), owner="bad").result(PATIENCE)
    ready()
    client.ask("2", "die", owner="bad")
    client.last("2")
    ready()
    with pytest.raises(Busy, match="3 of your requests ended a worker") as refused:
        client.ask("3", "paint", owner="bad")
    assert 0 < refused.value.retry_after <= process.STRIKE_SECONDS
    with pytest.raises(Busy):
        client.pool.analyze(np.ones((9, 9, 3), np.uint8), owner="bad").result(PATIENCE)
    client.ask("4", "paint", owner="other")
    assert isinstance(client.last("4"), PictureDone)
    monkeypatch.setattr(process, "STRIKE_SECONDS", 0.0)
    client.ask("5", "paint", owner="bad")
    assert isinstance(client.last("5"), PictureDone)
    assert len(client.deaths.statuses) == 3


def test_a_flood_of_tasks_does_not_hide_that_a_worker_stands_still(client):
    client.ask("bad", "stand still")
    for number in range(20 * PATIENCE):
        if client.deaths.statuses:
            break
        with suppress(Unavailable):  # as soon as it is dying
            client.ask(f"flood {number}", "paint")
        threading.Event().wait(0.05)
    assert isinstance(client.last("bad").error, EngineFailed)


def test_a_worker_that_says_nothing_any_more_is_killed(client):
    client.ask("a", "stop")
    until(client.pool, lambda: client.deaths.statuses)
    assert client.deaths.of_slots == 1, "no task is to blame"


def test_owners_have_their_shares_of_a_worker():
    with open_pool(max_waiting=16, max_running=1) as pool:
        pool.wait_until_ready(PATIENCE)
        client = Client(pool)
        # 14 of 16 places, since an eighth is kept, and the one that runs.
        for index in range(15):
            client.ask(f"greedy {index}", "wait", owner="greedy")
        with pytest.raises(Busy, match="15 of your pictures"):
            client.ask("one more", "wait", owner="greedy")
        for index in range(8):
            client.ask(f"other {index}", "wait", owner="other")
        with pytest.raises(Busy, match="8 of your pictures"):
            client.ask("one more of other", "wait", owner="other")


def test_faces_are_looked_for_in_turns(client):
    looking = np.full((9, 9, 3), 14, np.uint8)  # a picture that is looked at until the end
    client.pool.analyze(looking, owner="greedy")
    waiting = [client.pool.analyze(looking, owner="greedy") for _ in range(5)]
    mine = client.pool.analyze(np.ones((9, 9, 3), np.uint8), owner="honest")
    with client.pool._changed:
        ledger = client.pool._ledger
        order = [ledger._faces.pop() for _ in range(6)]
    assert [one.future for one in order[:3]] == [waiting[0], mine, waiting[1]]
    assert len(ledger._analyses) == 1, "a worker has one picture, the others wait in the pool"


def test_large_pictures_take_more_places_of_those_that_wait_for_a_face(client):
    large = np.full((5000, 8000, 3), 14, np.uint8)
    futures = [client.pool.analyze(large, owner="greedy") for _ in range(6)]
    with pytest.raises(Busy):
        futures[-1].result(PATIENCE)
    assert not any(future.done() for future in futures[:5])


def test_a_gpu_that_is_lost_takes_its_process_along_and_its_tasks_are_made_again(tmp_path):
    """Engines of arithmetic behind the real child: whatever the error, the device tells."""
    environment = {"FASTFACE_TEST_LOSES_DEVICE": str(tmp_path / "lost")}
    program = (str(Path(__file__).with_name("arithmetic_child.py")),)
    pool = WorkerPool(WorkerSettings(), environments=[environment], program=program)
    client = Client(pool)
    client.deaths = Deaths(pool)
    with pool:
        assert pool.wait_until_ready(PATIENCE)
        client.ask("a", ENGINE_LOST, seed=1)
        client.ask("b", "paint", seed=2)
        done = {name: client.last(name) for name in "ab"}
        assert all(isinstance(one, PictureDone) for one in done.values()), done
        assert client.deaths.statuses == [DEAD_ENGINES]


def test_who_wrote_a_record_is_read_from_it_after_its_end():
    descriptor = CallRecord.new_file()
    ours = CallRecord(descriptor)
    assert ours.read() is None
    code = (
        "import os, signal, sys\n"
        "from fastface_trt.serving.workers.messages import CallRecord\n"
        "CallRecord(int(sys.argv[1])).write(['a', 'ü'])\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    before = monotonic()
    subprocess.run([sys.executable, "-c", code, str(descriptor)], pass_fds=(descriptor,))
    os.close(descriptor)
    call = ours.read()
    assert call.ids == ("a", "ü")
    assert before <= call.since <= monotonic()
    ours.write(())
    assert ours.read().ids == ()
    ours.write(None)
    assert ours.read() is None


def test_deadline_of_a_task_without_a_worker():
    with open_pool() as pool:
        pool.wait_until_ready(PATIENCE)
        client = Client(pool)
        client.ask("a", "wait", deadline=monotonic())
        client.ask("b", "wait")
        client.stepped("b")
        os.kill(pool.pids[0], signal.SIGKILL)
        assert isinstance(client.last("a").error, DeadlinePassed)
        assert not client.over("b")
        pool.cancel("b")
        assert isinstance(client.last("b").error, Cancelled)


def test_cancelling(pool):
    client = Client(pool)
    client.ask("a", "wait")
    client.stepped("a")
    pool.cancel("a")
    pool.cancel("unknown")
    assert isinstance(client.last("a").error, Cancelled)


def test_a_cancelled_task_is_not_made_again_when_its_worker_dies():
    with open_pool() as pool:
        pool.wait_until_ready(PATIENCE)
        client = Client(pool)
        client.ask("a", "wait")
        client.stepped("a")
        os.kill(pool.pids[0], signal.SIGSTOP)  # so that it cannot answer
        pool.cancel("a")
        os.kill(pool.pids[0], signal.SIGKILL)
        assert isinstance(client.last("a").error, Cancelled)
        assert len(client.events["a"]) == 2  # its step, and its end


def test_a_full_pool_is_busy():
    with open_pool(max_waiting=1, max_running=1) as pool:
        pool.wait_until_ready(PATIENCE)
        client = Client(pool)
        client.ask("a", "wait")
        client.ask("b", "wait")
        with pytest.raises(Busy) as refusal:
            client.ask("c", "wait")
        assert refusal.value.retry_after >= 1


def test_what_a_worker_refuses_arrives_as_it_is(pool):
    client = Client(pool)
    client.ask("a", "refuse")
    assert client.last("a").error.retry_after == 7


def test_faces(pool):
    assert pool.analyze(np.ones((9, 9, 3), np.uint8)).result(PATIENCE).count == 1
    with pytest.raises(NoFaceFound):
        pool.analyze(np.zeros((9, 9, 3), np.uint8)).result(PATIENCE)
    with pytest.raises(Unavailable):  # a picture that kills whoever looks at it
        pool.analyze(np.full((9, 9, 3), 13, np.uint8)).result(PATIENCE)


def test_every_worker_forgets():
    with open_pool(2) as pool:
        pool.wait_until_ready(PATIENCE)
        client = Client(pool)
        pool.forget()
        client.ask("a", "paint")
        client.ask("b", "paint")
        assert [client.last(name).parameters for name in "ab"] == [{"kept": []}] * 2


def test_an_export_that_cannot_be_opened_is_told_at_once():
    with open_pool(2, export="none") as pool:
        with pytest.raises(ExportIncomplete):
            pool.wait_until_ready(PATIENCE)
        assert pool.state is State.DEAD


def test_workers_that_die_again_and_again_are_given_up():
    with open_pool(export="fragile") as pool:
        until(pool, lambda: pool.state is State.DEAD)
        with pytest.raises(Unavailable):
            Client(pool).ask("a", "paint")


def test_deaths_that_no_task_is_to_blame_for_end_the_server_and_give_the_task_up(monkeypatch):
    monkeypatch.setattr(process, "_FIRST_PAUSE", 0.01)
    with open_pool(export="weak") as pool:
        pool.wait_until_ready(PATIENCE)
        client = Client(pool)
        client.ask("a", "paint")
        assert isinstance(client.last("a").error, Unavailable)
        until(pool, lambda: pool.state is State.DEAD)


def test_draining_and_closing():
    with open_pool() as pool:
        pool.wait_until_ready(PATIENCE)
        client = Client(pool)
        client.ask("a", "paint")
        client.ask("b", "wait")
        client.last("a")
        assert not pool.drain(0.2)
        assert pool.state is State.DRAINING
        with pytest.raises(Unavailable):
            client.ask("c", "paint")
        pids = pool.pids
    assert isinstance(client.last("b").error, Unavailable)
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    ends = [e for events in client.events.values() for e in events if not isinstance(e, StepDone)]
    assert len(ends) == 2  # one for each task, exactly
