"""Child processes that end with this one, however it ends.

A child computes for minutes without a look at its pipes, and holds gigabytes and a GPU meanwhile;
a parent that is killed by SIGKILL tells nobody. So there are two nets.

On Linux the kernel ends the child (PR_SET_PDEATHSIG), be it stopped, deaf to signals, or in a
library that keeps the interpreter's lock. What it calls the parent is the thread that started the
child, so all children are started by one thread that lives as long as the process.

Everywhere, a thread of the child waits for the other end of its pipe to close, and leaves at once,
whatever the other threads do. It also sees a parent that had gone before the kernel was asked.
"""

import ctypes
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import cache
from multiprocessing.spawn import get_executable
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeAlias

ORPHANED = 71
"""Exit status of who lost its parent; EX_OSERR of sysexits.h, though nobody may be there to see."""
SECONDS_BETWEEN_LOOKS = 1.0
_PARENT = "FASTFACE_PARENT_PID"
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h

_Job: TypeAlias = "tuple[Future[subprocess.Popen[bytes]], Callable[[], subprocess.Popen[bytes]]]"
_lock = threading.Lock()
_jobs: "SimpleQueue[_Job] | None" = None


def start_child(
    arguments: Sequence[str], environment: Mapping[str, str] | None = None, **pipes: Any
) -> "subprocess.Popen[bytes]":
    """Start Python with `arguments`; what it runs calls `leave_with_parent` first of all.

    `environment` is added to this process's, `pipes` go to `Popen`. The child has a session of its
    own, so that a Ctrl-C on the terminal reaches only the parent, which then decides, and imports
    nothing from the current folder. Raises OSError.
    """

    def start() -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            # What multiprocessing would start: a program that embeds Python sets it.
            [os.fsdecode(get_executable()), *arguments],
            start_new_session=True,
            env={
                **os.environ,
                "PYTHONSAFEPATH": "1",
                **(environment or {}),
                _PARENT: str(os.getpid()),
            },
            text=False,
            **pipes,
        )

    future: Future[subprocess.Popen[bytes]] = Future()
    _starter().put((future, start))
    return future.result()


def _starter() -> "SimpleQueue[_Job]":
    """Jobs of the thread that starts children."""
    global _jobs
    with _lock:
        if _jobs is None:
            _jobs = SimpleQueue()
            threading.Thread(
                target=_start, args=(_jobs,), name="parent of children", daemon=True
            ).start()
        return _jobs


def _start(jobs: "SimpleQueue[_Job]") -> None:
    while True:
        future, start = jobs.get()
        try:
            future.set_result(start())
        except Exception as error:
            future.set_exception(error)
        del future  # with the child in it, whose pipes its owner closes by forgetting it


def _forked() -> None:
    global _jobs, _lock
    _jobs, _lock = None, threading.Lock()  # threads stay behind in a fork


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def leave_with_parent(pipe: int) -> None:
    """End this process as soon as its parent has; for a child of `start_child`.

    `pipe` is a file descriptor whose other end only the parent holds.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # a C library without it
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    parent = int(os.environ.get(_PARENT, os.getppid()))
    if os.getppid() != parent and not _alive(parent):
        os._exit(ORPHANED)
    threading.Thread(target=_leave_at_the_end, args=(pipe,), name="parent", daemon=True).start()


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    with suppress(OSError):  # killed, and nobody has asked for its status yet
        stat = Path(f"/proc/{process}/stat").read_text("utf-8", "replace")
        return stat.rpartition(")")[2].split()[0] != "Z"
    return True


def _leave_at_the_end(pipe: int) -> None:
    if hasattr(select, "poll"):
        waiting = select.poll()
        waiting.register(pipe, 0)  # nothing but its end, which is told in any case
        waiting.poll()
    else:
        while os.read(pipe, 1):
            pass
    os._exit(ORPHANED)


@cache
def leave_with_starter() -> None:
    """End this process as soon as the one that started it has; for children of other programs.

    Their children are started by threads that may end, so that the kernel's net is not for them.
    """
    parent = os.getppid()
    threading.Thread(target=_leave_without, args=(parent,), name="starter", daemon=True).start()


def _leave_without(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(SECONDS_BETWEEN_LOOKS)
    os._exit(ORPHANED)
