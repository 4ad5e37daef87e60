"""Forms (multipart/form-data, RFC 7578) of strangers: few parts with short heads, in UTF-8.

The whole body is in memory, so that a part is what lies between two boundaries: nothing looks at
each byte of a picture, and nothing is written to a disk.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from fastface_trt.serving.http.errors import InvalidField

MAX_PARTS = 220
MAX_HEAD = 4_000
"""Bytes of a part's headers; browsers write some hundred, and a long file name."""
_CHARSETS = frozenset({"utf-8", "utf8", "us-ascii", "ascii"})
_ENCODINGS = frozenset({"", "7bit", "8bit", "binary"})
_PARAMETER = re.compile(r'\s*;\s*([^\s;="]+)=("(?:[^"\\]|\\.)*"|[^;"]*)')


@dataclass(frozen=True, slots=True)
class Part:
    """A field of a form; `filename` is None where it is text."""

    name: str
    filename: str | None
    data: bytes

    @property
    def text(self) -> str:
        """Its content. Raises `InvalidField` where that is not UTF-8."""
        try:
            return self.data.decode()
        except UnicodeDecodeError:
            raise InvalidField(
                f"{self.name} is not in UTF-8.", "Write the form in UTF-8.", param=self.name
            ) from None


def read_form(content_type: str, body: bytes | bytearray) -> Iterator[Part]:
    """The parts of a form, whose body is all there. Raises `InvalidField`."""
    parameters = _parameters(content_type)
    boundary = parameters.get("boundary", "").encode("latin-1")
    if not 1 <= len(boundary) <= 70:  # RFC 2046, 5.1.1
        raise _broken("its type names no boundary of up to 70 characters")
    _check_charset(parameters)
    delimiter = b"\r\n--" + boundary
    at = 0 if body.startswith(delimiter[2:]) else body.find(delimiter) + 2
    if at == 1:  # nothing was found
        raise _broken("it does not begin with its boundary")
    at += len(boundary) + 2
    for _ in range(MAX_PARTS + 1):
        if body[at : at + 2] == b"--":
            return
        line_end = body.find(b"\r\n", at, at + MAX_HEAD)
        head_end = body.find(b"\r\n\r\n", max(line_end, at), at + MAX_HEAD)
        if head_end < 0 or body[at:line_end].strip(b" \t"):
            raise _broken(f"a part has no headers, or more than {MAX_HEAD:,} bytes of them")
        next_one = body.find(delimiter, head_end + 4)
        if next_one < 0:
            raise _broken("it is cut off")
        yield _part(bytes(body[line_end:head_end]), bytes(body[head_end + 4 : next_one]))
        at = next_one + len(delimiter)
    raise _broken(f"it has more than {MAX_PARTS} parts")


def _part(head: bytes, data: bytes) -> Part:
    headers = dict[str, str]()
    for line in head.decode("latin-1").split("\r\n")[1:]:
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    disposition = headers.get("content-disposition", "")
    parameters = _parameters(disposition)
    if not disposition.lower().startswith("form-data") or "name" not in parameters:
        raise _broken("a part has no name")
    _check_charset(_parameters(headers.get("content-type", "")))
    if headers.get("content-transfer-encoding", "").lower() not in _ENCODINGS:
        raise _broken("a part has a Content-Transfer-Encoding, which forms have no more")
    named = {"filename", "filename*"} & parameters.keys()
    filename = parameters.get("filename", "a name") if named else None
    return Part(_utf8(parameters["name"]), filename, data)


def _utf8(name: str) -> str:
    try:
        return name.encode("latin-1").decode()
    except UnicodeDecodeError:
        raise _broken("the name of a part is not in UTF-8") from None


def _parameters(header: str) -> dict[str, str]:
    """What follows the value of a header, `; name=value; name="value"`."""
    found = dict[str, str]()
    at = header.find(";")
    # One after the other and not by a search, which would begin anew at every semicolon.
    while at >= 0 and (match := _PARAMETER.match(header, at)):
        name, value = match.group(1).lower(), match.group(2).strip()
        if value.startswith('"'):
            value = re.sub(r'\\(["\\])', r"\1", value[1:-1])
        if name in found:
            raise _broken(f"a header says {name[:40]!r} twice")
        found[name] = value
        at = match.end()
    return found


def _check_charset(parameters: dict[str, str]) -> None:
    if parameters.get("charset", "utf-8").lower() not in _CHARSETS:
        raise _broken("its text is in another encoding than UTF-8")


def _broken(reason: str) -> InvalidField:
    return InvalidField(
        f"The form cannot be read: {reason}.", "Send multipart/form-data in UTF-8, with one file."
    )
