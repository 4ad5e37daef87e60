"""The policy by itself: what always holds, whoever comes, and what it prefers where it may."""

from collections import Counter, defaultdict
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from fastface_trt.serving.batching.policy import Candidate, Policy


def flat(area, rows):
    """A call costs the same however many rows it has, as on a large GPU."""
    return 1.0


def linear(area, rows):
    """Every row costs the same, as on a small CPU."""
    return float(rows)


policies = st.builds(
    Policy,
    max_running=st.integers(1, 8),
    max_passed_over=st.integers(0, 6),
    request_counts=st.sampled_from([None, (1,), (1, 2, 4), (1, 3), (2, 4)]),
    max_rows=st.sampled_from([None, 1, 4, 6, 9]),
    call_seconds=st.sampled_from([lambda area, rows: 0.0, flat, linear]),
)
arrivals = st.lists(
    st.tuples(
        st.integers(0, 6),  # calls until it comes, after the one before
        st.lists(st.integers(1, 3), min_size=1, max_size=6),  # rows of its steps
        st.sampled_from([36, 64]),  # area
        st.sampled_from([10.0, 20.0, float("inf")]),  # deadline
        st.booleans(),  # a row is a request
    ),
    min_size=1,
    max_size=25,
)


class Machine:
    """Drives a policy call by call, as the engine thread does."""

    def __init__(self, policy):
        self.policy = policy
        self.steps = {}
        self.candidates = {}

    def arrive(self, order, steps, area, deadline, row_is_request):
        self.steps[order] = steps
        sharing = (steps[0], area, row_is_request)
        self.candidates[order] = Candidate(
            order, sharing, steps[0], area, False, len(steps), 0, deadline, row_is_request
        )

    def call(self):
        choice = self.policy.choose(list(self.candidates.values()))
        for one in choice.passed_over:
            self.candidates[one.order] = replace(one, passed_over=one.passed_over + 1)
        for one in choice.go:
            left = one.steps_left - 1
            if left == 0:
                del self.candidates[one.order]
                continue
            rows = self.steps[one.order][-left]
            self.candidates[one.order] = replace(
                one,
                sharing=(rows, one.area, one.row_is_request),
                rows=rows,
                begun=True,
                steps_left=left,
                passed_over=0,
            )
        return choice

    def round_length(self):
        """Calls that serve everybody who could go now, each once."""
        begun = [one for one in self.candidates.values() if one.begun]
        waiting = [one for one in self.candidates.values() if not one.begun]
        free = self.policy.max_running - len(begun)
        groups = Counter(one.sharing for one in begun + waiting[:free])
        length = 0
        for (rows, _, own), count in groups.items():
            while count > 0:
                count -= self.policy.size(rows, count, own)
                length += 1
        return length


def play(policy, tasks):
    """Every choice until all tasks are done, with the machine before it."""
    machine, at = Machine(policy), 0
    due = defaultdict(list)
    for order, (pause, *rest) in enumerate(tasks):
        at += pause
        due[at].append((order, *rest))
    now = 0
    while due or machine.candidates:
        for one in due.pop(now, ()):
            machine.arrive(*one)
        now += 1
        if machine.candidates:
            length = machine.round_length()
            yield machine, length, machine.call()


@given(policies, arrivals)
@settings(max_examples=300, deadline=None)
def test_a_call_holds_what_can_share_it_and_what_the_engine_takes(policy, tasks):
    done = Counter()
    for machine, _, choice in play(policy, tasks):
        assert choice.go, "somebody could go, and nobody went"
        assert len({one.sharing for one in choice.go}) == 1
        assert len({one.order for one in choice.go}) == len(choice.go)
        first, rows = choice.go[0], sum(one.rows for one in choice.go)
        requests = rows if first.row_is_request else len(choice.go)
        if policy.request_counts is not None and len(choice.go) > 1:
            assert requests in policy.request_counts
        if policy.max_rows is not None and len(choice.go) > 1:
            assert rows <= policy.max_rows
        assert sum(one.begun for one in machine.candidates.values()) <= policy.max_running
        done.update(one.order for one in choice.go)
    assert done == {order: len(steps) for order, (_, steps, *_) in enumerate(tasks)}


