import asyncio
import contextlib
import socket

import pytest

from fastface_trt.serving.http.protocol import Connections, guarded_protocol
from fastface_trt.serving.settings import ServerSettings
from tests.serving.loopback import connect, exchange, read_to_end, serving, wait_until

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
LAST_GET = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
PART = b"x" * 262_144


class App:
    """Answers shortly, with many parts on /large, and never ends on /waiting."""

    def __init__(self):
        self.sent = 0
        self.left = 0
        self.gone = lambda: False

    async def __call__(self, scope, receive, send):
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        more = scope["path"] == "/waiting"
        for _ in range(150 if scope["path"] == "/large" else 0):
            await send({"type": "http.response.body", "body": PART, "more_body": True})
            if self.gone():  # from then on, what is sent goes nowhere
                break
            self.sent += len(PART)
        await send({"type": "http.response.body", "body": b"done", "more_body": more})
        with contextlib.suppress(asyncio.CancelledError):
            assert (await receive())["type"] == "http.disconnect"
            self.left += 1


@contextlib.contextmanager
def guarded(app, keep_alive=60, **options):
    protocol = guarded_protocol(ServerSettings(**options))
    with serving(app, http=protocol, timeout_keep_alive=keep_alive) as port:
        yield port, protocol.open_connections


@pytest.mark.parametrize("begin", [b"", b"G", GET[:-2], b"GET / HTTP/1.1\r\nX: "])
def test_headers_that_do_not_come_end_the_connection(begin):
    with guarded(App(), body_timeout=0.2) as (port, _):
        assert exchange(port, begin).startswith(b"HTTP/1.1 408")


def test_single_bytes_do_not_gain_time():
    with guarded(App(), body_timeout=0.3) as (port, _), connect(port, GET[:-2]) as slow:
        slow.settimeout(0.02)
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            for _ in range(1000):
                slow.sendall(b"X")
                try:
                    assert slow.recv(100).startswith(b"HTTP/1.1 408")
                    break
                except TimeoutError:
                    continue
            else:
                pytest.fail("the connection was held")


def test_the_next_request_of_a_connection_is_timed_too():
    with guarded(App(), body_timeout=0.3) as (port, _), connect(port, GET) as slow:
        answer = slow.recv(65536)
        while b"done" not in answer:
            answer += slow.recv(65536)
        slow.sendall(GET[:5])  # from here on, uvicorn waits
        assert b"HTTP/1.1 408" in read_to_end(slow)


def test_a_request_at_work_is_not_timed():
    with (
        guarded(App(), body_timeout=0.1) as (port, _),
        connect(port, GET.replace(b"/ ", b"/waiting ")) as waiting,
        pytest.raises(TimeoutError),
    ):
        read_for(waiting, 0.5)


def test_good_clients_are_served_beside_many_slow_ones():
    app = App()
    with (
        guarded(app, body_timeout=60, max_connections=400, max_connections_per_address=300) as (
            port,
            open_connections,
        ),
        contextlib.ExitStack() as stack,
    ):
        slow = [stack.enter_context(connect(port, GET[: 1 + at % 20])) for at in range(200)]
        for _ in range(20):
            for one in slow[::10]:
                one.sendall(b"X")
            assert exchange(port, LAST_GET).endswith(b"done\r\n0\r\n\r\n")
        assert open_connections.refused == 0


def test_slow_ones_in_excess_are_refused_and_make_room_again():
    app = App()
    with guarded(app, body_timeout=0.5, max_connections_per_address=20) as (port, tally):
        with contextlib.ExitStack() as stack:
            slow = [stack.enter_context(connect(port)) for _ in range(40)]
            answers = [read_to_end(one) for one in slow]
        assert sum(answer.startswith(b"HTTP/1.1 408") for answer in answers) == 20
        assert answers.count(b"") == 20 == tally.refused
        assert exchange(port, LAST_GET).endswith(b"done\r\n0\r\n\r\n")


def read_for(connection, seconds):
    """Read until the server closes; raises TimeoutError when nothing comes for some time."""
    connection.settimeout(seconds)
    while connection.recv(65536):
        pass


def not_reading(port, path):
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", port))
    connection.sendall(GET.replace(b"/ ", path + b" "))
    return connection


def test_a_client_that_never_reads_is_cut_off_and_pins_little():
    app = App()
    with (
        guarded(app, write_timeout=0.5) as (port, tally),
        contextlib.closing(not_reading(port, b"/large")),
    ):
        app.gone = lambda: not tally.open
        wait_until(lambda: app.left == 1)
        # The kernel's buffers take some megabytes; the rest was never made.
        assert app.sent <= 40 * len(PART)


def test_the_end_of_an_answer_that_nobody_takes_is_freed():
    """The last part fits into the buffers, so that the app never waits."""

    class Short(App):
        async def __call__(self, scope, receive, send):
            await receive()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": PART * 60})
            self.sent += 1

    app = Short()
    with (
        guarded(app, keep_alive=1, write_timeout=0.3) as (port, tally),
        contextlib.closing(not_reading(port, b"/")),
    ):
        wait_until(lambda: app.sent)
        wait_until(lambda: not tally.open)


def test_a_reader_that_takes_its_time_gets_everything():
    app = App()
    with (
        guarded(app, write_timeout=5) as (port, _),
        contextlib.closing(not_reading(port, b"/large")) as reader,
    ):
        taken = 0
        while taken < 150 * len(PART):
            taken += len(reader.recv(1_000_000))
        assert app.sent == 150 * len(PART)


def test_connections_are_counted_in_total_and_by_address():
    tally = Connections(3, 2)
    assert [tally.enter(name) for name in "aaab"] == [True, True, False, True]
    assert not tally.enter("b")
    tally.leave("a")
    assert tally.enter("b")
    assert tally.refused == 2
    everyone = Connections(5, None)
    assert all(everyone.enter("a") for _ in range(5))
    assert not everyone.enter("a")
