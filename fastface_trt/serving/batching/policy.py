"""Who goes into the next UNet call: a pure choice, without threads, clocks or engines.

Samples that agree in `Sample.sharing` can share a call, at whatever step each is, so tasks that
come while others are on their way fill the rows that these leave free. Three wishes pull against
each other, and this is their order:

1. Nobody that could go is passed over by more than `max_passed_over` calls. Where one round over
   everybody takes more calls than that, nobody is passed over by more than this round.
2. Full calls, as far as the measured cost of a call says that they save time. On a machine where
   twice the rows take twice the time, every call is as good as a full one.
3. Finishing what is begun before beginning more, which frees memory; then the nearest deadline.

Waiting tasks are begun in the order in which they came: a near deadline must not be a way past
strangers in the queue, it only decides among those that could go.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from math import inf

CallSeconds = Callable[[int, int], float]
"""(latent pixels of a row, rows) to the expected seconds of a UNet call; 0 for not known."""

_AS_GOOD = 0.95
"""Calls within a twentieth of the fullest are equals: measured costs differ by as much."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A task before its next UNet call.

    order: of arrival, unique. sharing: see `Sample.sharing`. rows: of its next step. area: latent
    pixels of one row. steps_left: with the next one. passed_over: calls in a row that it could have
    been in. deadline: in seconds of any clock, infinite for none. row_is_request: its every row is
    a request to the engine, because it has statistics of its own.
    """

    order: int
    sharing: Hashable
    rows: int
    area: int
    begun: bool
    steps_left: int = 1
    passed_over: int = 0
    deadline: float = inf
    row_is_request: bool = False


@dataclass(frozen=True, slots=True)
class Choice:
    """The next call: who goes, and who could have gone and was passed over."""

    go: tuple[Candidate, ...] = ()
    passed_over: tuple[Candidate, ...] = ()


@dataclass(frozen=True, slots=True)
class Policy:
    """The choice, for one engine and one set of limits; see the module.

    request_counts: requests that a UNet call may hold, None for any number. max_rows: of a call,
    which only a sample that needs more by itself exceeds. max_running: tasks begun at once.
    """

    max_running: int
    max_passed_over: int
    request_counts: Sequence[int] | None = None
    max_rows: int | None = None
    call_seconds: CallSeconds = lambda area, rows: 0.0

    def choose(self, candidates: Sequence[Candidate]) -> Choice:
        """The next call; empty only where nobody could go."""
        begun = [one for one in candidates if one.begun]
        waiting = sorted((one for one in candidates if not one.begun), key=lambda one: one.order)
        able = begun + waiting[: max(0, self.max_running - len(begun))]
        if not able:
            return Choice()
        groups: dict[Hashable, list[Candidate]] = defaultdict(list)
        for one in able:
            groups[one.sharing].append(one)
        calls = list(groups.values())
        go = self._overdue(calls) or self._preferred(calls)
        chosen = {one.order for one in go}
        return Choice(tuple(go), tuple(one for one in able if one.order not in chosen))

    def size(self, rows: int, available: int, row_is_request: bool = False) -> int:
        """How many of `available` tasks of so many rows the next call takes; at least 1."""
        most = min(available, max(1, self.max_rows // rows)) if self.max_rows else available
        if self.request_counts is None:
            return most
        per_task = rows if row_is_request else 1
        return max(
            (n for n in range(1, most + 1) if n * per_task in self.request_counts), default=1
        )

    def full_rows(self, rows: int, row_is_request: bool = False) -> int:
        """Rows of the fullest call that could hold a task of so many rows."""
        return self.size(rows, self.max_running, row_is_request) * rows

    def with_fewer_rows(self, rows: int) -> "Policy":
        """This policy with at most half of the rows that were too many for the memory."""
        return replace(self, max_rows=max(1, rows // 2))

    def _size(self, members: Sequence[Candidate]) -> int:
        return self.size(members[0].rows, len(members), members[0].row_is_request)

    def _overdue(self, groups: Sequence[list[Candidate]]) -> list[Candidate]:
        """The call of those who were passed over most, where waiting longer breaks the bound.

        The calls that serve everybody are lined up, most urgent first. As long as the j-th of them
        may be passed over j + 1 times more, any call can go first and the bound still holds.
        """
        heads: list[tuple[int, float, int, list[Candidate]]] = []
        for group in groups:
            members = sorted(group, key=lambda one: (-one.passed_over, one.deadline, one.order))
            while members:
                size = self._size(members)
                first, members = members[:size], members[size:]
                slack = self.max_passed_over - first[0].passed_over
                heads.append((slack, min(one.deadline for one in first), first[0].order, first))
        heads.sort(key=lambda head: head[:3])
        tight = any(slack <= place for place, (slack, *_) in enumerate(heads))
        return heads[0][3] if tight else []

    def _preferred(self, groups: Sequence[list[Candidate]]) -> list[Candidate]:
        """The call that is best where nobody is overdue."""
        calls = []
        for group in groups:
            members = sorted(
                group, key=lambda one: (not one.begun, one.deadline, one.steps_left, one.order)
            )
            calls.append(members[: self._size(members)])
        fullness = [self._fullness(call) for call in calls]
        equals = [
            call
            for call, full in zip(calls, fullness, strict=True)
            if full >= _AS_GOOD * max(fullness)
        ]
        return min(
            equals,
            key=lambda call: (
                sum(not one.begun for one in call),
                min(one.deadline for one in call),
                min(one.steps_left for one in call),
                min(one.order for one in call),
            ),
        )

    def _fullness(self, call: Sequence[Candidate]) -> float:
        """Rows per second of this call over those of the fullest one of its kind."""
        one = call[0]
        rows, full_rows = len(call) * one.rows, self.full_rows(one.rows, one.row_is_request)
        seconds, full_seconds = (self.call_seconds(one.area, n) for n in (rows, full_rows))
        if seconds <= 0 or full_seconds <= 0:
            return rows / full_rows
        return rows / seconds / (full_rows / full_seconds)
