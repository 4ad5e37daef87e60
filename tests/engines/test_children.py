"""No child outlives its parent: parents are killed here while children do what keeps them."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from time import monotonic, sleep

import pytest

from fastface_trt.engines.children import start_child

PATIENCE = 60
FIRST = """
import ctypes, os, signal, sys, time
from fastface_trt.engines import children
"""
READY = "os.write(1, b'up\\n')\n"
PARENT = """
import os, signal, subprocess, sys
from fastface_trt.engines.children import start_child
child = start_child(["-c", sys.argv[1]], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
if sys.argv[2] == "share":  # as a fork of the host program does
    other = os.fork()
    if not other:
        os.close(1)
        signal.pause()
else:
    other = 0
print(child.pid, other, flush=True)
assert child.stdout.readline() == b"up\\n"
print("up", flush=True)
signal.pause()
"""
AT_WORK = {
    "sleeps": "time.sleep(600)",
    "ignores signals": (
        "for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):\n"
        "    signal.signal(one, signal.SIG_IGN)\n"
        "time.sleep(600)"
    ),
    "counts": "while True: pass",
    "keeps the interpreter's lock": "ctypes.PyDLL(None).sleep(600)",
    "is stopped": "os.kill(os.getpid(), signal.SIGSTOP)",
}
FOR_THE_KERNEL = ("keeps the interpreter's lock", "is stopped")
linux = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's net is Linux's")


def gone(process):
    """Whether a process ends; nobody may be there to ask for its status."""
    until = monotonic() + PATIENCE
    while monotonic() < until:
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        sleep(0.02)
    return False


def orphan(code, *, share=False, unburied=False):
    """The id of a child whose parent was killed; with `share` another process keeps its pipe."""
    command = [sys.executable, "-c", PARENT, code, "share" if share else ""]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        child, other = map(int, parent.stdout.readline().split())
        assert parent.stdout.readline() == "up\n"
        parent.kill()
        if unburied:  # as long as nobody asks for its status
            gone(child)
    return child, other


@pytest.mark.parametrize(
    "work",
    [pytest.param(name, marks=linux if name in FOR_THE_KERNEL else ()) for name in AT_WORK],
)
def test_a_child_ends_with_its_parent_whatever_it_does(work):
    child, _ = orphan(f"{FIRST}children.leave_with_parent(0)\n{READY}{AT_WORK[work]}")
    assert gone(child)


@pytest.mark.parametrize("work", [name for name in AT_WORK if name not in FOR_THE_KERNEL])
def test_the_pipe_alone_is_enough_where_the_kernel_has_no_net(work):
    unknown = "children._PR_SET_PDEATHSIG = 9999\n"
    code = f"{FIRST}{unknown}children.leave_with_parent(0)\n{READY}{AT_WORK[work]}"
    child, _ = orphan(code)
    assert gone(child)


@linux
@pytest.mark.parametrize(("late", "unburied"), [(False, False), (True, False), (True, True)])
def test_the_kernel_alone_is_enough_where_somebody_else_holds_the_pipe(late, unburied):
    """`late`: the parent had gone before the kernel was asked."""
    ask = "children.leave_with_parent(0)\n"
    code = ask + READY
    if late:
        wait = "while os.getppid() == parent: time.sleep(0.02)\n"
        code = f"parent = os.getppid()\n{READY}{wait}{ask}"
    child, other = orphan(f"{FIRST}{code}time.sleep(600)", share=True, unburied=unburied)
    try:
        assert gone(child)
    finally:
        os.kill(other, signal.SIGKILL)


def test_a_child_outlives_the_thread_that_asked_for_it():
    code = f"{FIRST}children.leave_with_parent(0)\nfor line in sys.stdin: print(line, flush=True)"
    children = []

    def start():
        children.append(start_child(["-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        children[0].stdin.write(b"up\n")
        children[0].stdin.flush()
        assert children[0].stdout.read(4) == b"up\n\n"

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    with children[0] as child:
        child.stdin.write(b"still here\n")
        child.stdin.flush()
        assert child.stdout.readline() == b"still here\n"


def test_a_program_that_forks_can_start_children():
    code = """
import os, sys
from fastface_trt.engines.children import start_child
start_child(["-c", ""]).wait()
if not os.fork():
    os._exit(start_child(["-c", "import sys; sys.exit(7)"]).wait())
sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=PATIENCE).returncode == 7


def test_a_child_of_another_program_ends_with_it():
    child = f"{FIRST}children.SECONDS_BETWEEN_LOOKS = 0.05\nchildren.leave_with_starter()\n{READY}"
    code = """
import signal, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
signal.pause()
"""
    command = [sys.executable, "-c", code, f"{child}time.sleep(600)"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        pid = int(parent.stdout.readline())
        parent.kill()
    assert gone(pid)


def test_what_cannot_be_started_is_told_to_who_asked(monkeypatch):
    monkeypatch.setattr("fastface_trt.engines.children.get_executable", lambda: b"/nope/python")
    with pytest.raises(FileNotFoundError):
        start_child(["-c", ""])
