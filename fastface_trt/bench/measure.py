"""Calling the pipeline again and again, with a recorder at its stages."""

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from math import ceil
from time import perf_counter
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from fastface_trt.bench.report import Case, Distribution, PairedRatio, Stage, Throughput
from fastface_trt.bench.statistics import median_interval
from fastface_trt.bench.workload import Setting, Workload
from fastface_trt.engines.engine import Progress
from fastface_trt.pipeline import FaceInput, FastFace
from fastface_trt.runtime.face import Face
from fastface_trt.runtime.picture_file import encode_picture
from fastface_trt.runtime.timeline import Ranges, Recorder, Span

First: TypeAlias = Callable[[str, float], None]
"""Told which case the first call was, a warm-up or not, and its seconds."""

CALL = "call"
"""The span around everything from the call to the bytes of its PNGs."""


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
            workload.request(fastface, setting.preset, picture=picture)
            for picture in range(setting.requests)
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
    ratios = np.array(case.seconds.samples) / np.array(over.seconds.samples)
    return PairedRatio(
        case=case.label,
        over=over.label,
        ratio=float(np.median(ratios)),
        interval=median_interval(ratios),
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
