"""The attacks over HTTP: what is sent, in variants of each kind.

A mended case is no mended kind.
"""

import base64
import json
import struct
import zlib
from collections.abc import Callable, Iterator
from io import BytesIO
from typing import Any

from PIL import Image

from benchmarks.attack.attacker import Attack, Me
from benchmarks.load.requests import face_file

GENERATE, EDIT, FACES = "/v1/images/generations", "/v1/images/edits", "/v1/faces"
BYTES = 19_800_000
"""Of a body that the server's limit of 20 MB just lets in."""
JSON = "application/json"
FORM = "multipart/form-data; boundary=b"

Payload = Callable[[Me], bytes]


def head(method: str, path: str, *lines: str, key: str = "", close: bool = True) -> bytes:
    """The head of a request, with its empty line."""
    written = [f"{method} {path} HTTP/1.1", "Host: attacked"]
    if close:
        written.append("Connection: close")
    if key:
        written.append(f"Authorization: Bearer {key}")
    return "\r\n".join([*written, *lines, "", ""]).encode()


def post(body: bytes, path: str = GENERATE, kind: str = JSON) -> Payload:
    """A POST of a body with the attacker's key."""

    def payload(me: Me) -> bytes:
        length = f"Content-Length: {len(body)}"
        return head("POST", path, f"Content-Type: {kind}", length, key=me.key) + body

    return payload


def made(make: Callable[[], bytes], path: str = GENERATE, kind: str = JSON) -> Payload:
    """The same of a body that is large, and therefore made by the attacker alone."""
    return lambda me: post(make(), path, kind)(me)


def filled(before: str, item: str, after: str, size: int = BYTES) -> Callable[[], bytes]:
    """A body of that size, of as many items as go in."""

    def make() -> bytes:
        count = (size - len(before) - len(after)) // len(item)
        return (before + item * count + after).encode()

    return make


def numbered(before: str, item: str, after: str, size: int = BYTES) -> Callable[[], bytes]:
    """A body of that size, of items that each have another number."""

    def make() -> bytes:
        return (before + "".join(_within(item, size)) + after).encode()

    return make


def _within(item: str, size: int) -> Iterator[str]:
    number = 0
    while size > 200:
        text = item.replace("#", f"{number:x}")
        size -= len(text)
        number += 1
        yield text


def picture_of(**fields: Any) -> Payload:
    """A request for a picture of the attacker's registered face."""

    def payload(me: Me) -> bytes:
        body = {"prompt": "photo; person in a garden", "face_id": me.face, **fields}
        return post(json.dumps(body).encode())(me)

    return payload


def as_json(picture: bytes) -> bytes:
    """A picture in the body that registers a face."""
    return json.dumps({"image": base64.b64encode(picture).decode()}).encode()


def in_form(picture: bytes) -> bytes:
    """The same as a form."""
    part = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
    return part + picture + b"\r\n--b--\r\n"


def scans(count: int, side: int = 2048) -> bytes:
    """A progressive JPEG in which a scan that adds nothing comes `count` times."""
    file = BytesIO()
    Image.new("RGB", (side, side), (90, 120, 150)).save(file, "JPEG", progressive=True, quality=30)
    data = file.getvalue()
    last = data.rindex(b"\xff\xda")
    end = data.rindex(b"\xff\xd9")
    return data[:last] + data[last:end] * count + data[end:]


