"""The pool over workers without engines: dispatch, deaths, restarts, deadlines, draining."""

import os
import signal
import threading
from pathlib import Path
from time import monotonic

import numpy as np
import pytest

from fastface_trt.errors import (
    Busy,
    Cancelled,
    DeadlinePassed,
    ExportIncomplete,
    NoFaceFound,
    Unavailable,
)
from fastface_trt.runtime.request import GenerationRequest
from fastface_trt.serving.settings import WorkerSettings
from fastface_trt.serving.work import PictureDone, State, StepDone, Task, TaskFailed
from fastface_trt.serving.workers.pool import WorkerPool
from tests.serving.workers.fake_worker import face, picture

PROGRAM = (str(Path(__file__).with_name("fake_worker.py")),)
PATIENCE = 60


class Client:
    """Submits tasks and keeps what it is told about each."""

    def __init__(self, pool):
        self.pool = pool
        self.events = {}
        self.ended = threading.Condition()

    def ask(self, name, prompt, *, seed=0, deadline=None):
        self.events[name] = []
        request = GenerationRequest(prompt, seed=seed)
        self.pool.submit(Task(name, request, face(), deadline=deadline), self.told)

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


def test_a_task_that_kills_workers_is_given_up(pool):
    client = Client(pool)
    client.ask("a", "die")
    client.ask("b", "paint", seed=1)
    refused = client.last("a").error
    assert isinstance(refused, Unavailable)
    assert refused.message.startswith("Two workers died")
    np.testing.assert_array_equal(client.last("b").pixels, picture(1))


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


def test_a_worker_that_stands_still_is_killed():
    with open_pool(stall_seconds=0.5) as pool:
        pool.wait_until_ready(PATIENCE)
        client = Client(pool)
        client.ask("a", "wait")  # the second worker that gets it stands still as well
        assert isinstance(client.last("a").error, Unavailable)


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
