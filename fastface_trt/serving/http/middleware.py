"""What every request passes before its route, outermost first.

`RequestLog` gives it an id, a line in the log, metrics and a trace; `Gate` lets it in by its key,
its client's rate and what is in work; `BodyLimit` bounds its body's bytes and time.
"""

import asyncio
import hashlib
import hmac
import logging
import math
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Network, ip_address
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastface_trt.errors import FastFaceError
from fastface_trt.serving.http.admission import Admission
from fastface_trt.serving.http.errors import (
    BodyTimeout,
    BodyTooLarge,
    InvalidApiKey,
    RateLimited,
    error_answer,
)
from fastface_trt.serving.http.logs import FIELDS, LOGGER, log_event
from fastface_trt.serving.http.metrics import Metrics
from fastface_trt.serving.http.tracing import Tracing

MAX_BUCKETS = 10_000
"""Clients whose rate is remembered; the one that asked longest ago is forgotten first."""
CLIENT_GONE = 499
OUTCOMES = {408: "request_timeout", 413: "request_too_large", CLIENT_GONE: "disconnected"}
NO_SNIFFING = (b"x-content-type-options", b"nosniff")
WORKING = ("/v1/images/generations", "/v1/images/edits", "/v1/faces")
PROBES = ("/health", "/healthz", "/v2/health/live", "/v2/health/ready", "/metrics")
ROUTES = frozenset(
    {
        *WORKING,
        "/",
        "/v1/models",
        "/v1/presets",
        *PROBES,
        "/docs",
        "/openapi.json",
    }
)


@dataclass(slots=True)
class Record:
    """One request: who asks, since when, and what became of it."""

    id: str
    arrived: float
    owner: str = ""
    outcome: str = ""
    tasks: int = 0
    prompt: str | None = None
    failure: FastFaceError | None = None
    seconds: list[Mapping[str, float]] = field(default_factory=list)
    held: ExitStack = field(default_factory=ExitStack)
    """Places that the request has taken; they are free again when its answer was sent."""


def record_of(scope: MutableMapping[str, Any]) -> Record:
    """The record of the request that `scope` belongs to."""
    record = scope["state"]["record"]
    assert isinstance(record, Record)
    return record


class RequestLog:
    """Gives each request its id, and logs, counts and traces its end.

    Whatever is not an error of a client's ends here, as a 500 that says nothing.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics, tracing: Tracing) -> None:
        self._app, self._metrics, self._tracing = app, metrics, tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = Record(f"req_{secrets.token_hex(12)}", time.monotonic())
        scope.setdefault("state", {})["record"] = record
        route, method = route_of(path_of(scope)), scope["method"]
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                ours = [(b"x-request-id", record.id.encode()), NO_SNIFFING]
                message = {**message, "headers": [*message.get("headers", ()), *ours]}
            await send(message)

        self._metrics.request_began()
        try:
            with self._tracing.request(scope, route, record):
                try:
                    await self._app(scope, receive, send_with_id)
                    if record.failure is not None:
                        self._log_failure(record, record.failure)
                except Exception as error:
                    record.outcome = record.outcome or "internal_error"
                    self._log_failure(record, error)
                    if not status:
                        failure = FastFaceError("")
                        await error_answer(failure, record.id)(scope, receive, send_with_id)
        finally:
            if not status or (status == 200 and record.outcome == "disconnected"):
                status = CLIENT_GONE
            self._end(record, route, method, status)

    def _log_failure(self, record: Record, error: Exception) -> None:
        logging.getLogger(LOGGER).error(
            "a request failed", exc_info=error, extra={FIELDS: {"id": record.id}}
        )

    def _end(self, record: Record, route: str, method: str, status: int) -> None:
        seconds = time.monotonic() - record.arrived
        self._metrics.request_ended(route, method, status, seconds)
        fields: dict[str, Any] = {
            "id": record.id,
            "method": method,
            "route": route,
            "status": status,
            "ms": round(seconds * 1000, 1),
            "outcome": OUTCOMES.get(status)
            or record.outcome
            or ("ok" if status < 400 else "refused"),
        }
        if record.tasks:
            fields["tasks"] = record.tasks
        if record.prompt is not None:
            fields["prompt"] = record.prompt
        quiet = route in PROBES and status == 200
        log_event("request", level=logging.DEBUG if quiet else logging.INFO, **fields)


def path_of(scope: Scope) -> str:
    """The path as the router sees it, without what a proxy or a mount put before it."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    if root and path.startswith(root) and path[len(root) : len(root) + 1] in ("", "/"):
        return path[len(root) :]
    return path


def route_of(path: str) -> str:
    """The route of a path, one of few: a client must not be able to make more metrics."""
    if path in ROUTES:
        return path
    for parent in ("/v1/faces", "/v1/models"):
        if path.startswith(f"{parent}/"):
            return f"{parent}/{{id}}"
    return "other"


