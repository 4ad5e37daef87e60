"""Spans for other programs: NVTX ranges while they last, and a trace file afterwards."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from fastface_trt.errors import MissingDependency
from fastface_trt.runtime.timeline import Ranges, Span


def nvtx_ranges() -> Ranges:
    """Ranges that Nsight Systems shows; raises `MissingDependency` without the package nvtx."""
    try:
        import nvtx
    except ImportError:
        raise MissingDependency(
            "NVTX ranges need the package nvtx.", "pip install 'fastface-trt[bench]'."
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
