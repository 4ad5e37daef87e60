"""Engines that raise, return NaN or die under the batcher: who falls, and who does not."""

import threading

import numpy as np
import pytest

from fastface_trt.errors import Cancelled, EngineFailed, OutOfMemory, Unavailable
from fastface_trt.serving.batching import Batcher
from fastface_trt.serving.batching.measured_stages import PATIENCE
from fastface_trt.serving.settings import WorkerSettings
from fastface_trt.serving.work import PictureDone, State, StepDone, TaskFailed
from tests.serving.batching.batching_fakes import (
    ENGINE_NAN,
    ENGINE_RAISES,
    PREPARATION_RAISES,
    ArithmeticFastFace,
    Events,
    picture_alone,
    task,
)

WAIT = 60


@pytest.fixture
def fastface():
    return ArithmeticFastFace()


@pytest.fixture
def batcher(fastface):
    with Batcher(fastface, WorkerSettings()) as started:
        fastface.unet.calls.clear()
        yield started
        fastface.unet.release()


def submit_together(fastface, batcher, events, tasks):
    """Queue tasks while a call is held, so that they are chosen from together."""
    fastface.unet.hold()
    batcher.submit(task(fastface, "opener", steps=1), events)
    fastface.unet.wait_until_held()
    for one in tasks:
        batcher.submit(one, events)
    fastface.unet.release()


@pytest.mark.parametrize("fault", [ENGINE_RAISES, ENGINE_NAN, PREPARATION_RAISES])
def test_a_failing_request_takes_no_other_with_it(fastface, batcher, fault, caplog):
    events = Events()
    fine = [task(fastface, str(index), seed=index) for index in range(4)]
    tasks = [*fine[:2], task(fastface, "bad", f"photo; {fault}"), *fine[2:]]
    submit_together(fastface, batcher, events, tasks)
    for one in fine:
        done = events.ending(one.id)
        np.testing.assert_array_equal(done.pixels, picture_alone(one.request, one.face))
    failed = events.ending("bad")
    assert isinstance(failed.error, EngineFailed)
    assert "secret" not in str(failed.error)
    assert fault == ENGINE_NAN or "a secret of the" in caplog.text
    assert batcher.drain(WAIT)
    assert batcher.state is State.DRAINING
    events.check(["opener", "bad", *(one.id for one in fine)])


def test_bad_requests_one_after_the_other_do_not_kill_the_engines(fastface, batcher):
    events, pictures = Events(), fastface.decoder.pictures
    for index in range(2 * PATIENCE):
        batcher.submit(task(fastface, str(index), f"photo; {ENGINE_RAISES}"), events)
        assert isinstance(events.ending(str(index)).error, EngineFailed)
    batcher.submit(task(fastface, "fine"), events)
    assert isinstance(events.ending("fine"), PictureDone)
    assert batcher.state is State.READY
    # Twice the engines were put to the test, and a test that they pass clears them.
    assert fastface.decoder.pictures == pictures + 2 + 1


@pytest.mark.parametrize("part", ["unet", "decoder"])
def test_engines_that_fail_for_good_end_everything(fastface, batcher, part):
    events = Events()
    tasks = [task(fastface, str(index), seed=index, steps=2) for index in range(12)]
    fastface.unet.hold()
    for one in tasks:
        batcher.submit(one, events)
    fastface.unet.wait_until_held()
    getattr(fastface, part).broken = True
    fastface.unet.release()
    errors = [events.ending(one.id).error for one in tasks]
    assert {type(error) for error in errors} == {EngineFailed, Unavailable}
    assert sum(isinstance(error, EngineFailed) for error in errors) >= PATIENCE
    events.check([one.id for one in tasks])
    assert batcher.state is State.DEAD
    with pytest.raises(Unavailable):
        batcher.submit(task(fastface, "late"), events)
    assert batcher.drain(WAIT)
    assert batcher.state is State.DEAD


def test_what_a_client_can_fix_reaches_it(fastface, batcher, monkeypatch):
    def full(*args):
        raise OutOfMemory("The GPU has less free memory than this picture needs.", "Ask smaller.")

    monkeypatch.setattr(fastface.stages, "sample", full)
    events = Events()
    for index in range(2 * PATIENCE):
        batcher.submit(task(fastface, str(index)), events)
    for index in range(2 * PATIENCE):
        assert isinstance(events.ending(str(index)).error, OutOfMemory)
    assert batcher.state is State.READY


