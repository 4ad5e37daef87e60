"""The child process that builds one plan, and the parent's side of talking to it.

Why a process: Ctrl-C can end it at any moment, a crash or the system's out-of-memory killer takes
only the build with it, and every byte that the builder took goes back. The job goes in as one line
of JSON on standard input, events come out as lines of JSON on standard output. A child whose parent
died reads the end of its input and leaves.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.spawn import get_executable
from pathlib import Path
from typing import Any

from fastface_trt.engines.manifest import ModuleSpec, Strict
from fastface_trt.engines.tensorrt.flavour import FlavourName, find_flavour
from fastface_trt.engines.tensorrt.options import TensorRTOptions
from fastface_trt.engines.tensorrt.plan import Event, build_plan
from fastface_trt.errors import BackendUnavailable, BuildFailed, FastFaceError

_ERRORS = {kind.code: kind for kind in (BuildFailed, BackendUnavailable)}
_OUT_OF_MEMORY_KILL = -9


class Job(Strict):
    """What a child builds: a module whose ONNX lies in `source`, into folder `target`."""

    flavour: FlavourName
    options: TensorRTOptions
    module: ModuleSpec
    source: str
    target: str
    timing_cache: str | None = None


def run_in_child(job: Job, on_event: Callable[[Event], None]) -> dict[str, Any]:
    """Build in a child process; returns `build_plan`'s facts.

    Raises what `build_plan` raises. An exception in `on_event`, `KeyboardInterrupt` among them,
    ends the child first and then goes on.
    """
    # What multiprocessing would start: a program that embeds Python sets it to an interpreter.
    command = [os.fsdecode(get_executable()), "-m", "fastface_trt.engines.tensorrt.worker"]
    # Its own session, so that a Ctrl-C on the terminal reaches only the parent, which then decides.
    child = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env=os.environ | {"PYTHONSAFEPATH": "1"},  # nothing is imported from the current folder
    )
    # Popen gives pipes whenever it is asked for them.
    assert child.stdin is not None
    assert child.stdout is not None
    assert child.stderr is not None
    noise = _Tail(child.stderr)
    try:
        with suppress(BrokenPipeError):  # it crashed at once, and what it said follows
            child.stdin.write(job.model_dump_json().encode() + b"\n")
            child.stdin.flush()
        for line in child.stdout:
            event = json.loads(line)
            if event["event"] == "built":
                return dict(event["facts"])
            if event["event"] == "failed":
                raise _error(event)
            on_event(event)
        raise _died(job, child.wait(), noise.text())
    finally:
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout, child.stderr):
            with suppress(BrokenPipeError):  # a child that never read its job
                pipe.close()


def _error(event: Event) -> Exception:
    if event.get("errno"):
        return OSError(event["errno"], event["message"], event["file"])
    return _ERRORS[event["code"]](event["message"], event["mend"])


def _died(job: Job, status: int, noise: str) -> BuildFailed:
    label = find_flavour(job.flavour).label
    if status == _OUT_OF_MEMORY_KILL:
        return BuildFailed(
            f"The system ended {label} while it was building {job.module.name}, most likely "
            "because memory ran out.",
            "Free some memory, or build with fewer profiles (--branches, --requests).",
        )
    return BuildFailed(
        f"{label} crashed while it was building {job.module.name} (status {status}): "
        f"{noise or 'it said nothing'}",
        "Export the module again; if that does not help, report the message.",
    )


class _Tail:
    """The end of what a child prints, read as it comes so that the child never blocks on it."""

    def __init__(self, pipe: Any) -> None:
        self._end = b""
        self._thread = threading.Thread(target=self._read, args=(pipe,), daemon=True)
        self._thread.start()

    def _read(self, pipe: Any) -> None:
        for line in pipe:
            self._end = (self._end + line)[-2000:]

    def text(self) -> str:
        self._thread.join(timeout=5)
        lines = self._end.decode(errors="replace").split("\n")
        return " ".join(" ".join(lines).split())[-300:]


def main() -> None:
    """Read a job, build it, and print events; for `run_in_child`."""
    # C++ code prints to standard output as it likes; the events get a way of their own.
    events = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    job = Job.model_validate_json(sys.stdin.buffer.readline())
    threading.Thread(target=_leave_with_parent, daemon=True).start()

    def say(event: Event) -> None:
        events.write(json.dumps(event) + "\n")

    try:
        facts = build_plan(
            find_flavour(job.flavour),
            job.options,
            job.module,
            Path(job.source),
            Path(job.target),
            timing_cache=Path(job.timing_cache) if job.timing_cache else None,
            on_event=say,
        )
        say({"event": "built", "facts": facts})
    except FastFaceError as error:
        code = error.code if error.code in _ERRORS else BuildFailed.code
        say({"event": "failed", "code": code, "message": error.message, "mend": error.mend})
    except OSError as error:
        say(
            {
                "event": "failed",
                "errno": error.errno,
                "message": error.strerror,
                "file": str(error.filename or job.target),
            }
        )
    # TensorRT's destructors take seconds for a large network, and nobody waits for them.
    events.flush()
    os._exit(0)


def _leave_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


if __name__ == "__main__":
    main()
