"""The server under load: the command that users type, in a process of its own."""

import asyncio
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from time import monotonic

import psutil

from benchmarks.load.client import Address, ask

_PATIENCE = 120
"""Seconds that a server may take to open its engines."""


class Server:
    """A running `fastface-trt serve`; `log` holds the end of what it wrote."""

    def __init__(self, options: Sequence[str], prefix: Sequence[str] = ()) -> None:
        command = [sys.executable, "-m", "fastface_trt.cli.main", "serve", "--port", "0"]
        self.process = subprocess.Popen(
            [*prefix, *command, *options],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.log: deque[str] = deque(maxlen=400)
        self._port: int | None = None
        self._told = threading.Condition()
        self._reader = threading.Thread(target=self._read, name="server log", daemon=True)
        self._reader.start()

    @property
    def address(self) -> Address:
        """Where it listens; waits until it says so. Raises RuntimeError when it leaves instead."""
        with self._told:
            self._told.wait_for(lambda: self._port or self.process.poll() is not None, _PATIENCE)
        if self._port is None:
            raise RuntimeError("the server did not start:\n" + "".join(self.log))
        return "127.0.0.1", self._port

    def wait_until_ready(self) -> Address:
        """Wait for the first pictures of the warm-up; its address."""
        until = monotonic() + _PATIENCE
        while monotonic() < until:
            answer = asyncio.run(ask(self.address, "GET", "/v2/health/ready"))
            if answer.status == 200:
                return self.address
            if self.process.poll() is not None:
                break
            asyncio.run(asyncio.sleep(0.1))
        raise RuntimeError("the server did not become ready:\n" + "".join(self.log))

    def stop(self) -> int:
        """SIGTERM; its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=_PATIENCE)

    def close(self) -> None:
        """End it, if it still runs, and workers that it leaves, which would hold its log open."""
        left: list[psutil.Process] = []
        if self.process.poll() is None:
            with suppress(psutil.NoSuchProcess):
                left = psutil.Process(self.process.pid).children(recursive=True)
            self.process.kill()
        self.process.wait()
        for worker in left:
            with suppress(psutil.NoSuchProcess):
                worker.kill()
        self._reader.join(timeout=5)
        assert self.process.stderr is not None
        self.process.stderr.close()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            if self._port is None and (found := re.search(r"http://127\.0\.0\.1:(\d+)", line)):
                with self._told:
                    self._port = int(found[1])
                    self._told.notify_all()
        with self._told:
            self._told.notify_all()


@contextmanager
def serve(*options: str, prefix: Sequence[str] = ()) -> Iterator[Server]:
    """A server for the length of a block; `prefix` comes before its command, such as `prlimit`."""
    server = Server(options, prefix)
    try:
        yield server
    finally:
        server.close()
