"""Bodies, JSON and multipart, into the same models. Nothing of them is written to a disk.

A bound on the bytes and on the time of a request's body, kept while it streams in.
"""

import asyncio
import json
import re
from collections.abc import Mapping
from time import monotonic
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from python_multipart.exceptions import FormParserError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastface_trt.serving.http.errors import InvalidField, UnsupportedBody, invalid_field

Body = TypeVar("Body", bound=BaseModel)

QUICK_BYTES = 100_000
"""Below this a body is parsed at once; above, beside the event loop."""
MAX_FIELDS = 200
MAX_DEPTH = 4


def media_type(request: Request) -> str:
    """The type of the body, without its parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def json_body(request: Request, model: type[Body]) -> Body:
    """A JSON body. Raises `InvalidField`, `UnsupportedBody`."""
    if media_type(request) != "application/json":
        raise UnsupportedBody(
            f"The body's type is {media_type(request) or 'not said'!r}.", "Send application/json."
        )
    data = await request.body()
    try:
        if len(data) < QUICK_BYTES:
            return model.model_validate_json(data)
        return await asyncio.to_thread(model.model_validate_json, data)
    except ValidationError as error:
        raise invalid_field(error.errors(include_input=False, include_url=False)) from None


async def form_body(
    request: Request, model: type[Body], max_bytes: int, file_field: str = "image"
) -> tuple[Body, bytes | None]:
    """A multipart body, and the content of its file, if it has one.

    Text stands for JSON wherever the model has no text there; `name[]` is an item of a list and
    `name[key]` a member of an object, as OpenAI's clients write them. Raises `InvalidField`,
    `UnsupportedBody`.
    """
    if media_type(request) != "multipart/form-data":
        raise UnsupportedBody(
            f"The body's type is {media_type(request) or 'not said'!r}.",
            "Send multipart/form-data.",
        )
    parser = _InMemory(
        request.headers,
        request.stream(),
        max_files=1,
        max_fields=MAX_FIELDS,
        max_part_size=max_bytes,
    )
    parser.spool_max_size = max_bytes + 1
    try:
        form = await parser.parse()
    except (MultiPartException, FormParserError) as error:
        raise InvalidField(
            "The form cannot be read: "
            f"{str(getattr(error, 'message', error)).rstrip('.') or 'it is broken'}.",
            "Send multipart/form-data with one file at most.",
        ) from None
    file: bytes | None = None
    values: dict[str, Any] = {}
    text_fields = _text_fields(model)
    try:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                if name not in (file_field, f"{file_field}[]"):
                    raise InvalidField(
                        f"There is no file {name!r}.", f"Send it as {file_field}.", param=name
                    )
                file = await value.read()
            else:
                _put(values, name, value, text_fields)
    finally:
        await form.close()
    try:
        return model.model_validate(values), file
    except ValidationError as error:
        raise invalid_field(error.errors(include_input=False, include_url=False)) from None


class _InMemory(MultiPartParser):
    """Starlette's parser puts files of a megabyte on the disk; a face must not be there."""


def _text_fields(model: type[BaseModel]) -> frozenset[str]:
    """Fields that take nothing but text."""
    properties: Mapping[str, Any] = model.model_json_schema()["properties"]
    return frozenset(
        name
        for name, schema in properties.items()
        if {one.get("type") for one in schema.get("anyOf", [schema])} <= {"string", "null"}
    )


def _put(values: dict[str, Any], name: str, text: str, text_fields: frozenset[str]) -> None:
    """Set the field `name`, `name[]` or `name[key][key]` of `values`."""
    root, *keys = re.split(r"\[|\]\[", name.removesuffix("]"), maxsplit=MAX_DEPTH)
    value = text if root in text_fields else _decoded(text)
    place, key = values, root
    for next_key in keys:
        if next_key == "":
            place.setdefault(key, [])
            if isinstance(place[key], list):
                place[key].append(value)
                return
            raise InvalidField(f"The field {root!r} is given twice.", "Give it once.", param=root)
        inner = place.setdefault(key, {})
        if not isinstance(inner, dict):
            raise InvalidField(f"The field {root!r} is given twice.", "Give it once.", param=root)
        place, key = inner, next_key
    if key in place:
        raise InvalidField(f"The field {root!r} is given twice.", "Give it once.", param=root)
    place[key] = value


def _decoded(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


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
