"""The cost model: interpolation, means, and estimates that can be added up by hand."""

import math

import pytest

from fastface_trt.serving.batching.cost import MOST_SIZES, WEIGHT, CostModel, Remaining

AREA = 100


@pytest.fixture
def cost():
    model = CostModel()
    for rows, seconds in ((2, 2.0), (4, 3.0), (6, 3.5)):
        model.observe_call(AREA, rows, seconds)
    model.observe_decoding(AREA, 0.5)
    model.observe_preparation(0.25)
    return model


@pytest.mark.parametrize(
    ("rows", "seconds"), [(1, 2.0), (2, 2.0), (3, 2.5), (4, 3.0), (5, 3.25), (6, 3.5), (10, 4.5)]
)
def test_calls_are_interpolated_between_what_was_measured(cost, rows, seconds):
    assert cost.call_seconds(AREA, rows) == pytest.approx(seconds)


def test_beyond_one_measurement_a_row_costs_what_rows_did():
    model = CostModel()
    model.observe_call(AREA, 2, 1.0)
    assert model.call_seconds(AREA, 6) == pytest.approx(3.0)


def test_noise_does_not_make_further_rows_free_or_dear():
    falling, jumping = CostModel(), CostModel()
    for model, seconds in ((falling, 0.5), (jumping, 20.0)):
        model.observe_call(AREA, 1, 1.0)
        model.observe_call(AREA, 2, seconds)
    assert falling.call_seconds(AREA, 4) == pytest.approx(0.5)
    assert jumping.call_seconds(AREA, 4) == pytest.approx(40.0)


def test_another_size_costs_by_its_pixels(cost):
    assert cost.call_seconds(4 * AREA, 4) == pytest.approx(12.0)
    cost.observe_call(4 * AREA, 4, 20.0)
    assert cost.call_seconds(4 * AREA, 4) == pytest.approx(20.0)
    assert cost.call_seconds(AREA, 4) == pytest.approx(3.0)
    assert cost.decoding_seconds(2 * AREA) == pytest.approx(1.0)


def test_means_follow_the_newest(cost):
    cost.observe_call(AREA, 2, 3.0)
    assert cost.call_seconds(AREA, 2) == pytest.approx(2.0 + WEIGHT)
    for _ in range(50):
        cost.observe_call(AREA, 2, 3.0)
    assert cost.call_seconds(AREA, 2) == pytest.approx(3.0, abs=1e-3)


def test_nothing_measured_costs_nothing():
    model, task = CostModel(), Remaining((2, 3), AREA)
    assert model.seconds_alone(task) == 0
    assert model.backlog_seconds([task], lambda rows: rows) == 0
    assert model.decoding_seconds(AREA) == 0


def test_a_task_alone_and_its_part_of_full_calls(cost):
    task = Remaining((2, 3), AREA)
    assert cost.seconds_alone(task) == pytest.approx(2.0 + 2.5 + 0.5 + 0.25)
    # In full calls of 6 rows a row costs 3.5 / 6.
    assert cost.seconds_shared(task, lambda rows: 6) == pytest.approx(5 * 3.5 / 6 + 0.75)
    begun = Remaining((3,), AREA, unprepared=False)
    assert cost.seconds_alone(begun) == pytest.approx(2.5 + 0.5)


def test_the_backlog_is_at_least_its_longest_task(cost):
    task = Remaining((2,) * 4, AREA)
    alone, part = cost.seconds_alone(task), cost.seconds_shared(task, lambda rows: 6)
    assert part < alone
    assert cost.backlog_seconds([task], lambda rows: 6) == pytest.approx(alone)
    assert cost.backlog_seconds([task] * 9, lambda rows: 6) == pytest.approx(9 * part)
    behind = cost.seconds_behind(task, [task] * 9, lambda rows: 6)
    assert behind == pytest.approx(alone + 9 * part)


def test_the_pace_scales_every_estimate(cost):
    task = Remaining((2,) * 4, AREA)
    backlog = cost.backlog_seconds([task] * 9, lambda rows: 6)
    behind = cost.seconds_behind(task, [task], lambda rows: 6)
    assert cost.slowdown == 1
    cost.observe_round(expected=1.0, seconds=3.0)
    assert cost.slowdown == pytest.approx(3)
    assert cost.backlog_seconds([task] * 9, lambda rows: 6) == pytest.approx(3 * backlog)
    assert cost.seconds_behind(task, [task], lambda rows: 6) == pytest.approx(3 * behind)
    # Two seconds of work later what was before counts e times less.
    cost.observe_round(expected=2.0, seconds=2.0)
    assert cost.slowdown == pytest.approx((3 / math.e + 2) / (1 / math.e + 2))
    for _ in range(20):
        cost.observe_round(expected=1.0, seconds=1.0)
    assert cost.slowdown == pytest.approx(1, abs=1e-3)


def test_company_takes_turns(cost):
    task = Remaining((2,) * 4, AREA)
    alone, part = cost.seconds_alone(task), cost.seconds_shared(task, lambda rows: 6)
    assert cost.seconds_behind(task, [], lambda rows: 6, company=1) == pytest.approx(alone)
    assert cost.seconds_behind(task, [], lambda rows: 6, company=8) == pytest.approx(8 * part)


def test_any_number_of_sizes_is_known_by_the_last_ones(cost):
    for area in range(1000, 1000 + 3 * MOST_SIZES):
        cost.observe_call(area, 2, float(area))
        cost.observe_decoding(area, 0.5)
        cost.observe_call(AREA, 2, 2.0)  # the size that is asked for most
    assert len(cost._calls) == len(cost._decodings) == MOST_SIZES
    assert cost.call_seconds(AREA, 2) == pytest.approx(2.0)
    assert cost.call_seconds(1000, 2) == pytest.approx(1000.0)


def test_what_was_measured_can_be_forgotten(cost):
    cost.clear()
    assert cost.call_seconds(AREA, 2) == cost.decoding_seconds(AREA) == 0
