"""Registered faces: in memory only, each for a time, each of one owner.

They are biometric data. They are never logged or written, and they are gone when their time is
over, when they are deleted, or when the server stops. The time is measured by a clock that nobody
sets; the times that clients see are the wall clock's, and only shown.
"""

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from fastface_trt.errors import Busy
from fastface_trt.runtime.face import Face
from fastface_trt.serving.http.admission import Shares
from fastface_trt.serving.http.errors import UnknownFace


@dataclass(frozen=True, slots=True)
class RegisteredFace:
    """A face under a name. `expires` is of the registry's clock, the others are Unix times."""

    id: str
    owner: str = field(repr=False)
    face: Face = field(repr=False)
    expires: float
    created_at: int
    expires_at: int


class FaceRegistry:
    """Faces by name, at most `capacity` of them, each for `ttl` seconds. Of one thread."""

    def __init__(
        self, ttl: float, capacity: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._ttl, self._capacity, self._clock = ttl, capacity, clock
        self._shares = Shares(capacity)
        self._faces: dict[str, RegisteredFace] = {}  # in the order in which they expire

    def __len__(self) -> int:
        self.forget_expired()
        return len(self._faces)

    def add(self, owner: str, face: Face) -> RegisteredFace:
        """Keep a face. Raises `Busy` when there are as many as there may be, or for this owner.

        None is dropped for a new one, or whoever registers many would delete those of others.
        """
        now, wall = self._clock(), time.time()
        mine = self.of(owner)
        if not self._shares.allows(owner):
            full = self._shares.is_full()
            first = next(iter(self._faces.values())) if full else mine[0]
            raise Busy(
                f"The server keeps {self._capacity} faces already."
                if full
                else f"You keep {len(mine)} faces, which is the share of one client now.",
                "Delete those of yours that you need no more, or try again later.",
                retry_after=first.expires - now,
            )
        one = RegisteredFace(
            f"face_{secrets.token_urlsafe(18)}",
            owner,
            face,
            now + self._ttl,
            int(wall),
            int(wall + self._ttl),
        )
        self._faces[one.id] = one
        self._shares.take(owner)
        return one

    def get(self, owner: str, name: str) -> RegisteredFace:
        """A face of this owner. Raises `UnknownFace`; others' faces are unknown too."""
        self.forget_expired()
        one = self._faces.get(name)
        if one is None or one.owner != owner:
            raise UnknownFace(
                "There is no such face.", "Register it (again) with POST /v1/faces: faces expire."
            )
        return one

    def of(self, owner: str) -> list[RegisteredFace]:
        """All faces of an owner, oldest first."""
        self.forget_expired()
        return [one for one in self._faces.values() if one.owner == owner]

    def delete(self, owner: str, name: str) -> None:
        """Forget a face now. Raises `UnknownFace`."""
        self._drop(self.get(owner, name))

    def forget_expired(self) -> None:
        """Drop what is over; a server calls it from time to time even when nobody asks."""
        now = self._clock()
        for one in list(self._faces.values()):
            if one.expires > now:
                break
            self._drop(one)

    def clear(self) -> None:
        """Forget all."""
        for one in list(self._faces.values()):
            self._drop(one)

    def _drop(self, one: RegisteredFace) -> None:
        del self._faces[one.id]
        self._shares.give_back(one.owner)


class Faces(Protocol):
    """Registered faces as the routes see them: in this process, or shared by several.

    The methods are those of `FaceRegistry`; a shared registry also raises `Unavailable`.
    """

    @property
    def count(self) -> int:
        """How many there are, as far as this process knows."""
        ...

    async def add(self, owner: str, face: Face) -> RegisteredFace: ...

    async def get(self, owner: str, name: str) -> RegisteredFace: ...

    async def of(self, owner: str) -> list[RegisteredFace]: ...

    async def delete(self, owner: str, name: str) -> None: ...

    async def forget_expired(self) -> None: ...

    def close(self) -> None:
        """The server stops: forget what only it has."""
        ...


class OwnFaces:
    """`Faces` in a `FaceRegistry` of this process."""

    def __init__(self, ttl: float, capacity: int) -> None:
        self._registry = FaceRegistry(ttl, capacity)

    @property
    def count(self) -> int:
        return len(self._registry)

    async def add(self, owner: str, face: Face) -> RegisteredFace:
        return self._registry.add(owner, face)

    async def get(self, owner: str, name: str) -> RegisteredFace:
        return self._registry.get(owner, name)

    async def of(self, owner: str) -> list[RegisteredFace]:
        return self._registry.of(owner)

    async def delete(self, owner: str, name: str) -> None:
        self._registry.delete(owner, name)

    async def forget_expired(self) -> None:
        self._registry.forget_expired()

    def close(self) -> None:
        self._registry.clear()