class Gate:
    """Lets a request in by its key, its client's rate, and what is in work; before its body.

    /metrics has keys of its own, or none.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: "ApiKeys",
        metrics_keys: "ApiKeys | None",
        limit: "RateLimit",
        admission: Admission,
    ) -> None:
        self._app, self._keys, self._limit, self._admission = app, keys, limit, admission
        self._keys_of = {"/metrics": metrics_keys} if metrics_keys else {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = path_of(scope) if scope["type"] == "http" else ""
        if not path.startswith("/v1/") and path not in self._keys_of:
            await self._app(scope, receive, send)
            return
        record = record_of(scope)
        with record.held:
            try:
                record.owner = self._owner(scope, self._keys_of.get(path, self._keys))
                if scope["method"] == "POST" and path in WORKING:
                    self._admission.check(record.owner)
            except FastFaceError as error:
                record.outcome = error.code
                await error_answer(error, record.id)(scope, receive, send)
                return
            await self._app(scope, receive, send)

    def _owner(self, scope: Scope, keys: "ApiKeys") -> str:
        try:
            owner = keys.owner_of(scope)
        except InvalidApiKey:
            self._limit.take(address_of(scope))  # so that nobody tries many
            raise
        self._limit.take(owner)
        return owner


async def has_passed_the_gate(request: Request) -> None:
    """A dependency of every route that needs a key, should the gate and the router ever disagree.

    Raises `InvalidApiKey`.
    """
    if not record_of(request.scope).owner:
        raise InvalidApiKey("This server needs an API key.", "Ask under the plain address.")


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


def _bearer(scope: Scope) -> bytes:
    given = [bytes(value) for name, value in scope["headers"] if name == b"authorization"]
    if len(given) != 1:  # of two, a proxy may have looked at the other
        return b""
    kind, _, key = given[0].partition(b" ")
    return key.strip() if kind.lower() == b"bearer" else b""


class RateLimit:
    """A token bucket per client: `count` at once, refilled evenly in `seconds`. Of one thread."""

    def __init__(
        self,
        count: int | None,
        clock: Callable[[], float] = time.monotonic,
        *,
        seconds: float = 60.0,
    ) -> None:
        self._count, self._clock, self._seconds = count, clock, seconds
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, client: str) -> None:
        """Count a request of a client. Raises `RateLimited` with the time until the next."""
        wait = self.wait(client)
        if wait:
            raise RateLimited(
                f"More than {self._count} requests per minute.",
                f"Try again in {math.ceil(wait)} s.",
                retry_after=wait,
            )

    def wait(self, client: str) -> float:
        """Count whatever a client does; the seconds until it may, 0 where it may now."""
        if self._count is None:
            return 0
        now, rate = self._clock(), self._count / self._seconds
        tokens, since = self._buckets.pop(client, (float(self._count), now))
        tokens = min(float(self._count), tokens + (now - since) * rate)
        allowed = tokens >= 1
        self._buckets[client] = (tokens - 1 if allowed else tokens, now)
        if len(self._buckets) > MAX_BUCKETS:
            self._buckets.popitem(last=False)
        return 0 if allowed else (1 - tokens) / rate


def address_of(scope: Scope) -> str:
    """Whose address a request came from; see `client_of_address`."""
    client = scope.get("client")
    return f"address {client_of_address(client[0]) if client else 'unknown'}"


def client_of_address(text: str) -> str:
    """Whom to count as one client: an IPv4 address, or the /64 network of an IPv6 one.

    Whoever has one IPv6 address has 2⁶⁴ of them (RFC 6177).
    """
    try:
        address = ip_address(text)
    except ValueError:  # no address, but the path of a socket
        return text
    if isinstance(address, IPv4Address):
        return text
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(IPv6Network((int(address) >> 64 << 64, 64)))


class BodyLimit:
    """413 for a body that is too large, 408 for one that takes too long.

    A length that the client announces is believed where it is too large; what comes is counted in
    any case. The app then sees its client leave, and whatever it answers to that is not sent.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, seconds: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on to the app, within the bounds."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = _BoundedBody(receive, send, self._max_bytes, self._seconds)
        if _announced_bytes(scope) > self._max_bytes:
            body.refuse_size()
        else:
            try:
                await self._app(scope, body.receive, body.send)
            except Exception:
                if body.refusal is None:
                    raise
        if body.refusal is not None and not body.answered:
            answer = error_answer(body.refusal, request_id="")
            answer.headers["Connection"] = "close"  # what still comes of the body is not waited for
            await answer(scope, receive, send)


class _BoundedBody:
    """One request's body on its way to the app; `refusal` is why the rest of it is not read."""

    def __init__(self, receive: Receive, send: Send, max_bytes: int, seconds: float) -> None:
        self._receive, self._send = receive, send
        self._max_bytes, self._seconds = max_bytes, seconds
        self._bytes = 0
        self._end: float | None = None
        self._complete = False
        self.refusal: FastFaceError | None = None
        self.answered = False

    def refuse_size(self) -> None:
        self.refusal = BodyTooLarge(f"The body is larger than {self._max_bytes:,} bytes.")

    async def receive(self) -> Message:
        if self.refusal is not None:
            return {"type": "http.disconnect"}
        if self._complete:
            return await self._receive()
        if self._end is None:  # an app that looks for its body late is not the client's fault
            self._end = time.monotonic() + self._seconds
        try:
            message = await asyncio.wait_for(
                self._receive(), max(0.0, self._end - time.monotonic())
            )
        except asyncio.TimeoutError:
            self.refusal = BodyTimeout(f"The body did not arrive within {self._seconds:g} seconds.")
            return {"type": "http.disconnect"}
        self._bytes += len(message.get("body", b""))
        self._complete = not message.get("more_body", False)
        if self._bytes > self._max_bytes:
            self.refuse_size()
            return {"type": "http.disconnect"}
        return message

    async def send(self, message: Message) -> None:
        if self.refusal is None or self.answered:
            self.answered = True
            await self._send(message)


def _announced_bytes(scope: Scope) -> int:
    """The body's length as its header says, 0 without one."""
    lengths = [value for name, value in scope["headers"] if name == b"content-length"]
    # Python reads digits of any number only up to a limit; nobody announces 20 digits in earnest.
    return max((int(value[:20]) for value in lengths if value.isdigit()), default=0)