def deep_png(width: int, height: int) -> bytes:
    """A PNG of 16 bits and four channels, black and therefore small: eight bytes a pixel."""
    packer = zlib.compressobj(9)
    row = bytes(1 + 8 * width)
    data = b"".join([*(packer.compress(row) for _ in range(height)), packer.flush()])
    size = struct.pack(">IIBBBBB", width, height, 16, 6, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def chunk(kind: bytes, data: bytes) -> bytes:
    """A part of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def chunky_png(count: int) -> bytes:
    """The sample face with so many texts in its PNG."""
    data = face_file()
    header = 8 + 25
    return data[:header] + chunk(b"tEXt", b"a\0b") * count + data[header:]


def zipped_text_png(megabytes: int) -> bytes:
    """The sample face with a compressed text that unpacks to so much."""
    data = face_file()
    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(megabytes * 2**20), 9))
    return data[:33] + text * 20 + data[33:]


def parts(headers: str, content: str, size: int = BYTES) -> Callable[[], bytes]:
    """A form of that size, of as many parts as go in; # is the part's number."""
    item = f"--b\r\n{headers}\r\n\r\n{content}\r\n"
    return numbered("", item, "--b--\r\n", size)


def _field(name: str) -> str:
    return f'Content-Disposition: form-data; name="{name}"'


def lines(count: int, line: str) -> list[str]:
    """So many header lines."""
    return [line] * count


def chunks(body: bytes, extension: str = "") -> bytes:
    """A body in chunks of one byte each."""
    start = f"1{extension}\r\n".encode()
    return b"".join(start + bytes([byte]) + b"\r\n" for byte in body) + b"0\r\n\r\n"


CHUNKED = "Transfer-Encoding: chunked"
LARGE = f"Content-Length: {BYTES}"
TYPE = f"Content-Type: {JSON}"

STRUCTURE = (
    Attack(
        "list of objects", "1 structure", made(filled('{"prompt":"a","alpha":[', "{},", "{}]}"))
    ),
    Attack("unknown keys", "1 structure", made(numbered("{", '"#":0,', '"a":0}'))),
    Attack("one key again and again", "1 structure", made(filled("{", '"prompt":"a",', '"n":1}'))),
    Attack(
        "small bodies of unknown keys",
        "1 structure",
        made(numbered("{", '"#":0,', '"a":0}', 99_000)),
        connections=30,
    ),
    Attack(
        "small bodies of wrong items",
        "1 structure",
        made(filled('{"prompt":"a","alpha":[', "{},", "{}]}", 99_000)),
        connections=30,
    ),
    Attack("depth of lists", "1 structure", made(lambda: b"[" * BYTES)),
    Attack("depth of objects", "1 structure", made(filled("", '{"a":', ""))),
    Attack(
        "list of lists", "1 structure", made(filled('{"prompt":"a","alpha":[', "[[]],", "[]]}"))
    ),
    Attack("list of numbers", "1 structure", made(filled('{"prompt":"a","alpha":[', "1,", "1]}"))),
    Attack("a long number", "1 structure", made(filled('{"prompt":"a","seed":', "1", "}"))),
    Attack("a long prompt of escapes", "1 structure", made(filled('{"prompt":"', "\\u00e9", '"}'))),
    Attack("blanks", "1 structure", made(filled("", " ", "{}"))),
    Attack("bytes that are no text", "1 structure", made(lambda: b'{"prompt":"' + b"\xff" * BYTES)),
    Attack(
        "objects inside the manipulation",
        "1 structure",
        made(filled('{"prompt":"a","manipulation":{"down":{"scale":[', "{},", "{}]}}}")),
    ),
    Attack(
        "pictures in a list",
        "1 structure",
        made(filled('{"prompt":"a","images":[', '{"image_url":""},', "{}]}")),
    ),
    Attack(
        "list of objects as a face", "1 structure", made(filled('{"image":[', "{},", "{}]}"), FACES)
    ),
    Attack(
        "a picture of escapes",
        "1 structure",
        made(filled('{"image":"', "\\u0041", '"}'), FACES),
    ),
    Attack(
        "a picture that is none", "1 structure", made(filled('{"image":"', "AAAA", '"}'), FACES)
    ),
    Attack("form of small fields", "1 structure", made(parts(_field("a#"), "1"), EDIT, FORM)),
    Attack("form of list items", "1 structure", made(parts(_field("alpha[]"), "1"), EDIT, FORM)),
    Attack(
        "form with a list of objects",
        "1 structure",
        made(filled(f"--b\r\n{_field('alpha')}\r\n\r\n[", "{},", "{}]\r\n--b--\r\n"), EDIT, FORM),
    ),
    Attack(
        "form with a part of many headers",
        "1 structure",
        made(filled(f"--b\r\n{_field('a')}", "\r\na: b", "\r\n\r\n1\r\n--b--\r\n"), EDIT, FORM),
    ),
    Attack(
        "form with a long name",
        "1 structure",
        made(filled('--b\r\nContent-Disposition: form-data; name="', "a", '"\r\n\r\n'), EDIT, FORM),
    ),
    Attack(
        "form of almost boundaries",
        "1 structure",
        made(filled(f"--b\r\n{_field('prompt')}\r\n\r\n", "\r\n--", "\r\n--b--\r\n"), EDIT, FORM),
    ),
    Attack(
        "form of empty files",
        "1 structure",
        made(parts(_field("image") + '; filename=""', ""), EDIT, FORM),
    ),
)

OUTPUT = (
    Attack("4096 x 4096", "2 output", picture_of(size="4096x4096", steps=1), 1),
    Attack("2048 x 2048", "2 output", picture_of(size="2048x2048", steps=1), 3),
    Attack("a strip of 4096 x 32", "2 output", picture_of(size="4096x32", steps=1), 6),
    Attack(
        "eight steps of four of the double size",
        "2 output",
        picture_of(size="192x192", steps=8, n=4, preset="am1+dcg"),
        12,
        seconds=6,
    ),
    Attack(
        "deadlines that cannot be kept",
        "2 output",
        picture_of(size="192x192", steps=8, n=4, preset="am1+dcg", deadline=0.5),
        16,
        seconds=6,
    ),
    Attack(
        "the largest that is let in",
        "2 output",
        lambda me: [
            picture_of(size=f"{side}x{side}", steps=4, n=4, preset="am1+dcg")(me)
            for side in (768, 512, 384, 256, 192, 144, 96)
        ],
        14,
        seconds=6,
    ),
)

_REGISTER = post(as_json(face_file()), FACES)
FAIRNESS = (
    Attack("thirty connections", "3 fairness", picture_of(steps=4), 30, seconds=6),
    Attack("four pictures a request", "3 fairness", picture_of(steps=4, n=4), 30, seconds=6),
    Attack(
        "eight steps of three branches",
        "3 fairness",
        picture_of(steps=8, preset="am1+dcg"),
        30,
        seconds=6,
    ),
    Attack(
        "thirty streams with previews",
        "3 fairness",
        picture_of(steps=8, stream=True, partial_images=3),
        30,
        seconds=6,
    ),
    Attack("faces without end", "3 fairness", _REGISTER, 8, seconds=6),
    Attack("faces from thirty connections", "3 fairness", _REGISTER, 30),
    Attack("asked and gone", "3 fairness", picture_of(steps=4), 30, "drop"),
    Attack("faces asked for and gone", "3 fairness", _REGISTER, 30, "drop"),
    Attack(
        "descriptions read",
        "3 fairness",
        lambda me: [head("GET", path, key=me.key) for path in ("/openapi.json", "/v1/presets")],
        30,
    ),
    Attack("metrics read", "3 fairness", lambda me: head("GET", "/metrics"), 30),
    Attack(
        "idle streams",
        "3 fairness",
        picture_of(steps=8, n=4, stream=True, partial_images=3),
        500,
        "hold",
        addresses=5,
    ),
)

SLOTS = (
    Attack(
        "headers without a body",
        "4 slots",
        lambda me: head("POST", GENERATE, TYPE, LARGE, key=me.key),
        520,
        "hold",
        addresses=5,
        seconds=5,
    ),
    Attack(
        "headers without a body, again and again",
        "4 slots",
        lambda me: head("POST", GENERATE, TYPE, LARGE, key=me.key),
        100,
        "drop",
        seconds=5,
    ),
    Attack(
        "headers without a body, no key",
        "4 slots",
        lambda me: head("POST", GENERATE, TYPE, LARGE),
        520,
        "hold",
        addresses=5,
        seconds=5,
    ),
    Attack(
        "faces without a body",
        "4 slots",
        lambda me: head("POST", FACES, f"Content-Type: {FORM}", CHUNKED, key=me.key),
        520,
        "hold",
        addresses=5,
        seconds=5,
    ),
    Attack(
        "bodies but for their last byte",
        "4 slots",
        lambda me: head("POST", FACES, TYPE, LARGE, key=me.key) + b" " * (BYTES - 1),
        40,
        "hold",
    ),
    Attack(
        "forms but for their end",
        "4 slots",
        lambda me: (
            head("POST", FACES, f"Content-Type: {FORM}", LARGE, key=me.key)
            + in_form(bytes(BYTES))[: BYTES - 1]
        ),
        40,
        "hold",
    ),
    Attack(
        "bodies byte by byte",
        "4 slots",
        _REGISTER,
        190,
        "trickle",
    ),
)

PICTURES = (
    Attack("a JPEG of 2,000 scans", "5 pictures", made(lambda: in_form(scans(2000)), FACES, FORM)),
    Attack(
        "a JPEG of thirty more scans", "5 pictures", made(lambda: in_form(scans(30)), FACES, FORM)
    ),
    Attack(
        "a deep PNG of 39 megapixels",
        "5 pictures",
        made(lambda: in_form(deep_png(6244, 6244)), FACES, FORM),
    ),
    Attack(
        "a deep PNG of 64 megapixels",
        "5 pictures",
        made(lambda: in_form(deep_png(8000, 8000)), FACES, FORM),
    ),
    Attack(
        "a PNG of a million texts",
        "5 pictures",
        made(lambda: in_form(chunky_png(1_200_000)), FACES, FORM),
    ),
    Attack(
        "a PNG of zipped texts",
        "5 pictures",
        made(lambda: in_form(zipped_text_png(200)), FACES, FORM),
    ),
)


def _small_chunks(me: Me) -> bytes:
    return head("POST", GENERATE, TYPE, CHUNKED, key=me.key) + chunks(b" " * 200_000)


PROTOCOL = (
    Attack(
        "15,000 headers, no key",
        "6 protocol",
        lambda me: head("GET", "/v1/models", *lines(15_000, "a:")),
        60,
    ),
    Attack(
        "15,000 headers of a probe",
        "6 protocol",
        lambda me: head("GET", "/v2/health/live", *lines(15_000, "a:b")),
        60,
    ),
    Attack("one-byte chunks, no key", "6 protocol", lambda me: _small_chunks(Me("", "")), 60),
    Attack("one-byte chunks", "6 protocol", _small_chunks, 60),
    Attack(
        "chunks with long extensions",
        "6 protocol",
        lambda me: (
            head("POST", GENERATE, TYPE, CHUNKED, key=me.key)
            + chunks(b" " * 20_000, ";" + "x" * 500)
        ),
        30,
    ),
    Attack(
        "trailers without end",
        "6 protocol",
        lambda me: (
            head("POST", GENERATE, TYPE, CHUNKED, key=me.key)
            + b"2\r\n{}\r\n0\r\n"
            + b"a: b\r\n" * 10_000
        ),
        30,
    ),
    Attack(
        "one chunk of all, no key",
        "6 protocol",
        lambda me: head("POST", GENERATE, TYPE, CHUNKED) + f"{BYTES:x}\r\n".encode() + b" " * BYTES,
        8,
    ),
    Attack(
        "requests in a row",
        "6 protocol",
        lambda me: head("GET", "/v2/health/live", close=False) * 5_000,
        30,
    ),
    Attack(
        "requests in a row that are refused",
        "6 protocol",
        lambda me: head("GET", "/v1/models", close=False) * 5_000,
        30,
    ),
    Attack("a long line", "6 protocol", lambda me: b"GET /" + b"a" * 5_000_000, 30),
    Attack(
        "bodies where none is read, no key",
        "6 protocol",
        lambda me: [
            head(method, path, TYPE, LARGE) + b" " * BYTES
            for method, path in (
                ("GET", "/v2/health/live"),
                ("POST", "/v2/health/live"),
                ("PUT", GENERATE),
                ("POST", "/v1/nothing"),
                ("DELETE", "/v1/faces/face_x"),
                ("OPTIONS", GENERATE),
            )
        ],
        12,
    ),
    Attack(
        "bodies where none is read",
        "6 protocol",
        lambda me: [
            head(method, path, TYPE, LARGE, key=me.key) + b" " * BYTES
            for method, path in (
                ("GET", "/v1/models"),
                ("PATCH", GENERATE),
                ("POST", "/v1/nothing"),
                ("DELETE", "/v1/faces/face_x"),
            )
        ],
        12,
    ),
    Attack(
        "long queries",
        "6 protocol",
        lambda me: head("GET", "/v1/models?" + "a=b&" * 15_000, key=me.key),
        30,
    ),
    Attack(
        "heads that end in nothing",
        "6 protocol",
        lambda me: head("GET", "/v2/health/live", "x: " + "y" * 60_000)[:-2],
        190,
        "hold",
    ),
    Attack("bytes that are no request", "6 protocol", lambda me: b"\0\xff\r\n" * 100_000, 60),
    Attack("headers byte by byte", "6 protocol", lambda me: head("GET", "/"), 190, "trickle"),
    Attack("connections opened and closed", "6 protocol", lambda me: b"", 100, "open"),
    Attack(
        "keys that are guessed",
        "6 protocol",
        lambda me: head("GET", "/v1/models", key="x" * 60_000),
        30,
    ),
)

ATTACKS = (*STRUCTURE, *OUTPUT, *FAIRNESS, *SLOTS, *PICTURES, *PROTOCOL)
