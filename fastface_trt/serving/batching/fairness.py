"""Whose turn it is where several owners ask: turns by seconds used, and shares of what is scarce.

An owner is who asks: a key, or an address where there are no keys (`Task.owner`). Without engines
and threads, as `policy` is.
"""

from collections import Counter, deque
from collections.abc import Mapping, Set
from math import inf
from typing import Generic, TypeVar

from fastface_trt.errors import Busy

REMEMBERED = 60.0
"""Seconds for which an owner who has nothing in work is remembered."""

Item = TypeVar("Item")


class Turns:
    """Start-time fair queueing of the machine's time between owners. Of one thread.

    Each owner has a clock of the seconds that were spent on its tasks, and whoever is behind goes
    first. Who comes back after a pause does not get the seconds that it left to others, but
    `credit` of them, enough for one ordinary picture: so somebody who asks for one now and then
    has it without waiting for those who ask all the time, and who asks all the time has a share.
    """

    def __init__(self, credit: float = 0.0) -> None:
        self.credit = credit
        self._clocks: dict[str, float] = {}
        self._seen: dict[str, float] = {}
        self._present: Set[str] = frozenset()
        self._behind_all = 0.0

    def claims(self, owners: Set[str], now: float) -> Mapping[str, float]:
        """The clocks of these owners, who have tasks in work, and of those of the last minute."""
        for owner in owners - self._present:
            earliest = self._behind_all - self.credit
            self._clocks[owner] = max(self._clocks.get(owner, -inf), earliest)
        self._present = frozenset(owners)
        if owners:
            # Never back: who comes with credit gives none to those who come after.
            self._behind_all = max(self._behind_all, min(self._clocks[owner] for owner in owners))
        self._seen.update(dict.fromkeys(owners, now))
        for owner in [one for one, seen in self._seen.items() if now - seen > REMEMBERED]:
            del self._seen[owner], self._clocks[owner]
        return self._clocks

    def charge(self, owner: str, seconds: float) -> None:
        """So many seconds of the machine were spent for an owner with tasks in work."""
        self._clocks[owner] += seconds


def places_of(owner: str, held: Mapping[str, int], capacity: int) -> int:
    """How many of `capacity` places an owner may hold beside those who hold some.

    Everybody the same, and an eighth is kept for those who are still to come. Where nobody says who
    asks, there is one owner, "", who has everything.
    """
    kept = capacity // 8 if owner else 0
    return max(1, (capacity - kept) // len(held.keys() | {owner}))


def too_many(owner: str, held: Mapping[str, int], capacity: int, what: str) -> str | None:
    """Why an owner cannot have one more of `capacity` places, as a sentence; None where it can."""
    if held.get(owner, 0) < places_of(owner, held, capacity):
        return None
    share = ", which is your share while others wait too" if held.keys() - {owner} else ""
    return f"{held[owner]} {what} already{share}."


class FairQueue(Generic[Item]):
    """What waits, one of each owner in turn; not for several threads by itself.

    `capacity` is shared as `places_of` says; an item may take several places.
    """

    def __init__(self, capacity: int, what: str) -> None:
        self._capacity, self._what = capacity, what
        self._waiting: dict[str, deque[tuple[Item, int]]] = {}
        self._held: Counter[str] = Counter()

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def put(self, owner: str, item: Item, places: int = 1) -> None:
        """Add an item behind its owner's others. Raises `Busy` where its owner has its share."""
        refusal = too_many(owner, self._held, self._capacity, self._what)
        if refusal or sum(self._held.values()) >= 2 * self._capacity:
            raise Busy(refusal or f"Too many {self._what} already.", "Try again soon.")
        self._waiting.setdefault(owner, deque()).append((item, places))
        self._held[owner] += places

    def pop(self) -> Item:
        """The next item; its owner's others come after everybody else's."""
        owner, queue = next(iter(self._waiting.items()))
        item, places = queue.popleft()
        del self._waiting[owner]
        self._held[owner] -= places
        if queue:
            self._waiting[owner] = queue
        else:
            del self._held[owner]
        return item
