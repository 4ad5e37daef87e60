"""`build`: make the engines of an export before they are needed.

What a build shows: nested bars on a terminal, lines elsewhere, and a JSON log for machines.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import time
from typing import Any, TextIO

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fastface_trt.cli.common import (
    FILE,
    Counts,
    backend_options,
    console,
    parse_size,
    provider_option,
    timed_lines,
)
from fastface_trt.engines.backends import make_builder
from fastface_trt.engines.cache import EngineCache
from fastface_trt.engines.contract import MAX_WINDOWS
from fastface_trt.engines.files import storage_errors
from fastface_trt.engines.tensorrt.options import DynamicProfile
from fastface_trt.engines.tensorrt.plan import Event
from fastface_trt.errors import InvalidRequest
from fastface_trt.runtime.export_folder import Export

_INDENT = "  "
_DEEPEST = 3
"""Phases below this depth come by the thousand and last milliseconds."""


class BuildDisplay:
    """Takes a builder's events, one module after the other.

    The bar of a module follows the clock against the time that an earlier build took, where there
    was one: phases say what happens now, but not how long the rest will take.
    """

    def __init__(self, bars: Progress | None, log: TextIO | None) -> None:
        self._bars = bars
        self._log = log
        self._module: TaskID | None = None
        self._phases: dict[str, tuple[TaskID, int]] = {}

    def start_module(self, name: str, expected_seconds: float | None) -> None:
        """Begin the bar of a module; `expected_seconds` comes from an earlier build."""
        self.event({"module": name, "event": "start", "expected_seconds": expected_seconds})
        if self._bars is not None:
            self._module = self._bars.add_task(name, total=expected_seconds)

    def end_module(self, name: str, facts: dict[str, Any]) -> None:
        """Take the module's bars away and log how it went."""
        self.event({"module": name, "event": "finished", **facts})
        if self._bars is not None and self._module is not None:
            for task, _ in self._phases.values():
                self._bars.remove_task(task)
            self._bars.remove_task(self._module)
        self._phases.clear()

    def event(self, event: Event) -> None:
        """One event of a builder, in the order in which they come."""
        if self._log is not None:
            self._log.write(json.dumps({"time": round(time(), 3), **event}) + "\n")
            self._log.flush()
        if self._bars is None:
            return
        kind, name = event["event"], event.get("name", "")
        if kind == "phase":
            self._start_phase(name, event["parent"], event["steps"])
        elif kind == "step" and name in self._phases:
            self._bars.update(self._phases[name][0], completed=event["step"])
        elif kind == "end" and name in self._phases:
            self._bars.remove_task(self._phases.pop(name)[0])
        self._advance_module()

    def _advance_module(self) -> None:
        """Move the module's bar to where the clock is; the last hundredth is for the end itself."""
        assert self._bars is not None
        task = next((task for task in self._bars.tasks if task.id == self._module), None)
        if task is not None and task.total:
            done = min(task.elapsed or 0.0, 0.99 * task.total)
            self._bars.update(task.id, completed=done)

    def _start_phase(self, name: str, parent: str, steps: int) -> None:
        assert self._bars is not None
        depth = self._phases[parent][1] + 1 if parent in self._phases else 1
        if depth <= _DEEPEST and name not in self._phases:
            task = self._bars.add_task(_INDENT * depth + name, total=steps or None)
            self._phases[name] = (task, depth)


