"""What only an HTTP server can refuse."""

from fastface_trt.errors import Busy, FastFaceError


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


class InvalidField(FastFaceError):
    """A field that is unknown, missing, or of a wrong type; `param` is its name."""

    code = "invalid_request"

    def __init__(self, message: str, mend: str = "", *, param: str | None = None) -> None:
        super().__init__(message, mend)
        self.param = param
