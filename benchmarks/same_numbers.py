"""Whether two checkouts compute the same: hashes of what they make, and where they differ.

    python -m benchmarks.same_numbers after.json --against benchmarks/results/same-numbers.json
    python -m benchmarks.same_numbers before.json --tree ../before

writes SHA-256 (its first half) of every tensor of the recorded cases in tests/golden/pipeline, by
both branch plans; of the pixels of a mini picture by every preset, two guidance schedules and two
numbers of steps; and of the pixels of pictures over HTTP, with the status and fields of answers.
With `--against` it exits with 1 and names what is not the same.

Sums depend on how many threads share them and on the processor, so everything runs on one core, and
only hashes made on one machine with the same versions can be compared. `--tree` is another
checkout, such as one from before a change: only its command line and HTTP are used. It must import
as it lies there: one without links fastface_trt/{engines,export,runtime} needs them first.
"""

import base64
import hashlib
import io
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import sleep
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import click
import numpy as np
from PIL import Image
from safetensors.numpy import load_file

HERE = Path(__file__).parent.parent
RESULTS = HERE / "benchmarks" / "results" / "same-numbers.json"
PRESETS = ("plain", "dcg", "am1", "am2", "am1+dcg", "am2+dcg")
PROMPT = "photo; person on a beach, smiling"
MORE_PICTURES = {
    "α and β by a cosine": ("--alpha", "cosine:high=3", "--beta", "cosine:high=2"),
    "α and β by lists": ("--alpha", "1,1.5,1.5,1", "--beta", "1,3,3,1", "--rescale", "0.5"),
    "variant 1, full plan": ("--preset", "dcg", "--dcg-variant", "1", "--plan", "full"),
    "8 steps": ("--preset", "am1+dcg", "--steps", "8"),
    "softmask": ("--am-up", "kind=softmask,sharpness=7.5/5/5/5"),
    "two of a seed": ("--preset", "am1+dcg", "--seed", "11", "--count", "2"),
}
SAMPLERS = {"its own": (), "stochastic": ("--schedule-of", "lcm")}
ASKED = {
    "plain": {"prompt": PROMPT, "seed": 5},
    "guided": {"prompt": PROMPT, "seed": 5, "preset": "am1+dcg", "alpha": "cosine:high=3"},
}
VERSIONS = ("numpy", "onnxruntime", "torch", "diffusers", "pillow", "insightface")

Hashes = dict[str, Any]


def digest(array: np.ndarray[Any, Any]) -> str:
    """Of the numbers, their type and their shape."""
    told = f"{array.dtype.str}{array.shape}".encode()
    return hashlib.sha256(told + np.ascontiguousarray(array).tobytes()).hexdigest()[:32]


def pixels(data: bytes) -> str:
    """`digest` of an encoded picture."""
    return digest(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


class Checkout:
    """A checkout of this repository, whose command line runs with an engine cache of its own."""

    def __init__(self, tree: Path, scratch: Path) -> None:
        self.tree, self.scratch = tree, scratch
        self.face = tree / "fastface_trt" / "mini" / "faces" / "ada.png"
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(tree),
            "FASTFACE_CACHE": str(scratch / "cache"),
        }

    def command(self, *words: str | Path) -> dict[str, Any]:
        """What `subprocess` takes for a command."""
        line = [sys.executable, "-m", "fastface_trt.cli.main", *map(str, words)]
        return {"args": line, "cwd": self.tree, "env": self.environment}

    def recorded_cases(self, plan: str) -> Hashes:
        """Hashes of every tensor that `replay` writes."""
        golden, out = self.tree / "tests" / "golden" / "pipeline", self.scratch / "out.safetensors"
        recording = ("--cases", golden / "cases.json", "--tensors", golden / "tensors.safetensors")
        model = ("--model", golden / "model", "--backend", "onnxruntime", "--plan", plan)
        subprocess.run(**self.command("replay", *model, *recording, "--out", out), check=True)
        return {name: digest(tensor) for name, tensor in sorted(load_file(out).items())}

    def pictures(self, *options: str) -> list[str]:
        """Hashes of what `generate` writes, in the order of its files."""
        with tempfile.TemporaryDirectory(dir=self.scratch) as out:
            asked = ("--face", self.face, "--prompt", PROMPT, "--threads", "1", "--json")
            made = self.command("generate", *asked, *options, "--out", out)
            answer = subprocess.run(**made, check=True, stdout=subprocess.PIPE)
            return [pixels(Path(file).read_bytes()) for file in json.loads(answer.stdout)["files"]]

    @contextmanager
    def server(self, *options: str) -> Iterator[str]:
        """The address of `serve` on the loopback interface."""
        served = self.command("serve", "--port", "0", "--threads", "1", *options)
        log = self.scratch / "server.log"
        with log.open("w") as lines:
            process = subprocess.Popen(**served, stdout=lines, stderr=lines)
        try:
            with log.open() as lines:
                address = None
                while address is None:
                    address = re.search(r"http://127\.0\.0\.1:\d+", lines.readline())
                    if process.poll() is not None:
                        raise click.ClickException(log.read_text())
            _wait_until_ready(address[0])
            yield address[0]
        finally:
            process.terminate()
            process.wait()

    def answers(self, *options: str) -> Hashes:
        """Status, fields and pixels of HTTP answers."""
        picture = self.face.read_bytes()
        face = base64.b64encode(picture).decode()
        with self.server(*options) as address:
            found = {
                f"generations, {name}": _post(
                    f"{address}/v1/images/generations",
                    json.dumps(body | {"face": face}).encode(),
                    "application/json",
                )
                for name, body in ASKED.items()
            }
            parts = {"prompt": PROMPT, "seed": "9", "preset": "am2"}
            form = "".join(
                f'--B\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
                for name, value in parts.items()
            )
            form += '--B\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
            found["edits"] = _post(
                f"{address}/v1/images/edits",
                form.encode() + picture + b"\r\n--B--\r\n",
                "multipart/form-data; boundary=B",
            )
        return found


