"""Who may ask, and how often."""

import hashlib
import hmac
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

from starlette.types import Scope

from fastface_trt.serving.addresses import client_of_address
from fastface_trt.serving.http.errors import InvalidApiKey, RateLimited

MAX_BUCKETS = 10_000
"""Clients whose rate is remembered; the one that asked longest ago is forgotten first."""


class ApiKeys:
    """The keys that are let in; none lets everybody in."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._keys = [key.encode() for key in keys]

    def owner_of(self, scope: Scope) -> str:
        """Who asks: a digest of the key, or the address where there are no keys.

        Raises `InvalidApiKey`.
        """
        if not self._keys:
            return address_of(scope)
        given = _bearer(scope)
        found = False
        for key in self._keys:  # all of them, so that the time tells nothing
            found |= hmac.compare_digest(key, given)
        if not found:
            raise InvalidApiKey(
                "This server needs an API key, and this is none of its keys."
                if given
                else "This server needs an API key.",
                "Send it as 'Authorization: Bearer KEY'.",
            )
        return f"key {hashlib.sha256(given).hexdigest()[:12]}"


def address_of(scope: Scope) -> str:
    """Whose address a request came from; see `client_of_address`."""
    client = scope.get("client")
    return f"address {client_of_address(client[0]) if client else 'unknown'}"


def _bearer(scope: Scope) -> bytes:
    for name, value in scope["headers"]:
        if name == b"authorization":
            kind, _, key = bytes(value).partition(b" ")
            return key.strip() if kind.lower() == b"bearer" else b""
    return b""


class RateLimit:
    """A token bucket per client: `per_minute` requests at once, refilled evenly. Of one thread."""

    def __init__(self, per_minute: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute, self._clock = per_minute, clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, client: str) -> None:
        """Count a request of a client. Raises `RateLimited` with the time until the next."""
        if self._per_minute is None:
            return
        now, rate = self._clock(), self._per_minute / 60
        tokens, since = self._buckets.pop(client, (float(self._per_minute), now))
        tokens = min(float(self._per_minute), tokens + (now - since) * rate)
        allowed = tokens >= 1
        self._buckets[client] = (tokens - 1 if allowed else tokens, now)
        if len(self._buckets) > MAX_BUCKETS:
            self._buckets.popitem(last=False)
        if not allowed:
            wait = (1 - tokens) / rate
            raise RateLimited(
                f"More than {self._per_minute} requests per minute.",
                f"Try again in {math.ceil(wait)} s.",
                retry_after=wait,
            )
