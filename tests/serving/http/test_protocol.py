"""What is refused, joined or made to wait before a request is one."""

import asyncio
import contextlib
import json
import random
import socket
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import h11
import pytest
from packaging.requirements import Requirement

from fastface_trt.serving.http import protocol
from fastface_trt.serving.http.middleware import RateLimit
from fastface_trt.serving.http.protocol import (
    CHUNK_BYTES,
    FREE_CHUNKS,
    JOINED_BYTES,
    LINGER_BYTES,
    MAX_HEAD_BYTES,
    MAX_HEADERS,
    BoundedConnection,
    BoundedListener,
    Connections,
    guarded_protocol,
)
from fastface_trt.serving.settings import ServerSettings
from tests.serving.loopback import connect, exchange, read_to_end, serving, wait_until

HOST = b"Host: x\r\n"
GET = b"GET / HTTP/1.1\r\n" + HOST
POST = b"POST / HTTP/1.1\r\n" + HOST
LAST = b"GET /last HTTP/1.1\r\nConnection: close\r\n" + HOST + b"\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"


class App:
    """Answers with the length of the body, and remembers paths and the pieces that came."""

    def __init__(self):
        self.asked, self.pieces, self.left = [], [], 0

    async def __call__(self, scope, receive, send):
        self.asked.append(scope["path"])
        early = scope["path"] in ("/early", "/begun")
        start = {"type": "http.response.start", "status": 200, "headers": []}
        if early:
            await send(start)
            await send({"type": "http.response.body", "more_body": scope["path"] == "/begun"})
        self.pieces, more = [], scope["path"] != "/early"
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.left += 1
                return
            self.pieces.append(message["body"])
            more = message["more_body"]
        if not early:
            length = str(sum(map(len, self.pieces))).encode()
            await send(start)
            await send({"type": "http.response.body", "body": b"length " + length})


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(protocol, "REFUSAL_SECONDS", 0)


@pytest.fixture(scope="module")
def server():
    app = App()
    with serving(app, http=guarded_protocol(ServerSettings(body_timeout=10))) as port:
        yield app, port


@pytest.fixture
def app(server):
    server[0].asked, server[0].left = [], 0
    return server[0]


@pytest.fixture
def port(server, app):
    return server[1]


def test_a_client_opens_so_many_connections_a_second():
    now = 0.0
    tally = Connections(100, 3)
    tally._rate = RateLimit(3, lambda: now, seconds=1.0)
    assert [tally.may_open("a") for _ in range(5)] == [True] * 3 + [False] * 2
    assert tally.may_open("b")
    now = 0.4
    assert [tally.may_open("a") for _ in range(2)] == [True, False]
    now = 10.0
    assert [tally.may_open("a") for _ in range(4)] == [True] * 3 + [False]
    assert tally.refused == 4
    assert all(Connections(1, None).may_open("a") for _ in range(1000))


def test_what_is_opened_too_often_is_hung_up_on_before_anything_is_made_for_it():
    refused = Counter()
    tally = Connections(1000, 10, lambda reason: refused.update([reason]))
    tally._rate = RateLimit(10, lambda: 0.0, seconds=1.0)
    with socket.create_server(("127.0.0.1", 0), backlog=200) as plain:
        port = plain.getsockname()[1]
        with BoundedListener(plain, tally) as listener, contextlib.ExitStack() as stack:
            listener.setblocking(False)
            opened = [stack.enter_context(connect(port)) for _ in range(100)]
            accepted = [stack.enter_context(listener.accept()[0]) for _ in range(10)]
            calls = 0
            while tally.refused < 90:
                with pytest.raises(BlockingIOError):
                    listener.accept()
                calls += 1
            assert len(accepted) == 10
            assert 3 <= calls <= 90  # none takes all of them
            assert [one.recv(1) for one in opened[10:]] == [b""] * 90
    assert refused == {"connection": 90}


def headers(count):
    return b"".join(b"a%d:\r\n" % at for at in range(count))


def chunks(*parts):
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)


@pytest.mark.parametrize(
    "request_bytes",
    [
        GET + headers(MAX_HEADERS - 1) + b"\r\n",
        GET + b"a: " + b"x" * (MAX_HEAD_BYTES - len(GET) - 7) + b"\r\n\r\n",
        POST + CHUNKED + chunks(*[b"x"] * FREE_CHUNKS, b""),
        POST + CHUNKED + chunks(*[b"x" * CHUNK_BYTES] * 2000, b""),
        POST + CHUNKED + b"0\r\n" + headers(MAX_HEADERS) + b"\r\n",
        POST + CHUNKED + b"001;a=b \r\nx\r\n0;last\r\n\r\n",
        POST + b"Content-Length: 3\r\n\r\nabc",
        b"GET / HTTP/1.0\r\n\r\n",
    ],
)
def test_what_is_within_the_limits_passes(port, app, request_bytes):
    assert exchange(port, request_bytes + LAST).startswith(b"HTTP/1.1 200")
    assert app.asked[0] == "/"


