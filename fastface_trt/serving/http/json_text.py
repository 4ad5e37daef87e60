"""JSON of strangers, bounded before anything is built of it.

A parser makes an object of every two bytes of `[{},{},…]` and lets no other thread run meanwhile,
so that 20 MB would stop a server for ten seconds and leave it gigabytes. Here the text is walked
from quote to quote first, which takes a search per quote, and the walk ends at the first limit that
is passed. Only a picture may be long; it is cut out on the way, and what remains is small.
"""

import json
import secrets
from collections.abc import Collection
from typing import Any

from fastface_trt.errors import BadPicture
from fastface_trt.serving.http.errors import InvalidField

MAX_TEXT = 100_000
"""Bytes of a text that is no picture: 8,000 characters of a prompt may be written in 12 each."""
MAX_REST = 1_000_000
"""Bytes of a body without its pictures; all lists at their longest take a third of it."""
MAX_NAMES = 250
"""Names of fields in all objects together, four times as many as there are."""
MAX_NAME = 200
MAX_ITEMS = 20_000
"""Items of all lists together: one number per step, of up to 1,000 steps, for 17 fields."""
MAX_LISTS = 250
MAX_DEPTH = 8
MAX_TEXTS = 1_000
"""Names and texts, which the walk goes through one by one."""
MAX_QUOTES = 20_000
"""Quotes within texts, as prompts may have them."""
MAX_PICTURES = 20
"""More than one is refused by its name; OpenAI takes 16."""
_LESS = "Only a picture may be that long."
_PIECE = 1_000_000
"""Bytes of a picture that are read at once; between them other threads run."""
_ESCAPE = len(r"\u0000")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def read_json(data: bytes | bytearray, pictures: Collection[str] = ()) -> Any:
    """The value of a JSON text; of a top-level object, the fields in `pictures` may be long.

    Stricter than Python's own reader: UTF-8 only, no NaN, no name twice in an object, no half of
    a surrogate pair in a name. Raises ValueError for what is no JSON, `InvalidField` for more of
    anything than its limit, and `BadPicture` for a long text that cannot be base64.
    """
    text, spans = _walked(data)
    value = json.loads(text.decode(), object_pairs_hook=_once, parse_constant=_no_number)
    if spans and isinstance(value, dict):
        for name in pictures:
            if name in value:
                value[name] = _filled(value[name], data, spans)
        for name, one in value.items():
            if name not in pictures and any(place in repr(one) for place in spans):
                raise InvalidField(f"{name} is longer than {MAX_TEXT:,} bytes.", _LESS, param=name)
    if spans:
        raise InvalidField(f"A text of the body is longer than {MAX_TEXT:,} bytes.", _LESS)
    return value


def _walked(data: bytes | bytearray) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The text with its long strings exchanged for others, and where each of those was."""
    kept: list[bytes | bytearray] = []
    outside: list[bytes | bytearray] = []
    spans: dict[str, tuple[int, int]] = {}
    salt = secrets.token_hex(8)  # or a client could write the name of a place itself
    rest, at, texts, quotes = 0, 0, 0, 0
    while True:
        start = data.find(b'"', at)
        rest += (len(data) if start < 0 else start) - at
        _at_most(MAX_REST, rest, "bytes beside its pictures")
        kept.append(data[at:] if start < 0 else data[at:start])
        outside.append(kept[-1])
        if start < 0:
            break
        texts += 1
        _at_most(MAX_TEXTS, texts, "texts")
        after = end = start + 1
        while True:
            end = data.find(b'"', after)
            if end < 0:
                raise ValueError("a string without an end")
            since = data[after:end]
            after = end + 1
            if (len(since) - len(since.rstrip(b"\\"))) % 2 == 0:  # else the quote is escaped
                break
            quotes += 1
            _at_most(MAX_QUOTES, quotes, "quotes in its texts")
        if after - start > MAX_TEXT:
            place = f"{salt} {len(spans)}"
            spans[place] = start + 1, end
            _at_most(MAX_PICTURES, len(spans), "pictures")
            kept.append(json.dumps(place).encode())
        else:
            rest += after - start
            kept.append(data[start:after])
        at = after
    _check_structure(b"".join(outside))
    return b"".join(kept), spans


def _check_structure(outside: bytes) -> None:
    """Bounds on what a parser would build, from the bytes between the strings."""
    _at_most(MAX_NAMES, outside.count(b":"), "fields")
    _at_most(MAX_ITEMS, outside.count(b","), "items")
    brackets = outside.translate(None, _NO_BRACKETS)
    _at_most(MAX_LISTS, len(brackets) // 2, "lists and objects")
    depth = 0
    for bracket in brackets:
        depth += 1 if bracket in b"[{" else -1
        _at_most(MAX_DEPTH, depth, "levels")


def _at_most(limit: int, count: int, what: str) -> None:
    if count > limit:
        raise InvalidField(f"The body has more than {limit:,} {what}.", "See /docs for its fields.")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, in which a name that stands twice would say two things."""
    values = dict[str, Any]()
    for name, value in pairs:
        if len(name) > MAX_NAME:
            raise InvalidField(f"The name of a field has {len(name):,} characters.", "See /docs.")
        name.encode()  # ValueError for half of a surrogate pair
        if name in values:
            raise InvalidField(f"The field {name!r} is given twice.", "Give it once.", param=name)
        values[name] = value
    return values


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _filled(value: Any, data: bytes | bytearray, spans: dict[str, tuple[int, int]]) -> Any:
    """`value` with the long strings that belong into it, which leave `spans`."""
    if isinstance(value, str) and value in spans:
        return _long_text(data, *spans.pop(value))
    if isinstance(value, list):
        return [_filled(one, data, spans) for one in value]
    if isinstance(value, dict):
        return {name: _filled(one, data, spans) for name, one in value.items()}
    return value


def _long_text(data: bytes | bytearray, at: int, end: int) -> str:
    """A string without its quotes and escapes, read piece by piece."""
    pieces = []
    while at < end:
        cut = min(at + _PIECE, end)
        # No escape is cut in two, but for the backslash itself, which is not of base64.
        escape = data.rfind(b"\\", cut - _ESCAPE, cut) if cut < end else -1
        cut = escape if escape > at else cut
        try:
            pieces.append(json.loads(f'"{data[at:cut].decode()}"'))
        except ValueError:
            raise BadPicture(
                "The picture is not base64.", "Send its bytes in base64 (RFC 4648)."
            ) from None
        at = cut
    return "".join(pieces)
