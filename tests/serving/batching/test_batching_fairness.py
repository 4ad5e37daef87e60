"""Several owners at one batcher: turns by seconds, shares of places, prices at the door."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastface_trt.errors import Busy, DeadlinePassed, InvalidRequest
from fastface_trt.serving.batching.cost import CostModel, Remaining
from fastface_trt.serving.batching.fairness import FairQueue, Turns, places_of
from fastface_trt.serving.batching.policy import Candidate, Policy
from fastface_trt.serving.work import PictureDone, TaskFailed
from tests.serving.batching.batching_fakes import Events, task

WAIT = 60


def flat(area, rows):
    """A call costs the same however many rows it has, as on a large GPU."""
    return 1.0


def linear(area, rows):
    """Every row costs the same, as on a small CPU."""
    return float(area * rows)


def of(owner, one):
    return replace(one, owner=owner)


# Turns.


@given(
    prices=st.lists(st.floats(0.1, 10), min_size=2, max_size=5),
    rounds=st.integers(50, 150),
)
@settings(max_examples=50, deadline=None)
def test_owners_who_ask_all_the_time_get_equal_seconds(prices, rounds):
    turns, had = Turns(credit=5.0), Counter()
    owners = {str(index): price for index, price in enumerate(prices)}
    for _ in range(rounds):
        claims = turns.claims(owners.keys(), 0.0)
        owner = min(owners, key=lambda one: claims[one])
        turns.charge(owner, owners[owner])
        had[owner] += owners[owner]
    assert max(had.values()) - min(had[one] for one in owners) <= max(prices) + 1e-6


def test_who_comes_back_has_credit_for_one_picture_and_not_for_its_pause():
    turns = Turns(credit=2.0)
    for _ in range(100):
        turns.claims({"greedy"}, 0.0)
        turns.charge("greedy", 1.0)
    claims = turns.claims({"greedy", "guest"}, 1.0)
    assert claims["greedy"] - claims["guest"] == pytest.approx(1.0 + 2.0)  # the call before, too
    # Whoever comes after the guest is not before it.
    assert turns.claims({"greedy", "guest", "third"}, 1.0)["third"] >= claims["guest"]


def test_an_owner_that_took_more_than_its_part_does_not_lose_that_by_leaving():
    turns = Turns()
    turns.claims({"a", "b"}, 0.0)
    turns.charge("a", 10.0)
    turns.claims({"b"}, 1.0)
    claims = turns.claims({"a", "b"}, 2.0)
    assert claims["a"] - claims["b"] == pytest.approx(10.0)
    assert set(turns.claims({"b"}, 1000.0)) == {"b"}, "who is gone for long is forgotten"


# Places.


@given(
    held=st.dictionaries(st.sampled_from("abcdefgh"), st.integers(1, 20)),
    capacity=st.integers(1, 70),
)
@settings(max_examples=100, deadline=None)
def test_shares_fit_into_the_places_and_everybody_has_one(held, capacity):
    owners = held.keys() | {"new"}
    places = places_of("new", held, capacity)
    assert places >= 1
    assert places * len(owners) <= max(capacity, len(owners))
    if capacity >= 8 and not held:
        assert places < capacity, "somebody else can still come"
    assert places_of("", {}, capacity) == capacity


def test_a_queue_gives_one_of_each_owner_in_turn():
    queue = FairQueue(16, "wait")
    for index in range(14):
        queue.put("greedy", f"greedy {index}")
    with pytest.raises(Busy, match="14 wait already"):
        queue.put("greedy", "one more")
    for index in range(3):
        queue.put("guest", f"guest {index}")
    assert [queue.pop() for _ in range(7)] == [
        *("greedy 0", "guest 0", "greedy 1", "guest 1", "greedy 2", "guest 2", "greedy 3"),
    ]
    assert len(queue) == 10


# The policy.


def candidate(order, owner, *, rows=3, begun=True, sharing=None, **fields):
    values = {"area": 1, "steps_left": 2, **fields}
    return Candidate(order, sharing or rows, rows, begun=begun, owner=owner, **values)


def orders(choice):
    return [one.order for one in choice.go]


def test_the_call_is_of_who_is_behind_and_its_others_are_not_passed_over():
    policy = Policy(8, 4, call_seconds=linear)
    many = [candidate(index, "greedy", passed_over=4) for index in range(7)]
    choice = policy.choose([*many, candidate(9, "guest")], {"greedy": 50.0, "guest": 1.0})
    assert orders(choice) == [9]
    assert choice.passed_over == ()


def test_rows_that_cost_nothing_are_filled_with_whoever_shares():
    policy = Policy(8, 4, call_seconds=flat)
    many = [candidate(index, "greedy") for index in range(7)]
    choice = policy.choose([*many, candidate(9, "guest")], {"greedy": 50.0, "guest": 1.0})
    assert orders(choice) == [9, *range(7)]


@pytest.mark.parametrize(("seconds", "together"), [(flat, 8), (linear, 1)])
def test_equals_go_together_as_far_as_that_is_faster(seconds, together):
    policy = Policy(8, 4, call_seconds=seconds)
    crowd = [candidate(index, str(index)) for index in range(8)]
    choice = policy.choose(crowd, {str(index): 0.0 for index in range(8)})
    assert len(choice.go) == together


def test_calls_are_short_while_others_are_about_and_full_otherwise():
    """A call costs as much as half a row, and then by rows: 6 rows bring 90 % of what 24 do."""
    policy = Policy(8, 4, call_seconds=lambda area, rows: 0.5 + rows)
    many = [candidate(index, "greedy") for index in range(8)]
    assert len(policy.choose(many, {"greedy": 5.0}).go) == 8
    assert len(policy.choose(many, {"greedy": 5.0, "guest a minute ago": 5.0}).go) == 2


def test_who_has_all_places_keeps_nobody_out():
    policy = Policy(4, 4, call_seconds=linear)
    running = [candidate(index, "greedy") for index in range(4)]
    waiting = [candidate(10 + index, "greedy", begun=False) for index in range(9)]
    guests = [candidate(30 + index, "guest", begun=False) for index in range(5)]
    claims = {"greedy": 50.0, "guest": 1.0}
    able = policy._able([*running, *waiting, *guests], claims)
    assert [one.order for one in able if not one.begun] == [30, 31]
    crowd = [candidate(40 + index, str(index), begun=False) for index in range(9)]
    assert len(policy._able([*running, *crowd], {})) == 2 * 4


def test_places_that_are_free_go_round():
    policy = Policy(4, 4)
    tasks = [candidate(index, "greedy", begun=False) for index in range(9)]
    tasks += [candidate(20 + index, "guest", begun=False) for index in range(9)]
    able = policy._able(tasks, {})
    assert Counter(one.owner for one in able) == {"greedy": 2, "guest": 2}


def test_large_pictures_fill_no_call_beyond_the_pixels_of_the_fullest():
    policy = Policy(8, 4, max_area=24, call_seconds=flat)
    large = [candidate(index, "", area=4) for index in range(8)]
    assert len(policy.choose(large).go) == 2
    assert len(policy.choose([candidate(0, "", area=100)]).go) == 1


# The batcher.


def test_a_guest_is_served_between_the_calls_of_who_has_everything(fastface, start):
    batcher, events = start(max_running=4), Events()
    fastface.unet.hold()
    for index in range(20):
        one = of("greedy", task(fastface, f"greedy {index}", preset="am1+dcg"))
        batcher.submit(one, events)
    fastface.unet.wait_until_held()
    batcher.submit(of("guest", task(fastface, "guest", steps=2)), events)
    fastface.unet.release()
    assert batcher.drain(WAIT)
    ended = [event.id for event in events.order if isinstance(event, PictureDone)]
    assert len(ended) == 21
    # Credit for a picture, against one call of the others: long before their second round.
    assert ended.index("guest") <= 4


def test_a_full_queue_makes_room_for_who_has_less_in_it(fastface, start):
    batcher, events = start(max_waiting=8, max_running=1), Events()
    fastface.unet.hold()
    batcher.submit(of("a", task(fastface, "runs")), events)
    fastface.unet.wait_until_held()
    for index in range(7):
        batcher.submit(of("a", task(fastface, f"a {index}")), events)
    with pytest.raises(Busy, match="7 pictures wait already\\."):
        batcher.submit(of("a", task(fastface, "a too many")), events)
    for index in range(3):
        batcher.submit(of("b", task(fastface, f"b {index}")), events)
    with pytest.raises(Busy, match="your share while others wait"):
        batcher.submit(of("b", task(fastface, "b too many")), events)
    batcher.submit(of("c", task(fastface, "c 0")), events)
    fastface.unet.release()
    assert batcher.drain(WAIT)
    refused = {e.id for e in events.order if isinstance(e, TaskFailed)}
    assert refused == {"a 6", "a 5", "a 4"}, "the newest of who has most"
    assert all(isinstance(events.ending(name).error, Busy) for name in refused)


def test_the_wait_behind_others_is_at_most_as_long_as_ones_own_work():
    cost = CostModel()
    cost.observe_call(1, 3, 1.0)
    one = Remaining((3, 3), 1)
    alone = cost.seconds_behind(one, [], lambda rows: rows)
    assert cost.seconds_behind(one, [], lambda rows: rows, others=[[one] * 50]) == 2 * alone
    half = Remaining((3,), 1)
    assert cost.seconds_behind(one, [], lambda rows: rows, others=[[half]]) == 1.5 * alone


def test_a_guest_is_in_time_although_others_have_a_long_queue(fastface, start):
    batcher, events = start(latency_budget=900), Events()
    cost = batcher._cost
    fastface.unet.hold()
    batcher.submit(of("greedy", task(fastface, "runs")), events)
    fastface.unet.wait_until_held()
    cost.clear()
    for rows in range(1, 25):
        cost.observe_call(576, rows, 10.0 * rows)
    for index in range(14):
        batcher.submit(of("greedy", task(fastface, f"greedy {index}")), events)
    with pytest.raises(Busy, match="would take about"):
        batcher.submit(of("greedy", task(fastface, "one more")), events)
    batcher.submit(of("guest", task(fastface, "guest")), events)


# Prices at the door.


@pytest.mark.parametrize(
    ("limits", "fields", "sentence"),
    [
        ({}, {"width": 208, "height": 192}, "36,864 pixels"),
        ({"max_output_pixels": 9216}, {"width": 112}, "9,216 pixels"),
        ({"max_request_seconds": 70}, {"steps": 8}, "about 80 s"),
    ],
)
def test_what_costs_too_much_is_refused_with_the_number(fastface, start, limits, fields, sentence):
    batcher, events = start(**limits), Events()
    batcher._cost.clear()
    batcher._cost.observe_call(576, 1, 10.0)
    with pytest.raises(InvalidRequest, match=sentence):
        batcher.submit(task(fastface, "a", **fields), events)
    assert not fastface.unet.calls
    batcher.submit(task(fastface, "b", steps=1), events)
    assert isinstance(events.ending("b"), PictureDone)


def test_a_deadline_that_cannot_be_met_is_refused_with_what_it_would_need(fastface, start):
    batcher, events = start(), Events()
    batcher._cost.clear()
    batcher._cost.observe_call(576, 1, 1.0)
    now = batcher._clock()
    with pytest.raises(DeadlinePassed, match=r"about 4 s by itself, and its deadline is in 0\.5 s"):
        batcher.submit(task(fastface, "a", deadline=now + 0.5), events)
    assert not fastface.unet.calls
    # What was measured long ago lets it in, and its own first call tells better.
    batcher._cost._measured -= 100
    batcher.submit(task(fastface, "b", deadline=batcher._clock() + 3600), events)
    assert isinstance(events.ending("b"), PictureDone)


def test_a_task_without_hope_ends_before_the_next_call(fastface, start):
    batcher, events = start(), Events()
    fastface.unet.hold()
    deadline = batcher._clock() + 1000
    batcher.submit(task(fastface, "a", steps=8, deadline=deadline), events)
    fastface.unet.wait_until_held()
    batcher._table.entries()[0].price = 1e4
    batcher._cost.clear()
    batcher._cost.observe_call(576, 1, 1e4)  # it turned out to be slow
    batcher._cost.observe_call = lambda *measured: None
    fastface.unet.release()
    assert isinstance(events.ending("a").error, DeadlinePassed)
    assert events.steps("a") == [1]


def test_what_nobody_waits_for_is_not_tried_again(fastface, start):
    batcher, events = start(), Events()
    fastface.unet.hold()
    batcher.submit(task(fastface, "opener", steps=1), events)
    fastface.unet.wait_until_held()
    for name in ("gone", "stays", "bad"):
        prompt = "photo; engine raises" if name == "bad" else "photo"
        batcher.submit(task(fastface, name, prompt), events)
    fastface.unet.step_once()
    batcher.cancel("gone")
    before = len(fastface.unet.calls)
    fastface.unet.release()
    assert isinstance(events.ending("stays"), PictureDone)
    assert fastface.unet.calls[before - 1] == (3, 3)
    assert events.steps("gone") == []
    # One by one "stays" and "bad", and then the other three steps of "stays".
    assert fastface.unet.calls[before:] == [(1, 1)] * 5


def test_one_measurement_that_stood_still_does_not_spoil_the_prices():
    cost = CostModel()
    cost.observe_call(1, 1, 1.0)
    cost.observe_call(1, 1, 500.0)
    assert cost.call_seconds(1, 1) == pytest.approx(1.2)
