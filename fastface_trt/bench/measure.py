"""Calling the pipeline again and again, with a recorder at its stages.

A `Workload` says which ways of calling it are measured, `Measurement` takes turns between them.
Their spans can be shown by other programs: as NVTX ranges while they last, as a trace file after.
"""

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from time import perf_counter
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from fastface_trt.bench.report import (
    BranchPlan,
    Case,
    Distribution,
    Features,
    PairedRatio,
    Stage,
    Throughput,
    Work,
)
from fastface_trt.engines.engine import Progress
from fastface_trt.errors import MissingDependency, install_hint
from fastface_trt.measure.statistics import Ratio
from fastface_trt.runtime.face import Face
from fastface_trt.runtime.guidance import BRANCH_PLANS
from fastface_trt.runtime.guidance import BranchPlan as PlanName
from fastface_trt.runtime.picture_file import encode_picture
from fastface_trt.runtime.pipeline import FaceInput, FastFace
from fastface_trt.runtime.presets import PRESETS
from fastface_trt.runtime.request import GenerationRequest
from fastface_trt.runtime.timeline import Ranges, Recorder, Span

First: TypeAlias = Callable[[str, float], None]
"""Told which case the first call was, a warm-up or not, and its seconds."""

CALL = "call"
"""The span around everything from the call to the bytes of its PNGs."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to call the pipeline; see `report.Case`."""

    preset: str
    features: Features
    requests: int = 1
    concurrency: int = 1


@dataclass(frozen=True, slots=True)
class Workload:
    """The options of a benchmark; sizes in pixels, None for the export's own."""

    presets: tuple[str, ...]
    face: Path
    prompt: str
    steps: int | None = None
    size: tuple[int, int] | None = None
    plan: PlanName = "exact"
    requests: tuple[int, ...] = (1,)
    concurrency: tuple[int, ...] = (1,)
    runs: int = 20
    warm_up: int = 3
    cold_starts: int = 3

    def groups(self) -> Iterator[list[Setting]]:
        """Settings that are measured in turns, so that what disturbs one disturbs all of them.

        First fresh and kept features of every preset, then more requests, then more threads, both
        with kept features.
        """
        first, *more = self.requests
        yield [
            Setting(preset, features, first)
            for preset in self.presets
            for features in ("fresh", "cached")
        ]
        for requests in more:
            yield [Setting(preset, "cached", requests) for preset in self.presets]
        for threads in self.concurrency:
            if threads > 1:
                for preset in self.presets:
                    yield [Setting(preset, "cached", first, threads)]

    def request(self, fastface: FastFace, preset: str, **fields: object) -> GenerationRequest:
        """A request of this workload; raises `UnknownName` or `InvalidRequest`."""
        sizes = {} if self.size is None else {"width": self.size[0], "height": self.size[1]}
        plan = {"plan": self.plan}
        return fastface.request(
            self.prompt, preset=preset, steps=self.steps, **(sizes | plan | fields)
        )

    def work(self, fastface: FastFace) -> Work:
        """What is done, without how often; raises `InvalidRequest` for what cannot be done."""
        manifest = fastface.manifest
        request = self.request(fastface, self.presets[0])
        fastface.stages.check_size(request)
        return Work(
            checkpoint=manifest.checkpoint,
            adapter=manifest.adapter,
            precision=manifest.precision,
            random_weights=manifest.random_weights,
            scheduler=manifest.scheduler["class"],
            width=request.width,
            height=request.height,
            steps=request.steps,
            plan=request.plan,
            presets=self.presets,
        )

    def branch_plans(self, fastface: FastFace) -> list[BranchPlan]:
        """Branches per step of every preset there is, under every branch plan."""
        plans = []
        for preset in PRESETS:
            for plan in BRANCH_PLANS:
                request = self.request(fastface, preset, plan=plan)
                plans.append(
                    BranchPlan(
                        preset=preset,
                        plan=plan,
                        branches=tuple(step.branches for step in request.guidance_steps()),
                        unet_samples=request.unet_samples,
                    )
                )
        return plans


@dataclass(slots=True)
class _Taken:
    """What was taken of one setting: spans per call, UNet rows per call, seconds in all."""

    calls: list[list[Span]] = field(default_factory=list)
    unet_samples: int = 0
    wall_seconds: float = 0.0


