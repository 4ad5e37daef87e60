"""Attacks that need no crowd: hostile files for commands, and ends of processes.

Each is a function of a folder of its own: what is wrong, or nothing, and what was measured.
"""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

from benchmarks.attack.answers import Checked
from benchmarks.attack.attacks import chunky_png, deep_png, scans, zipped_text_png
from benchmarks.attack.bystanders import ask_as
from benchmarks.attack.run import ATTACKERS_KEY, Arena
from benchmarks.load.server import serve
from fastface_trt.mini.folders import EXPORT, SAMPLE_FACES

COMMAND = (sys.executable, "-m", "fastface_trt.cli.main")
FACE = str(SAMPLE_FACES / "ada.png")
PROMPT = ("--prompt", "photo; person in a garden", "--steps", "1")
PATIENCE = 60.0
MORE_SECONDS, MORE_MEMORY = 4.0, 800_000_000
"""What a hostile picture may cost a command more than the sample face does."""
GONE_WITHIN = 5.0
LONGEST = 1000
"""Characters of a sentence that somebody reads."""

Outcome = tuple[str, str]
"""What is wrong, or nothing, and what was measured."""


def run(
    *arguments: str, environment: Mapping[str, str] | None = None
) -> tuple[int, float, int, str]:
    """A command's exit status, processor seconds, most resident memory, and what it wrote."""
    begun, before = time.monotonic(), os.times()
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **(environment or {})},
    )
    most = 0
    watched = psutil.Process(process.pid)
    while process.poll() is None and time.monotonic() - begun < PATIENCE:
        with suppress(psutil.Error):
            most = max(most, watched.memory_info().rss)
        time.sleep(0.01)
    process.kill()
    written, _ = process.communicate()
    after = os.times()
    seconds = after.children_user + after.children_system
    seconds -= before.children_user + before.children_system
    return process.returncode, seconds, most, written


def one_sentence(*arguments: str, environment: Mapping[str, str] | None = None) -> Outcome:
    """That a command ends with status 2 and one sentence, in time."""
    status, _, _, written = run(*arguments, environment=environment)
    said = [line for line in written.splitlines() if line.startswith("Error: ")]
    measured = f"status {status}: {''.join(said)[:200] or written[-200:]}"
    wrong = status != 2 or len(said) != 1 or "Traceback" in written or len(said[0]) > LONGEST
    return (measured if wrong else ""), measured


def hostile_picture(make: Callable[[], bytes]) -> Callable[[Path], Outcome]:
    """That a picture costs a command little more than the sample face, whatever becomes of it."""

    def check(folder: Path) -> Outcome:
        hostile = folder / "picture"
        hostile.write_bytes(make())
        command = ("generate", *PROMPT, "--out", str(folder / "out"), "--face")
        _, seconds, memory, _ = run(*command, FACE)
        status, its_seconds, its_memory, written = run(*command, str(hostile))
        more, larger = its_seconds - seconds, its_memory - memory
        measured = f"status {status}, {more:.1f} s and {larger / 1e6:.0f} MB more"
        wrong = more > MORE_SECONDS or larger > MORE_MEMORY or "Traceback" in written
        return (measured if wrong or status not in (0, 2) else ""), measured

    return check


def copied_export(folder: Path) -> Path:
    """The mini export, to be tampered with."""
    copy = folder / "export"
    subprocess.run(["cp", "-rL", str(EXPORT), str(copy)], check=True)
    return copy


def generate_from(export: Path, folder: Path) -> Outcome:
    """That a command refuses an export with one sentence."""
    arguments = ("--export", str(export), "--face", FACE, *PROMPT, "--cache", str(folder / "cache"))
    return one_sentence("generate", *arguments, "--out", str(folder / "out"))


