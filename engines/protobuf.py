"""The wire format of protocol buffers: walking the fields of a message.

ONNX files are protobuf messages. What engines need of them is little, and the onnx package, which
brings a compiler's worth of code, is not needed to run an engine.
"""

from collections.abc import Iterator
from typing import Final, NamedTuple

VARINT: Final = 0
BYTES: Final = 2
_FIXED64, _FIXED32 = 1, 5


class Field(NamedTuple):
    """A field of a message: its number and its value.

    The value is an int for a number, a view for bytes, text or a message; fixed-width numbers come
    as their bytes.
    """

    number: int
    value: int | memoryview


def fields(message: memoryview) -> Iterator[Field]:
    """The fields of a serialised message in order; raises `ValueError` when it is cut."""
    at, end = 0, len(message)
    while at < end:
        tag, at = read_varint(message, at)
        kind = tag & 7
        if kind == VARINT:
            number, at = read_varint(message, at)
            yield Field(tag >> 3, number)
            continue
        if kind == BYTES:
            size, at = read_varint(message, at)
        elif kind in (_FIXED64, _FIXED32):
            size = 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"unknown wire type {kind}")
        if at + size > end:
            raise ValueError("it is cut")
        yield Field(tag >> 3, message[at : at + size])
        at += size


def read_varint(message: memoryview, at: int) -> tuple[int, int]:
    """The number that starts at byte `at`, and where the next one starts; `ValueError` if cut."""
    number = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            raise ValueError("it is cut")
        byte = message[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, at
    raise ValueError("a number of more than 64 bits")


def varints(message: memoryview) -> list[int]:
    """The numbers of a packed field."""
    numbers, at = [], 0
    while at < len(message):
        number, at = read_varint(message, at)
        numbers.append(number)
    return numbers


def text(message: memoryview) -> str:
    """A field's bytes as text; what is not UTF-8 is replaced."""
    return bytes(message).decode("utf-8", errors="replace")