@pytest.mark.parametrize(
    ("status", "request_bytes"),
    [
        (431, GET + headers(MAX_HEADERS) + b"\r\n"),
        (431, GET + headers(15_000) + b"\r\n"),
        (431, GET + headers(MAX_HEADERS + 2)),  # whose end has not come
        (431, GET + b"a: b\r\n" + b" c\r\n" * MAX_HEADERS + b"\r\n"),
        (431, GET + b"a: " + b"x" * MAX_HEAD_BYTES + b"\r\n\r\n"),
        (431, GET + b"a: " + b"x" * MAX_HEAD_BYTES),
        (431, b"GET /" + b"x" * MAX_HEAD_BYTES + b" HTTP/1.1\r\n" + HOST + b"\r\n"),
        (431, b"x" * (MAX_HEAD_BYTES + 1)),
        (505, b"GET / HTTP/2.0\r\n" + HOST + b"\r\n"),
        (505, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
        (505, b"GET / HTTP/1.2\r\n" + HOST + b"\r\n"),
        (505, b"GET / HTTP/0.9\r\n\r\n"),
        (400, b"GET /\r\n\r\n"),
        (400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),  # TLS
        (400, GET + b"no colon\r\n\r\n"),
        (400, GET + HOST + b"\r\n"),
        (400, POST + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabc"),
        (400, POST + b"Content-Length: +3\r\n\r\nabc"),
        (400, POST + b"Content-Length: 3\r\n" + CHUNKED + chunks(b"")),
        (400, POST + b"Content-Length: 0\r\n" + CHUNKED + chunks(b"")),
        (400, b"POST / HTTP/1.0\r\n" + CHUNKED + chunks(b"")),
        (501, POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + chunks(b"")),
        (501, POST + b"Transfer-Encoding: identity\r\n\r\n"),
        (501, POST + b"Transfer-Encoding: chunked\r\n" + CHUNKED + chunks(b"")),
        (413, POST + CHUNKED + chunks(*[b"x"] * (FREE_CHUNKS + 1))),
        (413, POST + CHUNKED + chunks(*[b"x"] * 15_000)),
        (413, POST + CHUNKED + chunks(b"x" * CHUNK_BYTES, *[b"x"] * (FREE_CHUNKS + 1))),
        (431, POST + CHUNKED + b"0\r\n" + headers(15_000) + b"\r\n"),
        (431, POST + CHUNKED + b"0\r\na: " + b"x" * MAX_HEAD_BYTES),
        (400, POST + CHUNKED + b"0\r\nno colon\r\n\r\n"),
        (400, POST + CHUNKED + b"1;" + b"e" * 1000 + b"\r\nx\r\n"),
        (400, POST + CHUNKED + b"1;" + b"e" * 1000),
        (400, POST + CHUNKED + b"1;a\rb\r\nx\r\n"),
        (400, POST + CHUNKED + b"1\nx\n0\n\n"),
        (400, POST + CHUNKED + b"1\r\nxy\r\n"),
        (400, POST + CHUNKED + b"-1\r\nx\r\n"),
        (400, POST + CHUNKED + b"0x1\r\nx\r\n"),
        (400, POST + CHUNKED + b"1_0\r\nx\r\n"),
        (400, POST + CHUNKED + b"\r\nx\r\n"),
        (400, POST + CHUNKED + b"f" * 17 + b"\r\nx"),
    ],
)
def test_what_is_not_is_answered_and_closed(port, app, status, request_bytes):
    """And what comes behind it is no request."""
    answer = exchange(port, request_bytes + LAST)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), answer
    assert b"connection: close" in head.lower()
    assert json.loads(body)["error"]["message"]  # and nothing behind it
    assert "/last" not in app.asked


def test_nothing_of_what_a_client_sent_is_in_the_answer(port):
    assert b"secret" not in exchange(port, GET + b"secret\r\n\r\n")


def test_a_client_that_goes_on_sending_still_reads_why(port):
    with connect(port) as connection:
        connection.sendall(GET + headers(60_000))
        connection.shutdown(socket.SHUT_WR)
        assert read_to_end(connection).startswith(b"HTTP/1.1 431")


def test_who_is_refused_hears_of_it_later(port, monkeypatch):
    monkeypatch.setattr(protocol, "REFUSAL_SECONDS", 60)
    with connect(port, GET + headers(200)) as connection:
        connection.settimeout(0.3)
        with pytest.raises(TimeoutError):
            connection.recv(1)


def test_and_does_not_hold_its_connection(port):
    with connect(port, GET + headers(200)) as connection:
        assert b"431" in connection.recv(65536)
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            connection.sendall(b"x" * 100 * LINGER_BYTES)


@pytest.mark.parametrize(
    ("path", "answer"), [(b"/", b"HTTP/1.1 413"), (b"/begun", b"HTTP/1.1 200")]
)
def test_an_application_that_reads_the_body_sees_its_client_leave(
    port, app, path, answer, monkeypatch
):
    monkeypatch.setattr(protocol, "LINGER_SECONDS", 60)
    begin = POST.replace(b" / ", b" %s " % path) + CHUNKED
    with connect(port, begin) as connection:
        wait_until(lambda: app.asked)
        connection.sendall(chunks(*[b"x"] * 1000))
        assert read_to_end(connection).startswith(answer)
        wait_until(lambda: app.left == 1)


def test_an_answer_that_was_sent_before_a_broken_body_is_the_only_one(port, app, caplog):
    with connect(port, POST.replace(b" / ", b" /early ") + CHUNKED) as connection:
        wait_until(lambda: app.asked)
        connection.sendall(b"no chunk\r\n")
        answer = read_to_end(connection)
    assert answer.startswith(b"HTTP/1.1 200")
    assert answer.count(b"HTTP/1.1") == 1
    assert not caplog.records


def test_bodies_are_joined_before_the_application_sees_them(port, app):
    size = 40_000
    for frame, body in (
        (b"Content-Length: %d\r\n\r\n" % size, b"x" * size),
        (CHUNKED, chunks(*[b"x" * 200] * 250, b"")),
    ):
        with connect(port, LAST.replace(b"GET /last", b"POST /")[:-2] + frame) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for at in range(0, len(body), 40):
                connection.sendall(body[at : at + 40])
            assert b"length" in read_to_end(connection)
        assert all(len(piece) >= JOINED_BYTES for piece in app.pieces[:-1])
        assert len(app.pieces) <= 7  # of more than a thousand


def events_of(connection, pieces):
    """The events of a connection of h11: requests, the body joined, ends, and what is left."""
    found = []
    for piece in pieces:
        connection.receive_data(piece)
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA or event is h11.PAUSED:
                break
            if isinstance(event, h11.Data):
                if isinstance(found[-1], bytes):
                    found[-1] += bytes(event.data)
                else:
                    found.append(bytes(event.data))
            elif isinstance(event, h11.Request):
                found.append((event.method, event.target, event.headers.raw_items()))
            else:
                found.append("end")
    return found, connection.trailing_data[0]


@pytest.mark.parametrize("seed", range(40))
def test_the_readers_read_as_those_of_h11(seed):
    """However a body is cut into chunks, and the bytes into what arrives together."""
    draw = random.Random(seed)
    parts = [
        draw.randbytes(draw.choice((1, 2, 100, 5000, 70_000))) for _ in range(draw.randrange(9))
    ]
    extension = draw.choice((b"", b";a", b';a="b" ', b"  "))
    body = b"".join(b"%X%s\r\n%s\r\n" % (len(part), extension, part) for part in parts)
    frames = {
        "chunks": CHUNKED + body + b"0\r\n" + draw.choice((b"", b"A: b\r\n")) + b"\r\n",
        "length": b"Content-Length: %d\r\n\r\n%s" % (len(body), body),
        "none": b"\r\n",
    }
    data = POST + frames[draw.choice(list(frames))] + GET
    cuts = sorted(draw.randrange(len(data)) for _ in range(draw.choice((0, 1, 5, 200))))
    pieces = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True) if a < b]
    ours = events_of(BoundedConnection(), pieces)
    assert ours == events_of(h11.Connection(h11.SERVER, MAX_HEAD_BYTES), pieces)
    assert ours[0][-1] == "end"