def test_calls_become_smaller_where_memory_is_short(fastface, batcher, caplog):
    events = Events()
    tasks = [task(fastface, str(index), seed=index) for index in range(8)]
    fastface.unet.memory_rows = 3
    submit_together(fastface, batcher, events, tasks)
    for one in tasks:
        assert isinstance(events.ending(one.id), PictureDone)
    tried = [rows for rows, _ in fastface.unet.calls if rows > 3]
    assert len(tried) == 2, tried  # 7 or 8 rows, then half of them, then never again
    assert "rows at most" in caplog.text


def test_what_does_not_fit_into_memory_shows_before_the_first_client(fastface):
    fastface.unet.memory_rows = 7
    with Batcher(fastface, WorkerSettings()) as started:
        fastface.unet.calls.clear()
        events = Events()
        for index in range(20):
            started.submit(task(fastface, str(index), preset="am1+dcg"), events)
        assert started.drain(WAIT)
        assert max(rows for rows, _ in fastface.unet.calls) == 6
        assert all(isinstance(events.ending(str(index)), PictureDone) for index in range(20))


def test_a_call_that_fails_late_is_made_again_for_each(fastface, batcher, monkeypatch):
    """As on a device, whose failures show when it is waited for."""
    events, told = Events(), []
    tasks = [task(fastface, str(index), seed=index) for index in range(3)]

    def late():
        if fastface.unet.calls[-1][1] > 1 and not told:
            told.append(fastface.unet.calls[-1])
            raise EngineFailed("An asynchronous failure.")

    monkeypatch.setattr(fastface.unet.device, "synchronize", late)
    submit_together(fastface, batcher, events, tasks)
    for one in tasks:
        done = events.ending(one.id)
        np.testing.assert_array_equal(done.pixels, picture_alone(one.request, one.face))
    assert told
    events.check(["opener", *(one.id for one in tasks)])


def test_a_client_whose_events_cannot_be_told_harms_nobody(fastface, batcher):
    def deaf(event):
        raise RuntimeError("the connection is gone")

    events = Events()
    submit_together(fastface, batcher, events, [task(fastface, "fine")])
    batcher.submit(task(fastface, "deaf"), deaf)
    assert isinstance(events.ending("fine"), PictureDone)
    assert batcher.drain(WAIT)


def test_a_preview_that_fails_leaves_the_picture_alone(fastface):
    def preview(latents):
        raise ValueError("no preview of this")

    events = Events()
    with Batcher(fastface, WorkerSettings(), preview=preview) as batcher:
        batcher.submit(task(fastface, "a", previews=True), events)
        assert isinstance(events.ending("a"), PictureDone)
    assert [e.preview for e in events.of["a"] if isinstance(e, StepDone)] == [None] * 4


def test_cancelling_and_closing_at_any_moment_ends_every_task_once(fastface):
    """Threads submit and cancel as they like while the batcher is closed under them."""
    for seed in range(15):
        events, taken, lock = Events(), [], threading.Lock()
        batcher = Batcher(fastface, WorkerSettings(max_waiting=500, max_running=3))
        batcher.start()

        def client(name, batcher=batcher, events=events, taken=taken, lock=lock, seed=seed):
            generator = np.random.default_rng((seed, name))
            for index in range(20):
                one = task(fastface, f"{name}-{index}", seed=index, steps=2)
                try:
                    batcher.submit(one, events)
                except Unavailable:
                    return
                with lock:
                    taken.append(one.id)
                if generator.random() < 0.5:
                    batcher.cancel(f"{name}-{generator.integers(index + 1)}")

        clients = [threading.Thread(target=client, args=(name,)) for name in range(3)]
        for one in clients:
            one.start()
        events.wait(lambda events=events, seed=seed: len(events.order) > 2 * seed)
        batcher.close()
        for one in clients:
            one.join(WAIT)
        events.check(taken)
        reasons = {type(e.error) for e in events.order if isinstance(e, TaskFailed)}
        assert reasons <= {Cancelled, Unavailable}