class Measurement:
    """Measures the settings of a workload on one `FastFace`, whose engines are open.

    `last_spans` holds the spans of each case's last call, by the case's label, for a trace.
    """

    def __init__(
        self,
        fastface: FastFace,
        workload: Workload,
        progress: Progress = lambda line: None,
        *,
        clock: Callable[[], float] = perf_counter,
        ranges: Ranges | None = None,
        first: First = lambda case, seconds: None,
    ) -> None:
        self.last_spans: dict[str, list[Span]] = {}
        self._fastface, self._workload = fastface, workload
        self._progress, self._clock, self._ranges = progress, clock, ranges
        self._face: Face | None = None
        self._first: First | None = first

    def cases(self) -> list[Case]:
        """Measure every setting."""
        cases = []
        for group in self._workload.groups():
            taken = self._threaded(group[0]) if group[0].concurrency > 1 else self._in_turns(group)
            for setting, one in zip(group, taken, strict=True):
                case = _case(setting, self._workload.warm_up, one)
                self.last_spans[case.label] = one.calls[-1]
                cases.append(case)
                self._progress(f"{case.label}: median {case.seconds.median * 1000:.1f} ms")
        return cases

    def _in_turns(self, group: Sequence[Setting]) -> list[_Taken]:
        taken = [_Taken() for _ in group]
        for run in range(-self._workload.warm_up, self._workload.runs):
            for setting, one in zip(group, taken, strict=True):
                spans, rows = self._call(setting)
                if run >= 0:
                    one.calls.append(spans)
                    one.unet_samples = rows
                    one.wall_seconds += spans[-1].seconds
        return taken

    def _threaded(self, setting: Setting) -> list[_Taken]:
        """Every thread warms up by itself (on a GPU it has its own stream), then all start."""
        runs = max(2, ceil(self._workload.runs / setting.concurrency))
        taken, started = _Taken(), threading.Barrier(setting.concurrency)
        begins: list[float] = []
        ends: list[float] = []

        def work() -> None:
            try:
                for _ in range(self._workload.warm_up):
                    self._call(setting)
            except BaseException:
                started.abort()  # or the others would wait for this one for ever
                raise
            started.wait()
            begins.append(self._clock())
            for _ in range(runs):
                spans, taken.unet_samples = self._call(setting)
                taken.calls.append(spans)
            ends.append(self._clock())

        with ThreadPoolExecutor(setting.concurrency) as pool:
            threads = [pool.submit(work) for _ in range(setting.concurrency)]
        failures = [error for thread in threads if (error := thread.exception()) is not None]
        # What broke the barrier says more than that it broke.
        failures.sort(key=lambda error: isinstance(error, threading.BrokenBarrierError))
        if failures:
            raise failures[0]
        taken.wall_seconds = max(ends) - min(begins)
        return [taken]

    def _call(self, setting: Setting) -> tuple[list[Span], int]:
        """One call, its spans (the whole call is the last) and its UNet rows."""
        workload, fastface = self._workload, self._fastface
        requests = [
            workload.request(fastface, setting.preset, image_index=index)
            for index in range(setting.requests)
        ]
        face: FaceInput = workload.face
        if setting.features == "fresh":
            fastface.forget()
        else:
            face = self._known_face()
        recorder = Recorder(self._clock, self._ranges)

        def encode(image: Image.Image, parameters: Mapping[str, Any]) -> None:
            with recorder.span("png"):
                encode_picture(np.asarray(image), parameters=parameters)

        with recorder.span(CALL), ThreadPoolExecutor(1) as encoder:
            encoded: list[Future[None]] = []
            result = fastface.generate(
                requests,
                [face] * len(requests),
                timeline=recorder,
                on_picture=lambda _, *made: encoded.append(encoder.submit(encode, *made)),
            )
            for one in encoded:
                one.result()
        if self._first is not None:
            tell, self._first = self._first, None
            tell(f"{setting.preset}, {setting.features} features", recorder.spans()[-1].seconds)
        return recorder.spans(), result.unet_samples

    def _known_face(self) -> Face:
        if self._face is None:
            self._face = self._fastface.analyze(self._workload.face)
        return self._face


