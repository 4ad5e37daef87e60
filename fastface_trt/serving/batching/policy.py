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
others in the queue, it only decides among those that could go.

Between owners (`fairness`) a call belongs to the one who is furthest behind. All of the above is a
matter among its own tasks; then others of the same sharing fill the call: those of owners whose
turn would come before the first one's next, and whoever makes the call hardly longer. While there
is more than one owner, calls are only as full as nearly all of the gain asks for, since whoever
comes has to wait for the call at hand.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf

CallSeconds = Callable[[int, int], float]
"""(latent pixels of a row, rows) to the expected seconds of a UNet call; 0 for not known."""

_AS_GOOD = 0.95
"""Calls within a twentieth of the fullest are equals: measured costs differ by as much."""
_NEARLY_FULL = 0.9
"""Of the rows per second of the fullest call: what calls are filled to while owners take turns."""
_HARDLY_LONGER = 1.25
"""How much longer a call may become for the sake of those whose turn it is not."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A task before its next UNet call.

    order: of arrival, unique. sharing: see `Sample.sharing`. rows: of its next step. area: latent
    pixels of one row. steps_left: with the next one. passed_over: calls in a row that it could have
    been in. deadline: in seconds of any clock, infinite for none. row_is_request: its every row is
    a request to the engine, because it has statistics of its own. owner: who asks for it.
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
    owner: str = ""


@dataclass(frozen=True, slots=True)
class Choice:
    """The next call: who goes, and who could have gone and was passed over.

    The first who goes is one of the owner whose turn it is, and only its tasks were passed over.
    """

    go: tuple[Candidate, ...] = ()
    passed_over: tuple[Candidate, ...] = ()


@dataclass(frozen=True, slots=True)
class Policy:
    """The choice, for one engine and one set of limits; see the module.

    request_counts: requests that a UNet call may hold, None for any number. max_rows: of a call,
    which only a sample that needs more by itself exceeds. max_area: likewise, latent pixels of all
    rows of a call. max_running: tasks begun at once; those of an owner that has less than its share
    of them may begin beyond it, so that no owner can hold all places, up to twice as many.
    """

    max_running: int
    max_passed_over: int
    request_counts: Sequence[int] | None = None
    max_rows: int | None = None
    max_area: int | None = None
    call_seconds: CallSeconds = lambda area, rows: 0.0
    brief: bool = False
    """Whether calls are kept short, because several owners take turns."""

    def choose(
        self, candidates: Sequence[Candidate], claims: Mapping[str, float] | None = None
    ) -> Choice:
        """The next call; empty only where nobody could go.

        `claims` are the owners that are there or were not long ago, with the seconds that each has
        had: who had least goes first.
        """
        claims = claims or {}
        return replace(self, brief=len(claims) > 1)._choose(candidates, claims)

    def _choose(self, candidates: Sequence[Candidate], claims: Mapping[str, float]) -> Choice:
        able = self._able(candidates, claims)
        if not able:
            return Choice()
        turn = min(able, key=lambda one: (claims.get(one.owner, 0.0), one.order)).owner
        groups: dict[Hashable, list[Candidate]] = defaultdict(list)
        for one in able:
            if one.owner == turn:
                groups[one.sharing].append(one)
        calls = list(groups.values())
        go = self._overdue(calls) or self._preferred(calls)
        go = self._with_company(go, [one for one in able if one.owner != turn], claims)
        chosen = {one.order for one in go}
        passed_over = [one for one in able if one.owner == turn and one.order not in chosen]
        return Choice(tuple(go), tuple(passed_over))

    def _able(
        self, candidates: Sequence[Candidate], claims: Mapping[str, float]
    ) -> list[Candidate]:
        """Who is begun, and who may begin: whoever has fewest on the way first, then by claim."""
        able = [one for one in candidates if one.begun]
        begun = Counter(one.owner for one in able)
        waiting: dict[str, list[Candidate]] = defaultdict(list)
        for one in sorted(candidates, key=lambda one: -one.order):
            if not one.begun:
                waiting[one.owner].append(one)
        share = max(1, self.max_running // len(begun.keys() | waiting.keys() or [""]))
        while waiting:
            owner = min(
                waiting,
                key=lambda name: (begun[name], claims.get(name, 0.0), waiting[name][-1].order),
            )
            if len(able) >= self.max_running and (
                begun[owner] >= share or len(able) >= 2 * self.max_running
            ):
                break
            able.append(waiting[owner].pop())
            begun[owner] += 1
            if not waiting[owner]:
                del waiting[owner]
        return able

    def size(
        self, rows: int, available: int, row_is_request: bool = False, area: int | None = None
    ) -> int:
        """How many of `available` tasks of so many rows the next call takes; at least 1."""
        most = min(available, max(1, self.max_rows // rows)) if self.max_rows else available
        if area and self.max_area:
            most = min(most, max(1, self.max_area // (area * rows)))
        if self.request_counts is None:
            return most
        per_task = rows if row_is_request else 1
        return max(
            (n for n in range(1, most + 1) if n * per_task in self.request_counts), default=1
        )

    def full_rows(self, rows: int, row_is_request: bool = False, area: int | None = None) -> int:
        """Rows of the fullest call that could hold a task of so many rows."""
        return self.size(rows, self.max_running, row_is_request, area) * rows

    def with_fewer_rows(self, rows: int) -> "Policy":
        """This policy with at most half of the rows that were too many for the memory."""
        return replace(self, max_rows=max(1, rows // 2))

    def _size(self, members: Sequence[Candidate]) -> int:
        one = members[0]
        most = self.size(one.rows, len(members), one.row_is_request, one.area)
        if not self.brief or self.call_seconds(one.area, one.rows) <= 0:
            return most
        enough = _NEARLY_FULL * self._rate(one, most)
        return next(
            n
            for n in range(1, most + 1)
            if self._rate(one, n) >= enough
            and self.size(one.rows, n, one.row_is_request, one.area) == n
        )

    def _rate(self, one: Candidate, count: int) -> float:
        """Rows per second of a call of so many tasks like this one."""
        return count * one.rows / self.call_seconds(one.area, count * one.rows)

    def _with_company(
        self, go: list[Candidate], others: Sequence[Candidate], claims: Mapping[str, float]
    ) -> list[Candidate]:
        """A call of the owner whose turn it is, with what fits of others."""
        one = go[0]

        def seconds(count: int) -> float:
            return self.call_seconds(one.area, count * one.rows)

        company = sorted(
            (other for other in others if other.sharing == one.sharing),
            key=lambda other: (claims.get(other.owner, 0.0), not other.begun, other.order),
        )
        # Who would have a turn before this owner's next one loses nothing by coming along, and
        # this owner loses nothing by it, unless it brings more than it was given.
        next_turn = claims.get(one.owner, 0.0) + seconds(len(go))
        brought: Counter[str] = Counter()
        equals = []
        for other in company:
            if claims.get(other.owner, 0.0) <= next_turn and brought[other.owner] < len(go):
                brought[other.owner] += 1
                equals.append(other)
        call = go + equals
        call = call[: max(len(go), self._size(call))]
        chosen = {other.order for other in call}
        longest = _HARDLY_LONGER * seconds(len(call))
        for other in company:
            if other.order not in chosen and seconds(len(call) + 1) <= longest:
                call.append(other)
        return call[: max(len(go), self.size(one.rows, len(call), one.row_is_request, one.area))]

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
        rows = len(call) * one.rows
        full_rows = self.full_rows(one.rows, one.row_is_request, one.area)
        seconds, full_seconds = (self.call_seconds(one.area, n) for n in (rows, full_rows))
        if seconds <= 0 or full_seconds <= 0:
            return rows / full_rows
        return rows / seconds / (full_rows / full_seconds)
