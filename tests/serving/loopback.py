"""A uvicorn server on a loopback port for tests, in a thread; and raw sockets to it."""

import contextlib
import socket
import threading
import time

import uvicorn


@contextlib.contextmanager
def serving(app, *, lifespan="off", **options):
    """The port of a server of an ASGI app."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, lifespan=lifespan, ws="none", log_level="critical", **options)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],), name="test-server")
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield listener.getsockname()[1]
    finally:
        server.should_exit = server.force_exit = True
        thread.join(20)
        listener.close()
        assert not thread.is_alive()


def wait_until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def connect(port, data=b""):
    """A socket that has sent `data`."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=20)
    connection.sendall(data)
    return connection


def read_to_end(connection):
    """What comes until the server closes; a reset ends it too."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


def exchange(port, data):
    """The answer to raw bytes, until the server closes."""
    with connect(port, data) as connection:
        return read_to_end(connection)


def longest_gap(function):
    """The longest time in seconds for which no other thread could run while `function` did."""
    ended, longest = threading.Event(), 0.0
    failures = []

    def run():
        try:
            function()
        except BaseException as error:
            failures.append(error)
        finally:
            ended.set()

    threading.Thread(target=run).start()
    before = time.perf_counter()
    while not ended.wait(0.01):
        now = time.perf_counter()
        longest, before = max(longest, now - before), now
    if failures:
        raise failures[0]
    return max(longest, time.perf_counter() - before)
