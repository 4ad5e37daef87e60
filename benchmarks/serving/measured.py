"""The three ways on the mini model, over the same list of requests that are all there at once."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from threading import Event as Flag
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers.measure import run_rounds
from benchmarks.serving.machine import Machine
from benchmarks.serving.servers import SERVERS, Arrival, Limits
from benchmarks.serving.simulation import PRESETS, STEPS
from fastface_trt import FastFace
from fastface_trt.measure.statistics import Ratio
from fastface_trt.runtime.face import Face
from fastface_trt.runtime.request import GenerationRequest
from fastface_trt.serving.batching import Batcher
from fastface_trt.serving.batching.loop import blank_face
from fastface_trt.serving.settings import WorkerSettings
from fastface_trt.serving.work import Event, PictureDone, StepDone, Task

PROMPTS = ("photo; a person in a garden", "painting; a person", "photo; a person, smiling")
WARM_UP = 1
PATIENCE = 600.0

Pictures = list[NDArray[np.uint8]]


@dataclass(frozen=True)
class Work:
    """A list of requests with their faces; `name` says of which presets."""

    name: str
    requests: Sequence[GenerationRequest]
    faces: Sequence[Face]


@dataclass(frozen=True)
class Result:
    """Seconds of each round by way, ratios to one by one, and what the simulation said of them.

    calls, rows: UNet calls and rows of one continuous round. difference: levels of 255 at most
    between the pictures of the ways.
    """

    work: str
    requests: int
    seconds: dict[str, list[float]]
    speed: dict[str, Ratio]
    predicted: dict[str, float]
    calls: int
    rows: int
    difference: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        pictures = {name: self.requests / median(seconds) for name, seconds in self.seconds.items()}
        return asdict(self) | {"pictures_per_second_median": pictures}


def make_works(fastface: FastFace, count: int) -> list[Work]:
    """The presets mixed evenly, and one preset alone, which shares most."""

    def work(name: str, presets: Sequence[str]) -> Work:
        requests = [
            fastface.request(
                PROMPTS[n % len(PROMPTS)], preset=presets[n % len(presets)], seed=n, steps=STEPS
            )
            for n in range(count)
        ]
        return Work(name, requests, [blank_face(n % 3) for n in range(count)])

    return [work("presets mixed", PRESETS), work("am1+dcg only", ("am1+dcg",))]


class Collected:
    """Pictures of a batcher's tasks; waits for the last one."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._pictures: dict[str, NDArray[np.uint8]] = {}
        self._error: Exception | None = None
        self._done = Flag()

    def __call__(self, event: Event) -> None:
        """Take an event; called by the batcher."""
        if isinstance(event, StepDone):
            return
        if isinstance(event, PictureDone):
            self._pictures[event.id] = event.pixels
        else:
            self._error = event.error
        if self._error is not None or len(self._pictures) == self._count:
            self._done.set()

    def wait(self) -> Pictures:
        """All pictures in the order of their ids; raises what a task failed with."""
        if not self._done.wait(PATIENCE):
            raise TimeoutError(f"The batcher needed more than {PATIENCE:g} s.")
        if self._error is not None:
            raise self._error
        return [self._pictures[str(n)] for n in range(self._count)]


def compare(
    fastface: FastFace, work: Work, machine: Machine, limits: Limits, rounds: int
) -> Result:
    """Run every way in every round, after a warm-up; the batcher lives through all of them."""
    made: dict[str, Pictures] = {}
    count = len(work.requests)
    settings = WorkerSettings(
        max_waiting=count,
        max_running=limits.max_running,
        max_rows=limits.max_rows,
        max_passed_over=limits.max_passed_over,
    )

    def in_batches(size: int) -> Pictures:
        pictures: Pictures = []
        for start in range(0, count, size):
            part = slice(start, start + size)
            result = fastface.generate(
                work.requests[part], work.faces[part], max_rows=limits.max_rows
            )
            pictures += [np.asarray(image) for image in result.images]
        return pictures

    with Batcher(fastface, settings) as batcher:

        def batched() -> Pictures:
            collected = Collected(count)
            for n, (request, face) in enumerate(zip(work.requests, work.faces, strict=True)):
                batcher.submit(Task(str(n), request, face), collected)
            return collected.wait()

        def keep(name: str, way: Callable[[], Pictures]) -> Callable[[], None]:
            def run() -> None:
                made[name] = way()

            return run

        names = list(SERVERS)
        ways = (lambda: in_batches(1), lambda: in_batches(limits.max_running), batched)
        calls = {name: keep(name, way) for name, way in zip(names, ways, strict=True)}
        # What is kept of prompts and faces is dropped, so that nobody finds another's encodings.
        before = dict.fromkeys(calls, fastface.forget)
        run_rounds(calls, before, WARM_UP)
        started = batcher.load()
        seconds = run_rounds(calls, before, rounds)
        load = batcher.load()
    reference = names[0]
    return Result(
        work.name,
        count,
        seconds,
        {name: Ratio.paired(seconds[reference], seconds[name]) for name in names},
        predict(work, machine, limits),
        (load.calls - started.calls) // rounds,
        (load.rows - started.rows) // rounds,
        max(_difference(made[reference], made[name]) for name in names),
    )


def predict(work: Work, machine: Machine, limits: Limits) -> dict[str, float]:
    """The simulation's ratios for this list; encodings are kept, so preparing costs nothing."""
    machine, limits = replace(machine, preparation=0.0), replace(limits, max_waiting=10**6)
    arrivals = [
        Arrival(n, 0.0, tuple(len(step.branches) for step in request.guidance_steps()))
        for n, request in enumerate(work.requests)
    ]
    ends = {name: server(arrivals, machine, limits).end for name, server in SERVERS.items()}
    return {name: ends["one by one"] / end for name, end in ends.items()}


def _difference(first: Pictures, second: Pictures) -> int:
    return max(
        int(np.abs(a.astype(np.int16) - b).max()) for a, b in zip(first, second, strict=True)
    )
