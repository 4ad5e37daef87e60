"""Those who are there while a server is attacked, each in a process of its own.

`honest` makes pictures with a key of its own, one request at a time. `prober` asks whether the
server lives, 20 times a second and on a connection of its own each time, as an orchestrator does.
`witness` is a bare echo server that knows nothing of ours, and asks itself as often: what it does
not answer in time, the machine was too busy for. Each writes a line when an answer is there.
"""

import base64
import http.client
import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from subprocess import Popen

from benchmarks.load.client import Address
from benchmarks.load.requests import PROMPTS, face_file

PROBE_EVERY = 0.05
RETRY_AFTER = 0.1
"""Seconds after which the honest client asks again when it was refused. It counts into its time."""
PATIENCE = 60.0
KINDS = ("picture", "upload", "picture", "picture", "register", "picture", "picture", "picture")
"""What the honest client asks for in turn: most pictures show a face that it has registered."""


@dataclass(frozen=True, slots=True)
class Seen:
    """One answer: from when it was due until it was there; a status of 0 is none at all."""

    kind: str
    due: float
    done: float
    status: int

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.done - self.due

    @property
    def good(self) -> bool:
        """Whether it was served."""
        return 200 <= self.status < 300


class Bystander:
    """A process of `role`, and what it has seen."""

    def __init__(self, role: str, address: Address, key: str, folder: Path) -> None:
        self._log = folder / f"{role}.txt"
        self._output = self._log.open("w")
        command = [sys.executable, "-m", __spec__.name, role, str(address[1]), key]
        self.process = Popen(command, stdout=self._output, text=True)

    def seen(self) -> list[Seen]:
        """Every answer up to now, the one under way last with the status -1."""
        answers: list[Seen] = []
        for line in self._log.read_text().splitlines():
            kind, due, done, status = line.split()
            if answers and answers[-1].status == -1:
                answers.pop()
            answers.append(Seen(kind, float(due), float(done), int(status)))
        if answers and answers[-1].status == -1:
            answers[-1] = Seen(answers[-1].kind, answers[-1].due, time.monotonic(), -1)
        return answers

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()
        self._output.close()


def longest_gap(seen: Iterable[Seen], start: float, end: float) -> float:
    """The longest time between two good answers in a window, whose borders count as answers."""
    times = sorted(one.done for one in seen if one.good and start <= one.done <= end)
    moments = [start, *times, end]
    return max(later - earlier for earlier, later in pairwise(moments))


def _say(kind: str, due: float, status: int) -> None:
    print(kind, due, time.monotonic(), status, flush=True)


def ask_as(key: str, port: int, method: str, path: str, body: object = None) -> tuple[int, bytes]:
    """One request with a key (none where empty); the status, 0 without an answer, and the body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    try:
        content = None if body is None else json.dumps(body)
        connection.request(method, path, content, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (OSError, http.client.HTTPException):
        return 0, b""
    finally:
        connection.close()


def _honest(port: int, key: str) -> None:
    picture = base64.b64encode(face_file()).decode()
    own, count = "", 0

    def one(kind: str, number: int) -> int:
        nonlocal own
        request: dict[str, object] = {"prompt": PROMPTS[number % 2], "seed": number}
        request["preset"] = "am1+dcg"  # as README asks
        if kind == "upload":
            return ask_as(key, port, "POST", "/v1/images/generations", request | {"face": picture})[
                0
            ]
        if kind == "picture":
            request["face_id"] = own
            return ask_as(key, port, "POST", "/v1/images/generations", request)[0]
        status, body = ask_as(key, port, "POST", "/v1/faces", {"image": picture})
        if status == 201:
            before, own = own, json.loads(body)["id"]
            if before:
                ask_as(key, port, "DELETE", f"/v1/faces/{before}")
        return status

    while one("register", 0) != 201:
        time.sleep(RETRY_AFTER)
    while True:
        kind, due = KINDS[count % len(KINDS)], time.monotonic()
        count += 1
        _say(kind, due, -1)
        status = one(kind, count)
        while status in (0, 429, 503) and time.monotonic() - due < PATIENCE:
            time.sleep(RETRY_AFTER)
            status = one(kind, count)
        _say(kind, due, status)


def _every(seconds: float, ask: Callable[[], int], kind: str) -> None:
    due = time.monotonic()
    while True:
        _say(kind, due, ask())
        due = max(time.monotonic(), due + seconds)
        time.sleep(max(0.0, due - time.monotonic()))


def _echo(listener: socket.socket) -> None:
    while True:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(connection.recv(100))


def _ask_echo(address: Address) -> int:
    with socket.create_connection(address) as connection:
        connection.sendall(b"alive?")
        return 200 if connection.recv(100) else 0


def main(role: str, port: str, key: str) -> None:
    """Do what the role says, for ever."""
    if role == "honest":
        _honest(int(port), key)
    elif role == "prober":
        _every(PROBE_EVERY, lambda: ask_as("", int(port), "GET", "/v2/health/live")[0], "alive")
    else:
        listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=_echo, args=(listener,), daemon=True).start()
        _every(PROBE_EVERY, lambda: _ask_echo(listener.getsockname()), "alive")


if __name__ == "__main__":
    main(*sys.argv[1:])