def change_manifest(export: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite an export's manifest, as who made the export could."""
    path = export / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def external_data(where: str) -> Callable[[Path], Outcome]:
    """Weights in a file that the manifest does not name, at a place relative to the module."""

    def check(folder: Path) -> Outcome:
        import onnx

        export = copied_export(folder)
        path = export / "unet" / "model.onnx"
        model = onnx.load(path)
        data = (path.parent / where) if "{" not in where else Path(where.format(folder))
        data.parent.mkdir(parents=True, exist_ok=True)
        tensor = max(model.graph.initializer, key=lambda one: len(one.raw_data))
        data.write_bytes(tensor.raw_data)
        entry = tensor.external_data.add()
        entry.key, entry.value = "location", where.format(folder)
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        path.write_bytes(model.SerializeToString())
        content = path.read_bytes()

        def rehash(manifest: dict[str, Any]) -> None:
            module = manifest["modules"]["unet"]
            module["files"][0] |= {
                "bytes": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
            }

        change_manifest(export, rehash)
        return generate_from(export, folder)

    return check


def face_model(where: str) -> Callable[[Path], Outcome]:
    """A face model outside the export, or another than the manifest means."""

    def check(folder: Path) -> Outcome:
        export = copied_export(folder)
        if where == "changed":
            path = export / "face" / "recognition.onnx"
            path.write_bytes(path.read_bytes() + b"\x7a\x01a")  # a field that no reader minds
        elif where == "another":
            copy = export / "face" / "a.onnx"
            copy.write_bytes((export / "face" / "recognition.onnx").read_bytes())
        elif where == "link":
            (export / "face").rename(folder / "face")
            (export / "face").symlink_to(folder / "face")
        else:
            (export / "face").rename(folder / "face")

            def lead_outside(manifest: dict[str, Any]) -> None:
                manifest["face_model"] = where.format(folder)
                kept = [one for one in manifest["extra_files"] if "face/" not in one["path"]]
                manifest["extra_files"] = kept

            change_manifest(export, lead_outside)
        return generate_from(export, folder)

    return check


def obtain(address: str) -> Callable[[Path], Outcome]:
    """A storage that cannot be."""
    return lambda folder: one_sentence("obtain", address, "--home", str(folder / "home"))


def odd_tag(make: Callable[[Path], object]) -> Callable[[Path], Outcome]:
    """A storage in whose place of a tag lies what is no file."""

    def check(folder: Path) -> Outcome:
        tags = folder / "storage" / "tags"
        tags.mkdir(parents=True)
        make(tags / "tag")
        return obtain(f"{folder / 'storage'}#tag")(folder)

    return check


_AUDIT = """
import os, sys
def hook(event, arguments):
    if event == "socket.connect":
        where = arguments[1]
    elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        where = arguments[1] if event == "socket.sendto" else arguments
    else:
        return
    host = where[0] if isinstance(where, tuple) else where
    if isinstance(where, tuple) and str(host) not in ("127.0.0.1", "::1", "localhost"):
        with open(os.environ["ATTACK_AUDIT"], "a") as log:
            print(event, where, " ".join(sys.argv)[:200], file=log)
sys.addaudithook(hook)
"""


def says_nothing_outside(folder: Path) -> Outcome:
    """That no command asks the network: names and addresses that Python looks up or connects to.

    Where strace works it is what native code connects to, too.
    """
    (folder / "sitecustomize.py").write_text(_AUDIT)
    log, trace = folder / "audit", folder / "trace"
    paths = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH", ""))))
    environment = {"PYTHONPATH": paths, "ATTACK_AUDIT": str(log)}
    prefix = _strace(trace)
    for arguments in (
        ("generate", "--face", FACE, *PROMPT, "--out", str(folder / "out")),
        ("doctor",),
    ):
        subprocess.run(
            [*prefix, *COMMAND, *arguments],
            env={**os.environ, **environment},
            capture_output=True,
            check=False,
        )
    before = dict(os.environ)
    try:
        os.environ.update(environment)
        with serve(prefix=prefix) as server:
            server.wait_until_ready()
            # The tracer passes no signal on, so it is asked of the server itself.
            for child in psutil.Process(server.process.pid).children() if prefix else ():
                child.terminate()
            if not prefix:
                server.stop()
            server.process.wait(timeout=PATIENCE)
    finally:
        os.environ.clear()
        os.environ.update(before)
    asked = log.read_text().splitlines() if log.exists() else []
    asked += [
        line
        for line in (trace.read_text(errors="replace").splitlines() if trace.exists() else [])
        if "sin_addr" in line and '"127.' not in line and "0.0.0.0" not in line
    ]
    how = "Python and system calls" if prefix else "Python"
    return "; ".join(asked[:3]), f"{len(asked)} attempts seen ({how})"


def _strace(trace: Path) -> tuple[str, ...]:
    prefix = ("strace", "-f", "-q", "-o", str(trace), "-e", "trace=connect,sendto,sendmmsg")
    with suppress(OSError):
        if not subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode:
            return prefix
    return ()


def _busy_server(arena: Arena, count: int = 8, **fields: object) -> list[psutil.Process]:
    """Let the server work on pictures that take long; its workers."""

    body = {"prompt": "a", "face_id": arena.face, "steps": 8, "n": 4, "preset": "am1+dcg", **fields}
    for _ in range(count):
        arguments = (ATTACKERS_KEY, arena.port, "POST", "/v1/images/generations", body)
        threading.Thread(target=ask_as, args=arguments, daemon=True).start()
    time.sleep(2.0)
    return list(psutil.Process(arena.server.process.pid).children(recursive=True))


def orphans(name: signal.Signals) -> Callable[[Path], Outcome]:
    """That workers leave soon after a server that was told to leave in the midst of its work."""

    def check(folder: Path) -> Outcome:
        with Arena(("--workers", "2", "--drain-seconds", "1"), warm_up=0.5) as arena:
            workers = _busy_server(arena, size="192x192")
            begun = time.monotonic()
            arena.server.process.send_signal(name)
            _, alive = psutil.wait_procs(workers, timeout=30)
            seconds = time.monotonic() - begun
            for one in alive:
                with suppress(psutil.NoSuchProcess):
                    one.kill()
        measured = f"{len(workers) - len(alive)} of {len(workers)} left within {seconds:.1f} s"
        most = GONE_WITHIN if name == signal.SIGKILL else 15.0
        return (measured if alive or seconds > most else ""), measured

    return check


def survives(
    what: Callable[[Arena], None], options: Sequence[str] = (), seconds: float = 12.0
) -> Callable[[Path], Outcome]:
    """That a server lives on, and serves the honest client each of its requests."""

    def check(folder: Path) -> Outcome:
        with Arena(options, warm_up=0.5) as arena:
            begun = time.monotonic()
            what(arena)
            end = max(time.monotonic(), begun + seconds)
            while time.monotonic() < end or arena.seen("honest")[-1].due < end:
                if arena.server.process.poll() is not None or time.monotonic() > end + 60:
                    break
                time.sleep(0.1)
            status = arena.server.process.poll()
            asked = [one for one in arena.seen("honest") if one.done > begun]
            unserved = [one for one in asked if not one.good and one.due < end]
            longest = max(one.seconds for one in asked)
        measured = f"{len(asked)} requests, {longest:.1f} s for the longest"
        if status is not None:
            return f"the server left with status {status}", measured
        return (f"{len(unserved)} unserved, {measured}" if unserved else ""), measured

    return check


def _kill_workers(arena: Arena) -> None:
    """End workers while they make the attacker's pictures, as a picture that breaks them does.

    Not twice in one picture of the honest client: who is there at two deaths is held for the cause.
    """
    for _ in range(4):
        workers = _busy_server(arena)
        for worker in workers:
            with suppress(psutil.NoSuchProcess):
                worker.kill()
        killed = time.monotonic()
        while arena.seen("honest")[-1].due < killed and time.monotonic() < killed + 30:
            time.sleep(0.1)
        time.sleep(random.uniform(0.5, 1.5))


def _large_pictures(arena: Arena) -> None:
    """Ask for pictures whose calls take longer than a call may."""
    for _ in range(3):
        # One at a time and with one branch, for each takes gigabytes where it is let in.
        _busy_server(arena, 1, size="3072x3072", n=1, preset="plain")
        time.sleep(3.0)


def _keys(value: str) -> Callable[[Path], Outcome]:
    return lambda folder: one_sentence(
        "serve", "--port", "0", environment={"FASTFACE_API_KEYS": value}
    )


PROCESSES: tuple[tuple[str, str, Callable[[Path], Outcome]], ...] = (
    ("CLI: a JPEG of 2,000 scans", "5 intake", hostile_picture(lambda: scans(2000))),
    ("CLI: a deep PNG of 64 megapixels", "5 intake", hostile_picture(lambda: deep_png(8000, 8000))),
    ("CLI: a PNG of a million texts", "5 intake", hostile_picture(lambda: chunky_png(1_200_000))),
    ("CLI: a PNG of zipped texts", "5 intake", hostile_picture(lambda: zipped_text_png(500))),
    ("external data beside a module", "7 artefacts", external_data("model.onnx.data")),
    ("external data above a module", "7 artefacts", external_data("../../data")),
    ("external data at an absolute path", "7 artefacts", external_data("{}/data")),
    ("face model above the export", "7 artefacts", face_model("../face")),
    ("face model at an absolute path", "7 artefacts", face_model("{}/face")),
    ("face model by a link", "7 artefacts", face_model("link")),
    ("face model with another byte", "7 artefacts", face_model("changed")),
    ("a third file among the face models", "7 artefacts", face_model("another")),
    ("generate, serve and doctor ask nobody", "8 network", says_nothing_outside),
    ("keys: ' , '", "9 small", _keys(" , ")),
    ("keys: ','", "9 small", _keys(",")),
    *(
        (f"obtain: {what} of 5,000 characters", "9 small", obtain(address))
        for what, address in (
            ("a name", f"/{'a' * 5000}#tag"),
            ("a path", f"{'/a' * 2500}#tag"),
            ("a relative path", f"{'a/' * 2500}#tag"),
            ("a file's address", f"file://{'/a' * 2500}#tag"),
            ("a tag", f"/tmp#{'a' * 5000}"),
        )
    ),
    ("obtain: a FIFO as tag", "9 small", odd_tag(os.mkfifo)),
    ("obtain: a folder as tag", "9 small", odd_tag(Path.mkdir)),
    ("obtain: a device as tag", "9 small", odd_tag(lambda path: path.symlink_to("/dev/zero"))),
    ("SIGKILL in the midst of work", "10 orphans", orphans(signal.SIGKILL)),
    ("SIGTERM in the midst of work", "10 orphans", orphans(signal.SIGTERM)),
    ("workers that die of pictures", "2 output", survives(_kill_workers)),
    ("calls that stall", "2 output", survives(_large_pictures, ("--stall-seconds", "3"))),
)


def check_process(name: str, point: str, check: Callable[[Path], Outcome]) -> Checked:
    """Run one of them in a folder of its own."""
    with TemporaryDirectory(prefix="attack-") as folder:
        problem, measured = check(Path(folder))
    return Checked(name, point, problem, measured)
