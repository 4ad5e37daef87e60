"""Single requests that must be refused, and how: by their status, or by the connection's end."""

import re
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.attack.attacker import Me
from benchmarks.attack.attacks import CHUNKED, EDIT, FACES, FORM, GENERATE, TYPE, head, post
from benchmarks.load.client import Address

PATIENCE = 10.0
QUIET = 0.5
"""Seconds after an answer in which a connection that lives on would have answered again."""


@dataclass(frozen=True)
class Checked:
    """What was tried, and what is wrong with what came of it: nothing where `problem` is empty."""

    name: str
    point: str
    problem: str
    measured: str = ""


@dataclass(frozen=True)
class Exchange:
    """Statuses of all answers on one connection, whether it was closed, and what was written."""

    statuses: tuple[int, ...]
    closed: bool
    text: str

    def __str__(self) -> str:
        statuses = ", ".join(map(str, self.statuses)) or "no answer"
        return f"{statuses}, {'closed' if self.closed else 'left open'}"


def exchange(address: Address, sent: bytes) -> Exchange:
    """Send bytes, and read until the connection is closed or quiet."""
    data, closed, end = b"", False, time.monotonic() + PATIENCE
    with socket.create_connection(address) as connection:
        connection.settimeout(0.1)
        try:
            connection.sendall(sent)
            while time.monotonic() < end:
                try:
                    part = connection.recv(2**20)
                except TimeoutError:
                    continue
                if not part:
                    closed = True
                    break
                if not data:
                    end = time.monotonic() + QUIET
                data += part
        except ConnectionError:
            closed = True
    text = data.decode("latin-1")
    return Exchange(tuple(map(int, re.findall(r"HTTP/1\.1 (\d\d\d) ", text))), closed, text)


def refused(seen: Exchange) -> bool:
    """One answer, which says that it is the client's mistake."""
    return len(seen.statuses) == 1 and 400 <= seen.statuses[0] < 500


def served(seen: Exchange) -> bool:
    """A picture: what is wrong with the others is nothing that they share with this one."""
    return seen.statuses == (200,)


def no_failure(seen: Exchange) -> bool:
    """One answer, which is not the server's mistake."""
    return len(seen.statuses) == 1 and seen.statuses[0] < 500


def refused_and_closed(seen: Exchange) -> bool:
    """Refused by an answer or none, and nothing more is read of the connection."""
    return seen.closed and all(400 <= one <= 505 for one in seen.statuses) and not seen.statuses[1:]


def answered_and_closed(seen: Exchange) -> bool:
    """At most one answer, whatever it is, and nothing more is read of the connection."""
    return seen.closed and len(seen.statuses) <= 1


def loads_nothing_from_elsewhere(seen: Exchange) -> bool:
    """There is no such page, or it comes with a policy and everything that it needs."""
    outside = re.search(r"""(?:src|href)\s*=\s*["'](?:https?:)?//""", seen.text)
    policy = "content-security-policy:" in seen.text.lower()
    return seen.statuses in ((404,), (401,)) or (policy and not outside)


Wanted = Callable[[Exchange], bool]


def _form(charset: str) -> Callable[[Me], bytes]:
    """A picture, but for the way in which its prompt is written."""

    def make(me: Me) -> bytes:
        fields = {"face_id": me.face.encode(), "prompt": "phéto".encode(), "steps": b"1"}
        parts = [
            f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'.encode() + text
            for name, text in fields.items()
        ]
        body = b"\r\n".join([*parts, b"--b--\r\n"])
        return post(body, EDIT, f"{FORM}; charset={charset}")(me)

    return make


def _json(text: str) -> Callable[[Me], bytes]:
    """A picture, but for what is in the text after its other fields."""
    return lambda me: post(f'{{"face_id":"{me.face}","steps":1,{text}}}'.encode())(me)


def _raw(line: str, *headers: str, body: bytes = b"") -> Callable[[Me], bytes]:
    """A request whose first line is not ours, on a connection that could live on."""

    def make(me: Me) -> bytes:
        lines = (line, "Host: attacked", f"Authorization: Bearer {me.key}", *headers)
        return "\r\n".join([*lines, "", ""]).encode() + body

    return make


