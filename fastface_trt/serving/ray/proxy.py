"""Errors of Ray's own HTTP proxies, in the shape of the HTTP surface.

A proxy refuses requests when its queue is full, and when a replica dies it has no answer for those
inside. Ray says the first as plain text and the second as an empty 500, or by ending a stream
without a word. The hook `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=fastface_trt.serving.ray.proxy:
middlewares`, which `fastface-trt serve --ray` sets, makes errors of OpenAI's shape of them.
"""

import math
from collections.abc import Sequence

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastface_trt.errors import DeadlinePassed, FastFaceError, Unavailable
from fastface_trt.serving.http.errors import Overloaded, error_answer, error_event

_OURS = b"req_"
"""How the ids of answered requests begin: what comes without one is the proxy's own."""
_RAYS_PATHS = "/-/"
_AGAIN = "Send it again: the same seed makes the same picture."


def middlewares() -> list[Middleware]:
    """What Ray's proxies put around themselves; see the module."""
    return [Middleware(ProxyAnswers)]


class ProxyAnswers:
    """Every answer has one request id, and errors have OpenAI's shape, whoever makes them."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith(_RAYS_PATHS):
            await self._app(scope, receive, send)
            return
        answer = _Answer(send)
        await self._app(scope, receive, answer.take)
        failure = answer.failure()
        if failure is not None:
            await error_answer(failure, answer.id)(scope, receive, answer.send_with_id)
        elif answer.cut_off_stream:
            last = error_event(_replica_gone(), answer.id)
            await send({"type": "http.response.body", "body": last})


class _Answer:
    """What was sent of one answer, and what has to be said in its place."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._started = self._ended = self._stream = False
        self._replaced: FastFaceError | None = None
        self.id = "unknown"

    @property
    def cut_off_stream(self) -> bool:
        """Whether a stream of events began that has no end."""
        return self._stream and not self._ended

    def failure(self) -> FastFaceError | None:
        """The error that the client gets instead of an answer, or None where it has one."""
        if self._replaced is not None:
            return self._replaced
        if self._started:
            return None
        return _replica_gone()

    async def take(self, message: Message) -> None:
        """A message of the proxy: passed on, or held back where it is the proxy's own error."""
        if message["type"] == "http.response.start":
            headers = list(message.get("headers", ()))
            ids = _values(headers, b"x-request-id")
            own = next((one for one in ids if one.startswith(_OURS)), None)
            self.id = (own or (ids[0] if ids else b"unknown")).decode("latin-1")
            if own is None and message["status"] >= 400:
                self._replaced = _as_our_error(message["status"], _values(headers, b"retry-after"))
                return
            self._started = True
            self._stream = b"text/event-stream" in b"".join(_values(headers, b"content-type"))
            await self.send_with_id(message)
        elif self._replaced is None:
            self._ended = self._ended or not message.get("more_body", False)
            await self._send(message)

    async def send_with_id(self, message: Message) -> None:
        """Send a message; its start has exactly one request id."""
        if message["type"] == "http.response.start":
            headers = [h for h in message.get("headers", ()) if h[0].lower() != b"x-request-id"]
            message = {**message, "headers": [*headers, (b"x-request-id", self.id.encode())]}
        await self._send(message)


def _values(headers: Sequence[tuple[bytes, bytes]], name: bytes) -> list[bytes]:
    return [value for key, value in headers if key.lower() == name]


def _replica_gone() -> FastFaceError:
    return Unavailable("The replica that worked on this request is gone.", _AGAIN)


def _as_our_error(status: int, retry_after: Sequence[bytes]) -> FastFaceError:
    if status == 408:
        return DeadlinePassed("The request took longer than the proxy waits.", _AGAIN)
    if status in (429, 503) and retry_after:
        seconds = float(retry_after[0])
        return Overloaded(
            "As many requests wait as may wait.",
            f"Try again in {math.ceil(seconds)} seconds.",
            retry_after=seconds,
        )
    return Unavailable("No replica takes requests at the moment.", "Try again in a moment.")
