import json

import pytest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route

from fastface_trt.serving.http.middleware import BodyLimit
from tests.serving.loopback import connect, exchange, read_to_end, serving

LIMIT = 100_000


async def length(request):
    return PlainTextResponse(str(len(await request.body())))


async def forgiving(request):
    """As frameworks do: whatever goes wrong with the body is a client's error of another kind."""
    try:
        await request.body()
    except Exception as error:
        raise HTTPException(400, "broken") from error
    return PlainTextResponse("fine")


async def streaming(request):
    async def parts():
        yield "first "
        yield "last"

    await request.body()
    return StreamingResponse(parts())


async def failing(_request):
    raise RuntimeError


def app(seconds=20.0):
    routes = [
        Route(f"/{function.__name__}", function, methods=["GET", "POST"])
        for function in (length, forgiving, streaming, failing)
    ]
    return BodyLimit(Starlette(routes=routes), LIMIT, seconds)


@pytest.fixture(scope="module")
def port():
    with serving(app()) as port:
        yield port


def post(path, body, announced=None, chunked=False):
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    if chunked:
        parts = [body[at : at + 4000] for at in range(0, len(body), 4000)]
        chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in [*parts, b""])
        return f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + chunks
    size = len(body) if announced is None else announced
    return f"{head}Content-Length: {size}\r\n\r\n".encode() + body


def refused(answer, status, code):
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status} ".encode()), answer
    error = json.loads(body)["error"]
    assert (error["code"], error["type"], error["param"]) == (code, "invalid_request_error", None)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_of_just_the_limit_passes(port, chunked):
    answer = exchange(port, post("/length", b"x" * LIMIT, chunked=chunked))
    assert answer.endswith(str(LIMIT).encode()), answer[:300]


@pytest.mark.parametrize("path", ["/length", "/forgiving"])
@pytest.mark.parametrize("chunked", [False, True])
def test_one_byte_more_is_refused_whatever_the_app_makes_of_it(port, path, chunked):
    answer = exchange(port, post(path, b"x" * (LIMIT + 1), chunked=chunked))
    refused(answer, 413, "request_too_large")


@pytest.mark.parametrize("announced", [LIMIT + 1, 10**19, 10**18])
def test_an_announced_length_is_refused_before_anything_comes(port, announced):
    refused(exchange(port, post("/length", b"", announced=announced)), 413, "request_too_large")


def test_a_body_without_end_is_refused_while_it_streams(port):
    with connect(port, post("/length", b"", chunked=True)[:-5]) as connection:
        sent = 0
        try:
            while sent < 100 * LIMIT:
                connection.sendall(b"1000\r\n" + b"x" * 0x1000 + b"\r\n")
                sent += 0x1000
        except (ConnectionResetError, BrokenPipeError):
            pass
        # What lies in the buffers between the two sockets comes on top of the limit.
        assert sent < 100 * LIMIT


@pytest.mark.parametrize("path", ["/length", "/forgiving"])
def test_a_body_that_does_not_come_is_refused(path):
    with serving(app(seconds=0.2)) as port:
        refused(exchange(port, post(path, b"x", announced=2)), 408, "request_timeout")
        # Every byte on its own does not gain time.
        with connect(port, post(path, b"", announced=50_000)) as connection:
            connection.settimeout(0.02)
            answer = b""
            for _ in range(1000):
                try:
                    connection.sendall(b"x")
                    answer = connection.recv(65536)
                    break
                except TimeoutError:
                    continue
            connection.settimeout(20)
            refused(answer + read_to_end(connection), 408, "request_timeout")


def test_answers_pass_unchanged(port):
    get = "GET {} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    assert b"first" in exchange(port, get.format("/streaming").encode())
    assert exchange(port, get.format("/failing").encode()).startswith(b"HTTP/1.1 500")
    assert exchange(port, post("/failing", b"x" * LIMIT)).startswith(b"HTTP/1.1 500")
