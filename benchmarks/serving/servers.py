"""Three servers in simulated time, over the same queue and the same costs.

Each runs to the end of a list of arrivals. A simulated server does one thing at a time and knows
exactly how long it takes; the continuous one asks the batcher's own policy.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import inf

from benchmarks.serving.machine import AREA, Machine
from fastface_trt.serving.batching.policy import Candidate, Policy


@dataclass(frozen=True)
class Arrival:
    """A request: when it comes, in seconds, and the rows of each of its steps."""

    order: int
    at: float
    rows: tuple[int, ...]


@dataclass
class Outcome:
    """What became of the arrivals: latency by order, how many were refused, UNet calls' rows."""

    latencies: dict[int, float] = field(default_factory=dict)
    refused: int = 0
    rows: list[int] = field(default_factory=list)
    end: float = 0.0


@dataclass(frozen=True)
class Limits:
    """What every server gets: waiting requests at most, and requests and rows in a call at most."""

    max_waiting: int = 64
    max_running: int = 8
    max_rows: int = 24
    max_passed_over: int = 4


class Queue:
    """Who has come by now; the rest of the arrivals are still to come."""

    def __init__(self, arrivals: Sequence[Arrival], max_waiting: int, outcome: Outcome) -> None:
        self._coming = list(reversed(arrivals))
        self._max_waiting = max_waiting
        self._outcome = outcome
        self.waiting: list[Arrival] = []

    @property
    def next_at(self) -> float:
        """When the next one comes."""
        return self._coming[-1].at if self._coming else inf

    def advance(self, now: float) -> None:
        """Let in who has come, or refuse where the queue is full."""
        while self.next_at <= now:
            one = self._coming.pop()
            if len(self.waiting) < self._max_waiting:
                self.waiting.append(one)
            else:
                self._outcome.refused += 1

    def take(self, count: int) -> list[Arrival]:
        """The first of those who wait."""
        taken, self.waiting = self.waiting[:count], self.waiting[count:]
        return taken


Server = Callable[[Sequence[Arrival], Machine, Limits], Outcome]


def one_by_one(arrivals: Sequence[Arrival], machine: Machine, limits: Limits) -> Outcome:
    """Every picture from start to end by itself, in the order of arrival."""
    return static_batches(arrivals, machine, replace(limits, max_running=1), patience=0.0)


def static_batches(
    arrivals: Sequence[Arrival], machine: Machine, limits: Limits, patience: float | None = None
) -> Outcome:
    """Wait for `max_running` requests, or `patience` seconds after the first; run them to the end.

    Within a batch requests share calls where they have equally many rows, as `denoise` does it;
    pictures are decoded when all are through. The patience is a picture's own time where not given.
    """
    cost, outcome = machine.cost_model(), Outcome()
    queue, now = Queue(arrivals, limits.max_waiting, outcome), 0.0
    while True:
        queue.advance(now)
        if not queue.waiting:
            if queue.next_at == inf:
                break
            now = queue.next_at
            continue
        first = queue.waiting[0]
        own = sum(cost.call_seconds(AREA, rows) for rows in first.rows) + machine.decoding
        until = first.at + (own if patience is None else patience)
        while len(queue.waiting) < limits.max_running and queue.next_at <= until:
            now = max(now, queue.next_at)
            queue.advance(now)
        if len(queue.waiting) < limits.max_running and queue.next_at < inf:
            now = max(now, until)  # nobody tells a server that no more will come but the list's end
        batch = queue.take(limits.max_running)
        now += machine.preparation * len(batch)
        for step in range(max(len(one.rows) for one in batch)):
            groups: dict[int, int] = {}
            for one in batch:
                if step < len(one.rows):
                    groups[one.rows[step]] = groups.get(one.rows[step], 0) + 1
            for rows, count in groups.items():
                most = max(1, limits.max_rows // rows)
                while count > 0:
                    outcome.rows.append(rows * min(count, most))
                    now += cost.call_seconds(AREA, outcome.rows[-1])
                    count -= most
        for one in batch:
            now += machine.decoding
            outcome.latencies[one.order] = now - one.at
    outcome.end = now
    return outcome


def continuous(arrivals: Sequence[Arrival], machine: Machine, limits: Limits) -> Outcome:
    """The batcher: its policy before every call, decoding before calls."""
    cost, outcome = machine.cost_model(), Outcome()
    policy = Policy(
        limits.max_running,
        limits.max_passed_over,
        max_rows=limits.max_rows,
        call_seconds=cost.call_seconds,
    )
    queue, now = Queue(arrivals, limits.max_waiting, outcome), 0.0
    begun: dict[int, tuple[Arrival, Candidate]] = {}
    passed_over: dict[int, int] = {}
    while True:
        queue.advance(now)
        if not begun and not queue.waiting:
            if queue.next_at == inf:
                break
            now = queue.next_at
            continue
        waiting = {
            one.order: (one, _candidate(one, len(one.rows), passed_over.get(one.order, 0)))
            for one in queue.waiting
        }
        everybody = waiting | begun
        choice = policy.choose([candidate for _, candidate in everybody.values()])
        passed_over = {one.order: one.passed_over + 1 for one in choice.passed_over}
        for order in passed_over.keys() & begun.keys():
            arrival, candidate = begun[order]
            begun[order] = arrival, replace(candidate, passed_over=passed_over[order])
        new = [one.order for one in choice.go if not one.begun]
        now += machine.preparation * len(new)
        queue.waiting = [one for one in queue.waiting if one.order not in new]
        outcome.rows.append(sum(one.rows for one in choice.go))
        now += cost.call_seconds(AREA, outcome.rows[-1])
        finished = []
        for one in choice.go:
            arrival, left = everybody[one.order][0], one.steps_left - 1
            if left:
                begun[one.order] = arrival, _candidate(arrival, left, 0)
            else:
                begun.pop(one.order, None)
                finished.append(arrival)
        for arrival in finished:
            now += machine.decoding
            outcome.latencies[arrival.order] = now - arrival.at
    outcome.end = now
    return outcome


def _candidate(one: Arrival, left: int, passed_over: int) -> Candidate:
    rows = one.rows[-left]
    begun = left < len(one.rows)
    return Candidate(one.order, rows, rows, AREA, begun, left, passed_over)


SERVERS: dict[str, Server] = {
    "one by one": one_by_one,
    "static batches": static_batches,
    "continuous batching": continuous,
}
