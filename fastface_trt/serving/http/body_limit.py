"""A bound on the bytes and on the time of a request's body, kept while it streams in."""

import asyncio
import json
from time import monotonic

from starlette.types import ASGIApp, Message, Receive, Scope, Send


class BodyLimit:
    """ASGI middleware: 413 for a body that is too large, 408 for one that takes too long.

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
        body = _Body(receive, send, self._max_bytes, self._seconds)
        if _announced(scope) > self._max_bytes:
            body.verdict = 413
        else:
            try:
                await self._app(scope, body.receive, body.send)
            except Exception:
                if body.verdict is None:
                    raise
        if body.verdict is not None and not body.answered:
            await _refuse(send, body.verdict, self._max_bytes, self._seconds)


class _Body:
    """What is known of one request's body; `verdict` is the status that it is refused with."""

    def __init__(self, receive: Receive, send: Send, max_bytes: int, seconds: float) -> None:
        self._receive, self._send = receive, send
        self._left, self._seconds = max_bytes, seconds
        self._end: float | None = None
        self._complete = False
        self.verdict: int | None = None
        self.answered = False

    async def receive(self) -> Message:
        if self.verdict is not None:
            return {"type": "http.disconnect"}
        if self._complete:
            return await self._receive()
        if self._end is None:  # an app that looks for its body late is not the client's fault
            self._end = monotonic() + self._seconds
        try:
            message = await asyncio.wait_for(self._receive(), max(0.0, self._end - monotonic()))
        except asyncio.TimeoutError:
            self.verdict = 408
            return {"type": "http.disconnect"}
        self._left -= len(message.get("body", b""))
        self._complete = not message.get("more_body", False)
        if self._left < 0:
            self.verdict = 413
            return {"type": "http.disconnect"}
        return message

    async def send(self, message: Message) -> None:
        if self.verdict is None or self.answered:
            self.answered = True
            await self._send(message)


def _announced(scope: Scope) -> int:
    """The body's length as the client tells it, 0 where it does not."""
    lengths = [value for name, value in scope["headers"] if name == b"content-length"]
    # Python reads digits of any number only up to a limit; nobody announces 20 digits in earnest.
    return max((int(value[:20]) for value in lengths if value.isdigit()), default=0)


async def _refuse(send: Send, status: int, max_bytes: int, seconds: float) -> None:
    message, code = {
        413: (f"The body is larger than {max_bytes:,} bytes.", "request_too_large"),
        408: (f"The body did not arrive within {seconds:g} seconds.", "request_timeout"),
    }[status]
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    answer = json.dumps({"error": error}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(answer)).encode()),
        (b"connection", b"close"),  # what still comes of the body is not waited for
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": answer})