@given(policies, arrivals)
@settings(max_examples=500, deadline=None)
def test_nobody_who_could_go_is_passed_over_for_longer_than_the_bound(policy, tasks):
    longest = bound = 0
    for _, length, choice in play(policy, tasks):
        # With gaps in what the engine takes, who leaves may cut a call of those who stay in two.
        gaps = policy.request_counts not in (None, (1,))
        round_length = len(choice.go) + len(choice.passed_over) if gaps else length
        bound = max(bound, policy.max_passed_over, round_length - 1)
        longest = max([longest, *(one.passed_over + 1 for one in choice.passed_over)])
        assert longest <= bound


@given(policies, arrivals)
@settings(max_examples=200, deadline=None)
def test_tasks_begin_in_the_order_in_which_they_came_up_to_who_fits(policy, tasks):
    """Nobody begins before an earlier one, unless there was room for both."""
    for machine, _, choice in play(policy, tasks):
        new = [one.order for one in choice.go if not one.begun]
        begun = {one.order for one in choice.go if one.begun}
        begun |= {one.order for one in machine.candidates.values() if one.begun}
        left = [one.order for one in choice.passed_over if not one.begun]
        not_asked = [
            order
            for order, one in machine.candidates.items()
            if not one.begun and order not in left and order not in new
        ]
        if new and not_asked:
            assert max(new) < min(not_asked)


def candidate(order, rows=3, *, begun=True, **fields):
    values = {"sharing": rows, "area": 64, "steps_left": 2, **fields}
    return Candidate(order, rows=rows, begun=begun, **values)


def orders(choice):
    return [one.order for one in choice.go]


def test_a_fuller_call_goes_first_where_it_saves_time():
    few, many = [candidate(0, 2)], [candidate(1, 3), candidate(2, 3)]
    gpu = Policy(8, 4, call_seconds=flat)
    assert orders(gpu.choose(few + many)) == [1, 2]
    cpu = Policy(8, 4, call_seconds=linear)
    assert orders(cpu.choose(few + many)) == [0]


def test_free_rows_are_filled_with_those_who_wait():
    policy = Policy(8, 4, max_rows=9, call_seconds=flat)
    tasks = [candidate(0), candidate(1, begun=False), candidate(2, begun=False), candidate(3)]
    assert orders(policy.choose(tasks)) == [0, 3, 1]


def test_what_is_begun_goes_before_what_is_new_among_equals():
    policy = Policy(8, 4, call_seconds=linear)
    assert orders(policy.choose([candidate(0, 2, begun=False), candidate(1, 3)])) == [1]


def test_the_nearest_deadline_goes_first_among_equals():
    policy = Policy(8, 4, call_seconds=linear, max_rows=3)
    tasks = [candidate(0), candidate(1, deadline=9.0), candidate(2, deadline=5.0)]
    assert orders(policy.choose(tasks)) == [2]
    other = candidate(3, 2, deadline=4.0)
    assert orders(policy.choose([*tasks, other])) == [3]


def test_a_near_deadline_is_no_way_past_the_queue():
    policy = Policy(1, 4)
    tasks = [candidate(0, begun=False), candidate(1, begun=False, deadline=1.0)]
    assert orders(policy.choose(tasks)) == [0]


def test_small_pictures_do_not_look_cheaper_than_large_ones():
    """Fullness is relative to the fullest call of the same size."""
    policy = Policy(4, 9, call_seconds=lambda area, rows: area * (1 + 0.1 * rows))
    small = [candidate(0, sharing="small", area=16)]
    large = [candidate(1, sharing="large", area=64), candidate(2, sharing="large", area=64)]
    assert orders(policy.choose(small + large)) == [1, 2]


def test_who_was_passed_over_long_enough_goes_although_its_call_is_emptier():
    policy = Policy(8, 2, call_seconds=flat)
    many = [candidate(index, 3) for index in range(1, 4)]
    assert orders(policy.choose([candidate(0, 2, passed_over=1), *many])) == [1, 2, 3]
    assert orders(policy.choose([candidate(0, 2, passed_over=2), *many])) == [0]


def test_nobody_waits_when_nobody_is_there():
    assert Policy(8, 4).choose([]) == Policy(8, 4).choose([])
    assert Policy(8, 4).choose([]).go == ()
