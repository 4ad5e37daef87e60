"""Errors as OpenAI's clients read them: a status, a type, a code and one sentence with its hint.

First those that only an HTTP server can raise, then the answer to any error.
"""

import math
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import Response

from fastface_trt.errors import Busy, FastFaceError, Unavailable
from fastface_trt.serving.http.clients import REASONS
from fastface_trt.serving.http.responses import (
    ErrorAnswer,
    ErrorDetail,
    json_answer,
    server_sent_event,
)


class InvalidApiKey(FastFaceError):
    """No key, or one that the server does not know."""

    code = "invalid_api_key"


class RateLimited(Busy):
    """A client asks more often than it may; `retry_after` is in seconds."""

    code = "rate_limit_exceeded"


class Overloaded(Busy):
    """More requests are in work than the server takes on; `retry_after` is in seconds."""

    code = "overloaded"


class UnknownFace(FastFaceError):
    """A registered face that never was, has expired, or belongs to another key."""

    code = "unknown_face"


class UnsupportedBody(FastFaceError):
    """A body of another type than the address takes."""

    code = "unsupported_media_type"


class BodyTooLarge(FastFaceError):
    """A body of more bytes than the server takes."""

    code = "request_too_large"


class BodyTimeout(FastFaceError):
    """A body that did not arrive in time."""

    code = "request_timeout"


class InvalidField(FastFaceError):
    """A field that is unknown, missing, or of a wrong type; `param` is its name."""

    code = "invalid_request"

    def __init__(self, message: str, hint: str = "", *, param: str | None = None) -> None:
        super().__init__(message, hint)
        self.param = param


class UnknownModel(InvalidField):
    """A model that the server does not have."""

    code = "model_not_found"


STATUS_OF_CODE = {
    "invalid_request": 400,
    "unknown_name": 400,
    "bad_picture": 400,
    "no_face_found": 400,
    "face_index_out_of_range": 400,
    "refused": 400,
    "invalid_api_key": 401,
    "unknown_face": 404,
    "model_not_found": 404,
    "request_timeout": 408,
    "request_too_large": 413,
    "unsupported_media_type": 415,
    "busy": 429,
    "rate_limit_exceeded": 429,
    "cancelled": 499,
    "unavailable": 503,
    "overloaded": 503,
    "out_of_memory": 503,
    "deadline_passed": 504,
}
"""Codes that are not here are the server's own trouble: 500, without a detail."""

TYPE_OF_STATUS = {401: "authentication_error", 429: "rate_limit_error"}
RETRY_AFTER_UNAVAILABLE = 5.0
_NAME = 60
"""Characters of an unknown field's name that are compared with known ones; it may have millions."""
GENERIC = "The server failed to answer this request."
SECRET = frozenset({"out_of_memory"})
"""Codes whose sentence is for the operator's log only, though the status is not 500."""


def status_of(error: FastFaceError) -> int:
    """The HTTP status of an error."""
    return STATUS_OF_CODE.get(error.code, 500)


def is_internal(error: FastFaceError) -> bool:
    """Whether it is the server's own trouble: logged in full, and told without a detail."""
    return status_of(error) == 500 or error.code in SECRET


def retry_after(error: FastFaceError) -> float | None:
    """Seconds after which to try again; None where that is no use."""
    if isinstance(error, Busy):
        return error.retry_after
    if isinstance(error, Unavailable) or error.code == "out_of_memory":
        return RETRY_AFTER_UNAVAILABLE
    return None


def detail_of(error: FastFaceError, request_id: str) -> ErrorDetail:
    """What a client may know of an error: of the server's own trouble, only that there is some."""
    status = status_of(error)
    if is_internal(error):
        message = f"{GENERIC} Quote {request_id} when you report it."
    else:
        message = str(error)
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return ErrorDetail(
        message=message,
        type=TYPE_OF_STATUS.get(status, kind),
        param=getattr(error, "param", None),
        code="internal_error" if status == 500 else error.code,
    )


def error_answer(error: FastFaceError, request_id: str) -> Response:
    """The answer to a request that ended with `error`."""
    headers = {}
    seconds = retry_after(error)
    if seconds is not None:
        headers["Retry-After"] = str(max(1, math.ceil(seconds)))
    if error.code == "invalid_api_key":
        headers["WWW-Authenticate"] = "Bearer"
    answer = ErrorAnswer(error=detail_of(error, request_id))
    return json_answer(answer, status=status_of(error), headers=headers)


def error_event(error: FastFaceError, request_id: str) -> bytes:
    """The same at the end of a streamed answer, whose status has been sent."""
    detail = detail_of(error, request_id).model_dump()
    return server_sent_event("error", {"type": "error", "error": detail})


def http_error_answer(error: HTTPException) -> Response:
    """The answer to what the framework refused: no such address or method, a broken body."""
    codes = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}
    answer = ErrorAnswer(
        error=ErrorDetail(
            message=f"{str(error.detail).rstrip('.')}.",
            type="invalid_request_error" if error.status_code < 500 else "server_error",
            code=codes.get(error.status_code, "invalid_request"),
        )
    )
    return json_answer(answer, status=error.status_code, headers=dict(error.headers or {}))


def invalid_field(errors: Sequence[Any], known: Sequence[str] = ()) -> InvalidField:
    """The first of pydantic's errors that matters to a client, without the value that it sent.

    `known` are names that a field may have been meant for.
    """
    # An unknown field explains more than what it made of the others.
    first = next((one for one in errors if one["type"] == "extra_forbidden"), errors[0])
    place = [part for part in first["loc"] if part != "body"]
    # Past a field, the path names members of unions, which are ours and not the client's.
    named = ".".join(str(part) for part in place[:1]) or None
    if first["type"] == "extra_forbidden":
        *outer, last = place
        # A union's members are named by their class.
        above = [p for p in map(str, outer) if not p[:1].isupper()]
        path = ".".join([*above, str(last)])
        near = get_close_matches(path[:_NAME], known, n=1, cutoff=0.6)
        hint = f"Did you mean {near[0]}?" if near else "See /docs for those known."
        return InvalidField(f"There is no field {path!r}.", REASONS.get(path, hint), param=path)
    if named is not None and named in REASONS and first["type"] == "literal_error":
        return InvalidField(
            f"{named} takes only {first['ctx']['expected']} here.", REASONS[named], param=named
        )
    if first["type"] == "missing":
        return InvalidField(f"The field {named!r} is missing.", "See /docs.", param=named)
    if named is None or first["type"] == "json_invalid":
        return InvalidField("The body is not a JSON object.", "See /docs for what it holds.")
    return InvalidField(f"{named}: {first['msg']}.", "See /docs.", param=named)