def test_later_requests_of_connections_begin_one_per_turn_of_the_loop():
    """Whoever sends many, on many connections, lets others in between."""
    turn, clients, turns = 0, set(), []

    async def app(scope, receive, send):
        if not clients:
            tick()
        if scope["client"] in clients:
            turns.append(turn)
        clients.add(scope["client"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"answer"})

    def tick():
        nonlocal turn
        turn += 1
        if len(turns) < 20 * 49:
            asyncio.get_running_loop().call_soon(tick)

    with (
        serving(app, http=guarded_protocol(ServerSettings())) as port,
        contextlib.ExitStack() as stack,
    ):
        for one in [stack.enter_context(connect(port, (GET + b"\r\n") * 50)) for _ in range(20)]:
            answer = b""
            while answer.count(b"answer") < 50:
                answer += one.recv(65536)
    assert len(turns) == len(set(turns)) == 20 * 49


@pytest.mark.parametrize("name", ["h11", "starlette", "uvicorn"])
def test_what_is_built_upon_is_bounded_from_both_sides(name):
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())
    listed = map(Requirement, project["project"]["optional-dependencies"]["serve"])
    (found,) = (one.specifier for one in listed if one.name == name)
    assert {one.operator for one in found} == {">=", "<"}
    assert version(name) in found


def test_a_parser_that_does_not_ask_the_bounded_readers_is_no_start(monkeypatch):
    monkeypatch.delattr(BoundedConnection, "_get_io_object")
    with pytest.raises(protocol.MissingDependency, match="h11"):
        guarded_protocol(ServerSettings())