_HIDDEN = b"0\r\n\r\n" + head("GET", "/v2/health/live", close=False)
_TWICE = _raw(
    f"POST {GENERATE} HTTP/1.1", TYPE, f"Content-Length: {len(_HIDDEN)}", CHUNKED, body=_HIDDEN
)
CODECS = (
    "undefined",
    "punycode",
    "idna",
    "unicode_escape",
    "raw_unicode_escape",
    "base64_codec",
    "zlib",
    "rot13",
    "utf-7",
    "utf-16",
    "mbcs",
    "no-such-codec",
    "x" * 5000,
    "",
)
DOUBLES = {
    "a key": '"prompt":"a","prompt":"b"',
    "a key in other letters": '"prompt":"a","pr\\u006fmpt":"b"',
    "a key of one value": '"prompt":"a","prompt":"a"',
    "a key inside": '"prompt":"a","manipulation":{"down":{"scale":1,"scale":2}}',
    "a key of an object": '"prompt":"a","ip_adapter_scale":{"down":1},"ip_adapter_scale":{"up":1}',
}
ODD_JSON = (
    b"",
    b"null",
    b"[]",
    b'"prompt"',
    b"NaN",
    b'{"prompt":"\\ud800"}',
    b'{"prompt":"a\\u0000"}',
    b'\xef\xbb\xbf{"prompt":"a"}',
    b'{"prompt":"a","seed":1e999}',
    b'{"prompt":"a","deadline":-0.0}',
    b'{"prompt":"a","deadline":1e308}',
    b'{"prompt":"a","alpha":Infinity}',
    b'{"":""}',
)
ANSWERS: tuple[tuple[str, str, Callable[[Me], bytes], Wanted], ...] = (
    ("a form with nothing wrong", "9 small", _form("utf-8"), served),
    ("JSON with nothing wrong", "9 small", _json('"prompt":"a"'), served),
    *(
        (f"form in charset {c[:20] or 'nothing'!r}", "9 small", _form(c), no_failure)
        for c in CODECS
    ),
    *((f"{what} twice in JSON", "9 small", _json(text), refused) for what, text in DOUBLES.items()),
    *((f"the body {body[:30]!r}", "9 small", post(body), refused) for body in ODD_JSON),
    *((f"the face {body[:30]!r}", "9 small", post(body, FACES), refused) for body in ODD_JSON[:6]),
    ("length and chunks", "6 protocol", _TWICE, answered_and_closed),
    *(
        (f"{line} {' '.join(headers)}", "6 protocol", _raw(line, *headers, body=body), wanted)
        for line, headers, body, wanted in (
            ("GET /v1/models HTTP/2.0", (), b"", refused_and_closed),
            ("GET /v1/models HTTP/3.0", (), b"", refused_and_closed),
            ("GET /v1/models HTTP/0.9", (), b"", refused_and_closed),
            ("GET /v2/health/live HTTP/2.0", (), b"", refused_and_closed),
            ("PRI * HTTP/2.0", (), b"SM\r\n\r\n", refused_and_closed),
            (f"POST {GENERATE} HTTP/1.1", (TYPE, "Content-Length: +2"), b"{}", refused_and_closed),
            (f"POST {GENERATE} HTTP/1.1", (TYPE, "Content-Length: 0x2"), b"{}", refused_and_closed),
            (
                f"POST {GENERATE} HTTP/1.1",
                (TYPE, "Content-Length: 2", "Content-Length: 3"),
                b"{}",
                refused_and_closed,
            ),
            (
                f"POST {GENERATE} HTTP/1.1",
                (TYPE, "Transfer-Encoding: gzip, chunked"),
                b"0\r\n\r\n",
                refused_and_closed,
            ),
            (
                f"POST {GENERATE} HTTP/1.1",
                (TYPE, "Transfer-Encoding: chunked", "Transfer-Encoding: chunked"),
                _HIDDEN,
                answered_and_closed,
            ),
            (
                f"POST {GENERATE} HTTP/1.1",
                (TYPE, CHUNKED),
                b"-1\r\n\r\n0\r\n\r\n",
                refused_and_closed,
            ),
            (
                f"POST {GENERATE} HTTP/1.1",
                (TYPE, CHUNKED),
                b"f" * 30 + b"\r\n",
                refused_and_closed,
            ),
        )
    ),
    ("/docs", "9 small", lambda me: head("GET", "/docs"), loads_nothing_from_elsewhere),
    ("/redoc", "9 small", lambda me: head("GET", "/redoc"), loads_nothing_from_elsewhere),
)


def check_answers(address: Address, me: Me, only: str = "") -> list[Checked]:
    """Ask for all whose name or point holds a text, one after the other."""
    results = []
    for name, point, make, wanted in ANSWERS:
        if only not in f"{point} {name}":
            continue
        seen = exchange(address, make(me))
        results.append(Checked(name, point, "" if wanted(seen) else str(seen), str(seen)))
    return results
