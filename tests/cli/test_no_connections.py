"""Nothing is asked of another machine: every attempt is refused and written down, Python's or C's.

A library of our own stands before the C library, so that it also sees what is compiled. Where the
system allows it, there is no network around the programs either, and they still work.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastface_trt.mini.folders import SAMPLE_FACES

ROOT = Path(__file__).parents[2]
CLI = (sys.executable, "-m", "fastface_trt.cli.main")
LOOPBACK = """
import fcntl, os, socket, struct, sys
with socket.socket() as any:
    fcntl.ioctl(any, 0x8914, struct.pack("16sh", b"lo", 0x41))  # SIOCSIFFLAGS: up and running
os.execv(sys.argv[1], sys.argv[1:])
"""
SERVE = """
import asyncio
from benchmarks.load.client import ask
from benchmarks.load.run import GENERATE, register_face
from benchmarks.load.server import serve

with serve("--threads", "1") as server:
    address = server.wait_until_ready()
    face = asyncio.run(register_face(address))
    body = {"prompt": "photo; person in a garden", "face_id": face, "steps": 1}
    answer = asyncio.run(ask(address, "POST", GENERATE, body))
    assert answer.status == 200, answer.body
    assert server.stop() == 0
"""
ATTEMPTS = """
import ctypes, socket, sys

def attempt(function, *arguments):
    try:
        function(*arguments)
    except OSError:
        pass

attempt(socket.getaddrinfo, "example.org", 80)
attempt(socket.create_connection, ("192.0.2.1", 80), 1)
attempt(socket.create_connection, ("2001:db8::1", 80), 1)
datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
attempt(datagrams.sendto, b"x", ("192.0.2.2", 53))
attempt(datagrams.sendmsg, [b"x"], [], 0, ("192.0.2.3", 53))
ctypes.CDLL(None).gethostbyname(b"example.net")
with socket.create_server(("127.0.0.1", 0)) as server:  # none of another machine
    socket.create_connection(server.getsockname()).close()
    socket.create_connection(("localhost", server.getsockname()[1])).close()
"""


def can_be_alone():
    alone = ["unshare", "--map-root-user", "--net", "true"]
    return shutil.which("unshare") and not subprocess.run(alone, capture_output=True).returncode


@pytest.fixture(scope="module")
def attempts_of(tmp_path_factory):
    """Run a command; what it tried to reach, in sorted lines."""
    folder = tmp_path_factory.mktemp("connections")
    library, log = folder / "no_connections.so", folder / "log"
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs Linux and a C compiler")
    source = Path(__file__).with_name("no_connections.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    prefix = ["unshare", "--map-root-user", "--net"] if can_be_alone() else []
    if prefix:
        prefix += [sys.executable, "-c", LOOPBACK]
    environment = {
        **os.environ,
        "HOME": str(folder / "home"),  # where no setting says that nobody is to be asked
        "XDG_CACHE_HOME": str(folder / "cache"),
        "PYTHONPATH": str(ROOT),
        "LD_PRELOAD": str(library),
        "CONNECTIONS_LOG": str(log),
    }
    for name in ("ORT_DISABLE_TELEMETRY", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY"):
        environment.pop(name, None)

    def run(*command):
        log.write_text("")
        done = subprocess.run(
            [*prefix, *map(str, command)], cwd=folder, env=environment, capture_output=True
        )
        assert done.returncode == 0, done.stderr.decode()
        return sorted(set(log.read_text().splitlines()))

    return run


def test_attempts_of_every_kind_are_seen(attempts_of):
    assert attempts_of(sys.executable, "-c", ATTEMPTS) == [
        "connect 192.0.2.1",
        "connect 2001:db8::1",
        "getaddrinfo example.org",
        "gethostbyname example.net",
        "sendmsg 192.0.2.3",
        "sendto 192.0.2.2",
    ]


@pytest.mark.parametrize(
    "command",
    [
        (*CLI, "doctor"),
        (*CLI, "generate", "--face", SAMPLE_FACES / "ada.png", "--prompt", "photo", "--steps", 1),
        pytest.param((sys.executable, "-c", SERVE), marks=pytest.mark.serving),
    ],
    ids=["doctor", "generate", "serve"],
)
def test_no_other_machine_is_asked(attempts_of, command):
    assert attempts_of(*command) == []
