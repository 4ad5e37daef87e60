"""Whether a request is let in, and what it holds while it is there: shares that owners divide.

An owner is whoever asks, by key or address. Before its body is read a request takes a place among
the bodies, and one for work only when the body is there: whoever sends headers alone keeps nobody
from working.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fastface_trt.errors import Busy, Unavailable
from fastface_trt.serving.http.errors import Overloaded
from fastface_trt.serving.settings import ServerSettings
from fastface_trt.serving.work import Load, State, Worker

REMEMBERED = 2.0
"""Seconds for which a refusal of the worker is remembered at most."""
OF_FREE = 3
"""An owner may hold so many times what is still free."""
AGAIN = "Try again in a moment."


class Shares:
    """A capacity that owners divide, each of whom may hold three times what is free.

    So one alone gets three quarters and two get three sevenths each, and however many are there,
    something is free for the next (the dynamic thresholds of Choudhury and Hahne, 1998, for the
    buffers of switches). Of one thread.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._held: Counter[str] = Counter()
        self.total = 0

    def of(self, owner: str) -> int:
        """How much an owner holds."""
        return self._held[owner]

    def is_full(self, amount: int = 1) -> bool:
        """Whether so much is not there for anybody."""
        return amount > self._capacity - self.total

    def allows(self, owner: str, amount: int = 1) -> bool:
        """Whether an owner may take so much more."""
        free = self._capacity - self.total
        # Whoever holds nothing may begin, or a small capacity would be of use to nobody.
        return amount <= free and (not self.of(owner) or self.of(owner) + amount <= OF_FREE * free)

    def take(self, owner: str, amount: int = 1) -> None:
        """Count so much as the owner's."""
        self._held[owner] += amount
        self.total += amount

    def give_back(self, owner: str, amount: int = 1) -> None:
        """Count so much as free."""
        self._held[owner] -= amount
        self.total -= amount
        if not self._held[owner]:
            del self._held[owner]


@dataclass(frozen=True, slots=True)
class _Refusal:
    """What the worker said, and how busy it was."""

    until: float
    load: Load
    message: str
    hint: str
    retry_after: float


class Admission:
    """Counts bodies and requests in work, and remembers that the worker just refused.

    Of one thread.
    """

    def __init__(
        self,
        worker: Worker,
        settings: ServerSettings,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._worker, self._clock = worker, clock
        self._work = Shares(settings.max_requests)
        self._bodies = Shares(settings.max_bodies)
        # One body must fit, whatever else is there.
        self._bytes = Shares(max(settings.max_body_memory, 2 * settings.max_body_bytes))
        self._refused: dict[str, _Refusal] = {}
        self.leaving = False
        """The server is about to stop, and takes nothing more."""
        self.bytes_read = 0
        """Of all bodies whose memory is free again."""

    @property
    def state(self) -> State:
        """The worker's state; DRAINING from the moment the server is told to stop."""
        state = self._worker.state
        return State.DRAINING if self.leaving and state is State.READY else state

    @property
    def in_work(self) -> int:
        """How many requests are in work."""
        return self._work.total

    @property
    def bodies(self) -> int:
        """How many bodies are being read, or in memory."""
        return self._bodies.total

    @contextmanager
    def reading(self, owner: str) -> Iterator["Reading"]:
        """A body that is read, and kept for as long as the block lasts.

        Raises what `check` raises, and `Overloaded` or `Busy` where too many are being read.
        """
        self.check(owner)
        _check_share(self._bodies, owner, "bodies are being read")
        reading = Reading(owner, self._bytes)
        self._bodies.take(owner)
        try:
            yield reading
        finally:
            self._bodies.give_back(owner)
            self._bytes.give_back(owner, reading.bytes)
            self.bytes_read += reading.bytes

    @contextmanager
    def enter(self, owner: str) -> Iterator[None]:
        """A request in work, whose body is there. Raises what `check` raises."""
        self.check(owner)
        self._work.take(owner)
        try:
            yield
        finally:
            self._work.give_back(owner)

    def check(self, owner: str) -> None:
        """Raise `Unavailable`, `Overloaded` or `Busy` where a request could not begin now."""
        state = self.state
        if state is not State.READY:
            raise Unavailable(f"The server is {state.value}.", AGAIN)
        _check_share(self._work, owner, "requests are in work")
        refusal = self._refused.get(owner)
        if refusal is not None:
            now = self._worker.load()
            if (
                self._clock() < refusal.until
                and now.waiting >= refusal.load.waiting
                and now.backlog_seconds >= refusal.load.backlog_seconds
            ):
                raise Busy(refusal.message, refusal.hint, retry_after=refusal.retry_after)
            del self._refused[owner]

    def remember(self, owner: str, error: Busy) -> None:
        """The worker refused a task of this owner.

        As long as it has as much to do as now, the owner's next one would be refused too, and only
        after its face was decoded and analysed, which takes time from those that were let in.
        """
        seconds = error.retry_after
        now, load = self._clock(), self._worker.load()
        self._refused = {one: old for one, old in self._refused.items() if now < old.until}
        until = now + min(seconds, REMEMBERED)
        self._refused[owner] = _Refusal(until, load, error.message, error.hint, seconds)


class Reading:
    """One body's bytes, counted as they come: what is only announced fills no memory."""

    def __init__(self, owner: str, shares: Shares) -> None:
        self.owner, self._shares = owner, shares
        self.bytes = 0

    def add(self, count: int) -> None:
        """So many bytes more. Raises `Overloaded` or `Busy` where there is no memory for them."""
        _check_share(self._shares, self.owner, "bytes of bodies are in memory", count)
        self._shares.take(self.owner, count)
        self.bytes += count


def _check_share(shares: Shares, owner: str, what: str, amount: int = 1) -> None:
    """Raise `Overloaded` (503) where nobody gets more, `Busy` (429) where this owner does not."""
    if shares.is_full(amount):
        raise Overloaded(f"{shares.total:,} {what} here already.", AGAIN)
    if not shares.allows(owner, amount):
        raise Busy(
            f"{shares.of(owner):,} {what} for you already, which is the share of one client now.",
            AGAIN,
        )