def stages(calls: Sequence[Sequence[Span]]) -> list[Stage]:
    """Stages of calls that did the same work, in the order in which they ended, then `other`.

    A stage's sample is the sum over the innermost spans of its name and step in that call. `other`
    is the whole call less all stages, by the host's clock; it can be negative where stages overlap:
    on a GPU, which works while the host queues, and of several pictures, whose `png` is made while
    the next one is decoded.
    """
    keys: dict[tuple[str, int | None], list[Span]] = {}
    for span in calls[0]:
        if span.leaf and span.name != CALL:
            keys.setdefault((span.name, span.attributes.get("step")), []).append(span)
    found = []
    covered = np.zeros(len(calls))
    for (name, step), spans in keys.items():
        seconds = [
            sum(
                span.duration
                for span in call
                if span.leaf and span.name == name and span.attributes.get("step") == step
            )
            for call in calls
        ]
        covered += seconds
        rows = [span.attributes["rows"] for span in spans if "rows" in span.attributes]
        found.append(
            Stage(
                name=name,
                step=step,
                branches=max((s.attributes.get("branches", 0) for s in spans), default=0) or None,
                rows=sum(rows) or None,
                calls=len(spans),
                seconds=Distribution.of(seconds),
            )
        )
    whole = np.array([call[-1].seconds for call in calls])
    found.append(Stage(name="other", calls=1, seconds=Distribution.of(whole - covered)))
    return found


def paired_ratios(cases: Sequence[Case]) -> list[PairedRatio]:
    """Ratios of the first group's cases: fresh over cached features, and over the first preset."""
    turns = {
        (case.preset, case.features): case
        for case in cases
        if case.requests == cases[0].requests and case.concurrency == 1
    }
    first = cases[0].preset
    found = []
    for preset in dict.fromkeys(preset for preset, _ in turns):
        found.append(_paired(turns[preset, "fresh"], turns[preset, "cached"]))
        if preset != first:
            found.append(_paired(turns[preset, "cached"], turns[first, "cached"]))
    return found


def _paired(case: Case, over: Case) -> PairedRatio:
    ratio = Ratio.paired(case.seconds.samples, over.seconds.samples)
    return PairedRatio(
        case=case.label, over=over.label, ratio=ratio.median, interval=(ratio.low, ratio.high)
    )


def _case(setting: Setting, warm_up: int, taken: _Taken) -> Case:
    pictures = setting.requests * len(taken.calls)
    return Case(
        preset=setting.preset,
        features=setting.features,
        requests=setting.requests,
        concurrency=setting.concurrency,
        warm_up=warm_up,
        unet_samples=taken.unet_samples,
        seconds=Distribution.of([call[-1].seconds for call in taken.calls]),
        stages=tuple(stages(taken.calls)),
        throughput=Throughput(
            pictures=pictures,
            wall_seconds=taken.wall_seconds,
            pictures_per_second=pictures / taken.wall_seconds,
        ),
    )


def nvtx_ranges() -> Ranges:
    """Ranges that Nsight Systems shows; raises `MissingDependency` without the package nvtx."""
    try:
        import nvtx
    except ImportError:
        raise MissingDependency(
            "NVTX ranges need the package nvtx.", install_hint("bench")
        ) from None
    return lambda label: nvtx.annotate(label, domain="fastface-trt")


def chrome_trace(calls: Mapping[str, Sequence[Span]]) -> dict[str, Any]:
    """Calls by label as Chrome's trace events, which Perfetto (ui.perfetto.dev) opens.

    Each call is a process of its own that starts at 0. Its threads show the host; where work ran on
    a GPU, a second row shows when it ran there. Times are microseconds.
    """
    events: list[dict[str, Any]] = []
    for process, (label, spans) in enumerate(calls.items(), start=1):
        events.append(_named("process_name", process, 0, label))
        origin = min(span.start for span in spans)
        threads = {thread: at for at, thread in enumerate(dict.fromkeys(s.thread for s in spans))}
        for span in sorted(spans, key=lambda one: (one.start, one.depth)):
            row = 2 * threads[span.thread]
            events.append(_event(span, process, row, span.start - origin, span.seconds))
            if span.device_start is not None and span.device_seconds is not None:
                at = span.device_start - origin
                events.append(_event(span, process, row + 1, at, span.device_seconds))
        for number in threads.values():
            events.append(_named("thread_name", process, 2 * number, f"host thread {number}"))
            events.append(_named("thread_name", process, 2 * number + 1, f"GPU stream {number}"))
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {"recorded_by": f"fastface-trt bench, process {os.getpid()}"},
    }


def _event(span: Span, process: int, row: int, start: float, seconds: float) -> dict[str, Any]:
    return {
        "name": span.name,
        "ph": "X",
        "ts": start * 1e6,
        "dur": seconds * 1e6,
        "pid": process,
        "tid": row,
        "args": span.attributes,
    }


def _named(kind: str, process: int, row: int, name: str) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": process, "tid": row, "args": {"name": name}}
