"""The batcher over arithmetic engines: results, sharing of calls, limits, endings."""

import threading
from dataclasses import replace

import numpy as np
import pytest

from fastface_trt.errors import (
    Busy,
    Cancelled,
    DeadlinePassed,
    EngineFailed,
    InvalidRequest,
    NoFaceFound,
    Unavailable,
)
from fastface_trt.serving.batching import Batcher
from fastface_trt.serving.batching.loop import blank_face
from fastface_trt.serving.settings import WorkerSettings
from fastface_trt.serving.work import PictureDone, State, StepDone, TaskFailed
from tests.serving.batching.batching_fakes import ArithmeticFastFace, Events, picture_alone, task

WAIT = 60


class Clock:
    """Seconds that only a test moves."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def failure(events, task_id):
    ending = events.ending(task_id)
    assert isinstance(ending, TaskFailed)
    return ending.error


def test_a_task_gives_its_picture_with_its_steps_before(fastface, start):
    batcher, events = start(), Events()
    assert batcher.state is State.READY
    one = task(fastface, "a", preset="am1+dcg", seed=3)
    batcher.submit(one, events)
    done = events.ending("a")
    assert isinstance(done, PictureDone)
    np.testing.assert_array_equal(done.pixels, picture_alone(one.request, one.face))
    settled = one.request.for_adapter("faceid-plus-v2")
    assert done.parameters == fastface.parameters(settled)
    assert set(done.seconds) == {"queue", "denoise", "decode"}
    assert events.of["a"][:-1] == [StepDone("a", step, 4) for step in (1, 2, 3, 4)]


def test_a_face_that_was_one_of_several_is_told_with_its_picture(fastface, start):
    batcher, events = start(), Events()
    for name, chosen in (("a", False), ("b", True)):
        face = replace(blank_face(3), count=2, by_index=chosen)
        batcher.submit(task(fastface, name, face=face), events)
        told = events.ending(name).warnings
        assert told == (() if chosen else (face.warning,))


def test_strangers_share_calls_and_get_what_they_get_alone(fastface, start):
    batcher, events = start(), Events()
    fastface.unet.hold()
    batcher.submit(task(fastface, "first"), events)
    fastface.unet.wait_until_held()
    tasks = [
        task(fastface, "0", preset="am1+dcg", seed=1, ip_adapter_scale=0.2),
        task(fastface, "1", preset="dcg", seed=2, dcg_variant=3, face=blank_face(4)),
        task(fastface, "2", preset="am1+dcg", seed=3, steps=2),
        task(fastface, "3", "another", preset="am2+dcg", seed=4),
        task(fastface, "4", "another", preset="am2+dcg", scope="branch", seed=4),
        task(fastface, "5", "another", seed=5, width=64),
        replace(task(fastface, "6", face=blank_face(5)), channel_order="rgb"),
    ]
    for one in tasks:
        batcher.submit(one, events)
    fastface.unet.release()
    for one in tasks:
        done = events.ending(one.id)
        expected = picture_alone(one.request, one.face, one.channel_order)
        assert np.abs(done.pixels.astype(int) - expected).max() <= 1
    assert batcher.drain(WAIT)
    events.check(["first", *(one.id for one in tasks)])
    assert any(requests > 1 for _, requests in fastface.unet.calls)
    alone = 4 + sum(one.request.steps for one in tasks)
    assert len(fastface.unet.calls) < alone
    assert batcher.load().calls == len(fastface.unet.calls)
    assert batcher.load().rows == sum(rows for rows, _ in fastface.unet.calls)


def test_who_comes_late_joins_at_another_step(fastface, start):
    batcher, events = start(), Events()
    fastface.unet.hold()
    early = task(fastface, "early", steps=8)
    late = task(fastface, "late", seed=9, steps=2)
    batcher.submit(early, events)
    fastface.unet.wait_until_held()
    batcher.submit(late, events)
    fastface.unet.release()
    for one in (early, late):
        done = events.ending(one.id)
        np.testing.assert_array_equal(done.pixels, picture_alone(one.request, one.face))
    assert [requests for _, requests in fastface.unet.calls] == [1, 2, 2, 1, 1, 1, 1, 1]
    # The finished picture is decoded before the next call.
    assert [(e.id, getattr(e, "step", "done")) for e in events.order[5:7]] == [
        ("late", "done"),
        ("early", 4),
    ]


def test_calls_hold_what_the_engine_takes():
    fastface, events = ArithmeticFastFace(request_counts=(1, 2, 4)), Events()
    with Batcher(fastface, WorkerSettings(max_rows=9)) as batcher:
        fastface.unet.calls.clear()
        for index in range(7):
            batcher.submit(task(fastface, str(index), seed=index, preset="am1+dcg"), events)
        assert batcher.drain(WAIT)
    assert all(rows <= 9 and requests in (1, 2, 4) for rows, requests in fastface.unet.calls)
    assert all(isinstance(events.ending(str(index)), PictureDone) for index in range(7))


def test_no_more_are_begun_than_may_run(fastface, start):
    batcher, events = start(max_running=3), Events()
    fastface.unet.hold()
    for index in range(8):
        batcher.submit(task(fastface, str(index)), events)
    fastface.unet.wait_until_held()
    fastface.unet.step_once()
    fastface.unet.step_once()
    load = batcher.load()
    assert load.running <= 3
    assert load.waiting >= 5
    fastface.unet.release()
    assert batcher.drain(WAIT)
    assert max(requests for _, requests in fastface.unet.calls) == 3


def test_the_emptier_call_waits_as_long_as_the_bound_allows_and_no_longer(fastface, start):
    batcher, events = start(max_passed_over=2), Events()
    # As on a large GPU: a call costs the same however many rows it has.
    batcher._loop._policy = replace(batcher._loop.policy, call_seconds=lambda area, rows: 1.0)
    fastface.unet.hold()
    batcher.submit(task(fastface, "opener", steps=1), events)
    fastface.unet.wait_until_held()
    for index in range(7):
        batcher.submit(task(fastface, str(index), steps=8), events)
    batcher.submit(task(fastface, "lonely", preset="am2+dcg", steps=3), events)
    fastface.unet.release()
    assert batcher.drain(WAIT)
    many, lonely = (7, 7), (3, 1)
    assert fastface.unet.calls[1:] == [many, many, lonely] * 3 + [many] * 2


def test_a_full_queue_refuses_at_the_door(fastface, start):
    batcher, events = start(max_waiting=2, max_running=1), Events()
    fastface.unet.hold()
    batcher.submit(task(fastface, "runs"), events)
    fastface.unet.wait_until_held()
    batcher.submit(task(fastface, "0"), events)
    batcher.submit(task(fastface, "1"), events)
    with pytest.raises(Busy) as refused:
        batcher.submit(task(fastface, "2"), events)
    assert refused.value.retry_after > 0
    fastface.unet.release()
    assert batcher.drain(WAIT)
    events.check(["runs", "0", "1"])


def test_who_would_be_late_is_refused_by_what_calls_cost(fastface, start):
    in_a_day, at_once = start(latency_budget=86400), start(latency_budget=1e-9)
    events = Events()
    in_a_day.submit(task(fastface, "a"), events)
    with pytest.raises(Busy, match="would take about") as refused:
        at_once.submit(task(fastface, "b"), events)
    assert refused.value.retry_after > 0
    assert in_a_day.drain(WAIT)
    assert in_a_day.load().backlog_seconds == 0
    events.check(["a"])


def test_who_waited_too_long_is_refused_before_work_goes_into_the_picture(fastface, start):
    clock = Clock()
    batcher, events = start(clock=clock, max_running=1, latency_budget=1000), Events()
    fastface.unet.hold()
    batcher.submit(task(fastface, "runs", steps=1), events)
    fastface.unet.wait_until_held()
    batcher.submit(task(fastface, "waits", steps=2), events)
    clock.now = 600.0
    batcher.submit(task(fastface, "came later", steps=4), events)
    clock.now = 1001.0
    fastface.unet.release()
    refused = failure(events, "waits")
    assert isinstance(refused, Busy)
    assert refused.retry_after > 0
    assert isinstance(events.ending("came later"), PictureDone)
    # What runs is finished, however late.
    assert isinstance(events.ending("runs"), PictureDone)
    assert len(fastface.unet.calls) == 1 + 4


def test_the_backlog_grows_with_every_task(fastface, start):
    batcher, events = start(), Events()
    fastface.unet.hold()
    batcher.submit(task(fastface, "first"), events)
    fastface.unet.wait_until_held()  # from here on nothing is measured that changes the estimates
    backlogs = []
    for index in range(20):
        batcher.submit(task(fastface, str(index)), events)
        backlogs.append(batcher.load().backlog_seconds)
    assert 0 < backlogs[0] < backlogs[9] < backlogs[19]


def test_deadlines_end_a_task_wherever_it_is(fastface, start):
    clock = Clock()
    batcher, events = start(clock=clock, max_running=1), Events()
    fastface.unet.hold()
    batcher.submit(task(fastface, "between steps", deadline=5.0), events)
    fastface.unet.wait_until_held()
    batcher.submit(task(fastface, "in the queue", deadline=4.0), events)
    batcher.submit(task(fastface, "before decoding", deadline=9.0), events)
    clock.now = 6.0
    fastface.unet.step_once()  # of the third, which is the only one left
    for name in ("between steps", "in the queue"):
        assert isinstance(failure(events, name), DeadlinePassed)
    assert events.steps("between steps") == [1]
    assert events.steps("in the queue") == []
    for _ in range(3):
        fastface.unet.step_once()
    clock.now = 10.0
    pictures = fastface.decoder.pictures
    fastface.unet.release()
    assert isinstance(failure(events, "before decoding"), DeadlinePassed)
    assert events.steps("before decoding") == [1, 2, 3, 4]
    assert fastface.decoder.pictures == pictures


def test_cancelling_frees_the_row_before_the_next_step(fastface, start):
    batcher, events = start(), Events()
    fastface.unet.hold()
    for name in ("a", "b"):
        batcher.submit(task(fastface, name), events)
    fastface.unet.wait_until_held()
    batcher.cancel("a")
    batcher.cancel("b")
    batcher.cancel("nobody")
    batcher.submit(task(fastface, "c"), events)
    fastface.unet.release()
    assert isinstance(events.ending("c"), PictureDone)
    for name in ("a", "b"):
        assert isinstance(failure(events, name), Cancelled)
        assert len(events.steps(name)) <= 1
    assert all(requests == 1 for _, requests in fastface.unet.calls[1:])
    batcher.cancel("c")
    assert batcher.drain(WAIT)
    events.check(["a", "b", "c"])


def test_what_the_export_cannot_do_is_refused_at_once(fastface, start):
    batcher, events = start(), Events()
    fastface.unet.hold()
    batcher.submit(task(fastface, "runs"), events)
    fastface.unet.wait_until_held()
    odd = task(fastface, "odd")
    with pytest.raises(InvalidRequest):
        batcher.submit(replace(odd, request=replace(odd.request, width=90)), events)
    fastface.unet.release()
    assert isinstance(events.ending("runs"), PictureDone)
    events.check(["runs"])


def test_an_id_is_taken_while_its_task_is_in_work(fastface, start):
    batcher, events = start(), Events()
    fastface.unet.hold()
    batcher.submit(task(fastface, "a"), events)
    with pytest.raises(ValueError, match="in work"):
        batcher.submit(task(fastface, "a"), events)
    fastface.unet.release()
    assert isinstance(events.ending("a"), PictureDone)


def test_draining_takes_no_more_and_finishes_what_it_has(fastface, start):
    batcher, events = start(), Events()
    fastface.unet.hold()
    batcher.submit(task(fastface, "a"), events)
    fastface.unet.wait_until_held()
    assert not batcher.drain(0.01)
    assert batcher.state is State.DRAINING
    with pytest.raises(Unavailable):
        batcher.submit(task(fastface, "b"), events)
    fastface.unet.release()
    assert batcher.drain(WAIT)
    assert isinstance(events.ending("a"), PictureDone)


def test_closing_ends_what_is_left(fastface, start):
    batcher, events = start(max_running=1), Events()
    fastface.unet.hold()
    for name in ("a", "b"):
        batcher.submit(task(fastface, name), events)
    fastface.unet.wait_until_held()
    closing = threading.Thread(target=batcher.close)
    closing.start()
    fastface.unet.release()
    closing.join(WAIT)
    assert not closing.is_alive()
    for name in ("a", "b"):
        ending = events.ending(name)
        assert isinstance(ending, TaskFailed)
        assert isinstance(ending.error, Unavailable)
    events.check(["a", "b"])
    with pytest.raises(Unavailable):
        batcher.submit(task(fastface, "c"), events)
    with pytest.raises(Unavailable):
        batcher.analyze(np.ones((4, 4, 3), np.uint8)).result(WAIT)
    assert not fastface.closed


def test_faces_are_found_while_the_engines_work(fastface, start):
    batcher, events = start(), Events()
    fastface.unet.hold()
    batcher.submit(task(fastface, "a"), events)
    fastface.unet.wait_until_held()
    face = batcher.analyze(np.full((4, 4, 3), 7, np.uint8)).result(WAIT)
    np.testing.assert_array_equal(face.embedding, blank_face(7).embedding)
    with pytest.raises(NoFaceFound):
        batcher.analyze(np.zeros((4, 4, 3), np.uint8)).result(WAIT)


def test_previews_come_with_the_steps_that_ask_for_them(fastface, start):
    def preview(latents):
        assert latents.shape == (4, 24, 24)
        return np.full((2, 2, 3), 9, np.uint8)

    batcher, events = start(preview=preview), Events()
    batcher.submit(task(fastface, "with", previews=True), events)
    batcher.submit(task(fastface, "without"), events)
    assert batcher.drain(WAIT)
    assert all(event.preview.shape == (2, 2, 3) for event in events.of["with"][:-1])
    assert all(event.preview is None for event in events.of["without"][:-1])


def test_a_batcher_that_cannot_warm_up_says_why(fastface):
    fastface.unet.broken = True
    batcher = Batcher(fastface, WorkerSettings(), owns_fastface=True)
    with pytest.raises(EngineFailed):
        batcher.start()
    assert batcher.state is State.DEAD
    assert fastface.closed


def test_forgetting_reaches_the_engines_caches(fastface, start):
    batcher = start()
    batcher.forget()
    assert fastface.forgotten == 1