@contextmanager
def build_display(screen: Console, log: Path | None) -> Iterator[BuildDisplay]:
    """A display on `screen` that logs to file `log`, one JSON object per line.

    Raises `StorageError` when the log cannot be written.
    """
    with ExitStack() as stack:
        file: TextIO | None = None
        if log is not None:
            with storage_errors(log.parent):
                log.parent.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context(open(log, "w", encoding="utf-8"))
        bars: Progress | None = None
        if screen.is_terminal:
            columns = (
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            bars = stack.enter_context(Progress(*columns, console=screen, transient=True))
        yield BuildDisplay(bars, file)


@click.command()
@backend_options
@provider_option
@click.option("--module", "modules", multiple=True, help="Only this module (repeatable).")
@click.option(
    "--optimization",
    type=click.Choice(["all", "extended", "basic"]),
    help="ONNX Runtime: how far the graph is optimised; extended keeps fp16 weights fp16 on a CPU.",
)
@click.option("--requests", type=Counts(), help="Requests per UNet call to build for [1].")
@click.option("--branches", type=Counts(), help="Branches per request to build for [1,2,3].")
@click.option(
    "--size", "sizes", multiple=True, help="WIDTHxHEIGHT in pixels, repeatable [the export's]."
)
@click.option(
    "--dynamic",
    metavar="WxH..WxH",
    help="One more profile for every size in this range; slower than a fixed one.",
)
@click.option(
    "--prompt-windows",
    type=click.IntRange(1, MAX_WINDOWS),
    help=f"Windows of 75 prompt tokens to build for [{MAX_WINDOWS}].",
)
@click.option("--max-requests", type=int, help="Largest number of requests of --dynamic [4].")
@click.option(
    "--optimization-level", type=click.IntRange(0, 5), help="TensorRT: 0 builds fast, 5 runs fast."
)
@click.option("--tiling", type=click.Choice(["none", "fast", "moderate", "full"]))
@click.option("--workspace-gb", type=float, help="Memory that a kernel may use for itself, in GB.")
@click.option(
    "--target",
    "targets",
    multiple=True,
    help="TensorRT-RTX: a GPU generation such as sm89, repeatable [all].",
)
@click.option("--version-compatible", is_flag=True, default=None, help="For newer versions too.")
@click.option(
    "--hardware-compatible", is_flag=True, default=None, help="For every GPU from Ampere on."
)
@click.option(
    "--same-compute-capability",
    is_flag=True,
    default=None,
    help="TensorRT: for every GPU of this one's compute capability.",
)
@click.option("--max-tactics", type=int, help="Kernels to time where there is a choice.")
@click.option("--l2-limit-mb", type=float, help="L2 cache that --tiling may count on, in MB.")
@click.option("--max-aux-streams", type=int, help="Streams beside the caller's; 0 for none.")
@click.option(
    "--build-route", metavar="SETTINGS", help="TensorRT: -name=value settings of its compiler."
)
@click.option(
    "--editable-timing-cache",
    is_flag=True,
    default=None,
    help="TensorRT: measure by keys that `cache tactics` lists (not run on a GPU so far).",
)
@click.option(
    "--tactic",
    "tactics",
    multiple=True,
    metavar="KEY=HASH",
    help="TensorRT: build this tactic for that key of the editable timing cache, repeatable.",
)
@click.option(
    "--weight-streaming", is_flag=True, default=None, help="Weights may stay in host memory."
)
@click.option("--tf32", is_flag=True, default=None, help="Round float32 products to TF32.")
@click.option("--refittable", is_flag=True, default=None, help="`refit` can change the weights.")
@click.option(
    "--strip-weights", is_flag=True, default=None, help="Leave the weights out of the engine file."
)
@click.option(
    "--attention-plugin",
    is_flag=True,
    default=None,
    help="TensorRT: decoupled attention as CUDA kernels (not run on a GPU so far).",
)
@click.option("--log", type=FILE, help="Write every event as a line of JSON to this file.")
def build(
    export_folder: str,
    backend: str,
    cache: Path | None,
    threads: int | None,
    modules: tuple[str, ...],
    log: Path | None,
    **given: Any,
) -> None:
    """Build the engines of an export into the cache; `generate` then starts without building.

    TensorRT-RTX builds on a machine without a GPU too, for machines with one. Ctrl-C stops a build
    at once and leaves nothing half-made.
    """
    export = Export.open(export_folder)
    manifest = export.manifest
    for name in modules:
        export.module(name)
    store = EngineCache(cache)
    screen = console()
    line = timed_lines(screen)
    with build_display(screen, log) as display:
        builder = make_builder(
            manifest,
            backend,
            threads=threads,
            options=build_options(given, manifest.vae_scale_factor),
            cache=store,
            on_event=display.event,
        )
        for name in modules or manifest.modules:
            module = manifest.modules[name]
            seconds = store.expected_seconds(module, builder)
            display.start_module(name, seconds)
            engine, place = store.get(module, export.folder, builder, line)
            size = sum(f.bytes for f in engine.files) / 2**20
            facts = {"megabytes": size, "seconds": engine.build_seconds, "folder": str(place)}
            display.end_module(name, facts | engine.report.model_dump(mode="json"))
            line(f"{name}: {size:.1f} MB, built in {engine.build_seconds:.1f} s")
            click.echo(str(place))


def build_options(given: Mapping[str, Any], scale_factor: int) -> dict[str, Any]:
    """A builder's options from what was given on the command line, nothing else.

    Sizes become latent sizes (height, width) through the VAE's pixels per latent.
    """
    options = {
        name: value
        for name, value in given.items()
        if value not in (None, ()) and name not in ("sizes", "dynamic", "max_requests")
    }
    if given["sizes"]:
        options["latent_sizes"] = tuple(_latents(size, scale_factor) for size in given["sizes"])
    if given["dynamic"]:
        smallest, dots, largest = given["dynamic"].partition("..")
        if not dots:
            raise InvalidRequest(
                f"--dynamic is {given['dynamic']!r}.", "Write e.g. 512x512..1024x1024."
            )
        options["dynamic"] = DynamicProfile.checked(
            smallest=_latents(smallest, scale_factor),
            largest=_latents(largest, scale_factor),
            max_requests=given["max_requests"] or 4,
        )
    return options


def _latents(size: str, scale_factor: int) -> tuple[int, int]:
    width, height = parse_size(size)
    if width % scale_factor or height % scale_factor:
        raise InvalidRequest(
            f"{size} does not fit the model.",
            f"Width and height must be multiples of {scale_factor} pixels.",
        )
    return height // scale_factor, width // scale_factor
