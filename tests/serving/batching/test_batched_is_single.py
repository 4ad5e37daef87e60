"""Batched results equal single results, whatever the mix of settings and arrival times."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastface_trt import FastFace
from fastface_trt.errors import EngineFailed
from fastface_trt.serving.batching import Batcher
from fastface_trt.serving.batching.entry import Demand
from fastface_trt.serving.settings import WorkerSettings
from tests.serving.batching.batching_crowds import (
    Crowd,
    assert_same_as_alone,
    keep_latents,
    moments,
    random_task,
)
from tests.serving.batching.batching_fakes import ENGINE_NAN, ENGINE_RAISES, ArithmeticFastFace

ARITHMETIC = ArithmeticFastFace()
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def mini():
    with FastFace.load("mini") as fastface:
        yield fastface


def run_crowd(fastface, seed, count, burst=1, **limits):
    """A crowd of that many over a batcher of its own; the tasks and what became of them.

    Who comes in one burst is in the queue before the next UNet call, so that some share it.
    """
    generator = np.random.default_rng(seed)
    tasks = [random_task(fastface, generator, str(index)) for index in range(count)]
    limits = {"max_waiting": count, **limits}
    with Batcher(fastface, WorkerSettings(**limits), preview=keep_latents) as batcher:
        crowd = Crowd(batcher, tasks, moments(generator, count, 2 * count, burst))
        crowd.run()
        load = batcher.load()
    return tasks, crowd, load


@given(
    seed=st.integers(0, 2**32),
    counts=st.sampled_from([None, (1, 2), (1, 2, 4)]),
    max_running=st.integers(1, 8),
    max_rows=st.sampled_from([None, 3, 7]),
    max_passed_over=st.integers(0, 5),
)
@settings(max_examples=15, deadline=None)
def test_any_crowd_over_arithmetic(seed, counts, max_running, max_rows, max_passed_over):
    # Where a row is a request the engine must take as many as there are branches.
    fastface = ArithmeticFastFace(counts and tuple(range(1, 2 * max(counts) + 1)))
    tasks, crowd, load = run_crowd(
        fastface,
        seed,
        12,
        max_running=max_running,
        max_rows=max_rows,
        max_passed_over=max_passed_over,
    )
    assert_same_as_alone(crowd, ARITHMETIC.stages, tasks, TOLERANCE)
    assert load.calls <= sum(one.request.steps for one in tasks)


def test_survivors_of_a_crowd_with_bad_requests_are_as_alone():
    generator = np.random.default_rng(7)
    fastface = ArithmeticFastFace()
    tasks = [random_task(fastface, generator, str(index)) for index in range(24)]
    bad = {"3": ENGINE_RAISES, "11": ENGINE_NAN, "17": ENGINE_RAISES}
    crowd_tasks = [
        replace(one, request=replace(one.request, prompt=bad[one.id])) if one.id in bad else one
        for one in tasks
    ]
    with Batcher(fastface, WorkerSettings(), preview=keep_latents) as batcher:
        crowd = Crowd(batcher, crowd_tasks, moments(generator, 24, 40))
        crowd.run()
    assert set(crowd.errors) == set(bad)
    assert all(isinstance(error, EngineFailed) for error in crowd.errors.values())
    survivors = [one for one in tasks if one.id not in bad]
    assert_same_as_alone(crowd, ARITHMETIC.stages, survivors, TOLERANCE)


def test_what_will_share_is_known_before_anything_is_encoded(mini):
    generator = np.random.default_rng(0)
    tokens = mini.stages.image_tokens(None)
    for index in range(60):
        request = random_task(mini, generator, str(index)).request
        demand = Demand.of(request, mini.manifest, mini.stages.text_positions(request))
        sample = mini.stages.sample(request, tokens)
        for step, row in enumerate(sample.schedule.steps):
            sample.step = step
            assert sample.sharing == demand.sharing(step), row
            assert demand.rows[step] == len(sample.guidance.branches)


def test_a_small_crowd_over_the_mini_model(mini):
    tasks, crowd, load = run_crowd(mini, 1, 16, burst=16)
    assert_same_as_alone(crowd, mini.stages, tasks, TOLERANCE)
    assert load.calls < sum(one.request.steps for one in tasks)


@pytest.mark.serving
@pytest.mark.parametrize("seed", range(6))
def test_large_crowds_over_the_mini_model(mini, seed):
    limits = {"max_running": 2 + 3 * (seed % 3), "max_passed_over": seed % 4}
    tasks, crowd, load = run_crowd(
        mini, 100 + seed, 60, burst=12, max_rows=(None, 9)[seed % 2], **limits
    )
    assert_same_as_alone(crowd, mini.stages, tasks, TOLERANCE)
    assert load.calls < sum(one.request.steps for one in tasks)