def _wait_until_ready(address: str) -> None:
    for _ in range(600):
        try:
            urlopen(f"{address}/v2/health/ready", timeout=60).close()
            return
        except HTTPError:
            sleep(0.5)
    raise click.ClickException("the server did not become ready")


def _post(url: str, body: bytes, kind: str) -> Hashes:
    with urlopen(Request(url, body, {"Content-Type": kind}), timeout=300) as response:
        status, answer = response.status, json.load(response)
    images = answer["data"]
    return {
        "status": status,
        "fields": sorted(answer),
        "fields of a picture": sorted({name for image in images for name in image}),
        "pixels": [pixels(base64.b64decode(image["b64_json"])) for image in images],
    }


def stay_on_one_core() -> None:
    """This process and what it starts, where the system has a way to say so."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def measure(tree: Path) -> Hashes:
    """All hashes of a checkout."""
    with tempfile.TemporaryDirectory(prefix="same-numbers-") as scratch:
        checkout = Checkout(tree, Path(scratch))
        chosen = [word for preset in PRESETS for word in ("--preset", preset)]
        return {
            "HTTP": {name: checkout.answers(*options) for name, options in SAMPLERS.items()},
            "pictures": dict(zip(PRESETS, checkout.pictures(*chosen), strict=True))
            | {name: checkout.pictures(*options) for name, options in MORE_PICTURES.items()},
            "recorded cases": {plan: checkout.recorded_cases(plan) for plan in ("full", "exact")},
        }


def differences(before: Any, after: Any, where: str = "") -> Iterator[str]:
    """What is not the same, by its path."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name in dict.fromkeys((*before, *after)):
            yield from differences(before.get(name), after.get(name), f"{where}/{name}")
    elif before != after:
        yield f"{where}: {before} → {after}"


def describe_machine() -> dict[str, str]:
    """What the hashes depend on beside the code."""
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    told = {"processor": model[1] if model else platform.processor(), "system": platform.system()}
    told["python"] = platform.python_version()
    for name in VERSIONS:
        try:
            told[name] = version(name)
        except PackageNotFoundError:
            told[name] = "not installed"
    return told


@click.command(help=(__doc__ or "").split("\n")[0])
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path), default=RESULTS)
@click.option("--tree", type=click.Path(exists=True, path_type=Path), default=HERE)
@click.option("--against", type=click.Path(exists=True, path_type=Path))
def main(out: Path, tree: Path, against: Path | None) -> None:
    """Measure a checkout, and compare."""
    stay_on_one_core()
    expected = json.loads(against.read_text("utf-8")) if against else {}
    found = {"machine": describe_machine(), **measure(tree.resolve())}
    out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", "utf-8")
    changed = list(differences(expected, found)) if against else []
    for line in changed:
        click.echo(line)
    if against:
        click.echo("not the same" if changed else f"{out} and {against} are the same")
    sys.exit(bool(changed))


if __name__ == "__main__":
    main()
