"""Spans on a fake clock: they nest, and together they are the whole."""

import threading

import pytest

from fastface_trt.engines.device import HostDevice
from fastface_trt.runtime.timeline import NO_TIMELINE, Recorder


class Clock:
    """Stands still unless told; `tick` seconds pass at every look."""

    def __init__(self, tick=0.0):
        self.now, self.tick = 100.0, tick

    def __call__(self):
        self.now += self.tick
        return self.now


def test_spans_last_as_long_as_their_blocks_and_nest():
    clock = Clock()
    recorder = Recorder(clock)
    with recorder.span("call"):
        clock.now += 1
        with recorder.span("unet", HostDevice(), step=0, branches=3):
            clock.now += 2
        with recorder.span("rest"):
            with recorder.span("inner"):
                clock.now += 4
            clock.now += 8
    inner = {span.name: span for span in recorder.spans()}
    assert [span.name for span in recorder.spans()] == ["unet", "inner", "rest", "call"]
    assert {name: span.seconds for name, span in inner.items()} == {
        "call": 15,
        "unet": 2,
        "rest": 12,
        "inner": 4,
    }
    assert {name: span.depth for name, span in inner.items()} == {
        "call": 0,
        "unet": 1,
        "rest": 1,
        "inner": 2,
    }
    assert {name for name, span in inner.items() if span.leaf} == {"unet", "inner"}
    assert inner["unet"].attributes == {"step": 0, "branches": 3}
    assert (inner["unet"].start, inner["unet"].duration) == (101, 2)
    assert inner["unet"].device_seconds is None


def test_a_span_ends_with_an_error_too():
    clock = Clock()
    recorder = Recorder(clock)

    def fail():
        with recorder.span("call"), recorder.span("stage"):
            clock.now += 1
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    with recorder.span("after"):
        pass
    assert [(s.name, s.depth, s.seconds) for s in recorder.spans()] == [
        ("stage", 1, 1),
        ("call", 0, 1),
        ("after", 0, 0),
    ]


def test_threads_nest_by_themselves():
    recorder = Recorder()
    inside, leave = threading.Event(), threading.Event()

    def work():
        with recorder.span("theirs"):
            inside.set()
            leave.wait()

    thread = threading.Thread(target=work)
    thread.start()
    inside.wait()
    with recorder.span("mine"):
        pass
    leave.set()
    thread.join()
    spans = {span.name: span for span in recorder.spans()}
    assert {span.depth for span in spans.values()} == {0}
    assert all(span.leaf for span in spans.values())
    assert spans["mine"].thread != spans["theirs"].thread


def test_a_profilers_ranges_open_and_close_with_the_spans():
    seen = []

    class Range:
        def __init__(self, label):
            self.label = label

        def __enter__(self):
            seen.append(f"+{self.label}")

        def __exit__(self, *error):
            seen.append(f"-{self.label}")

    recorder = Recorder(ranges=Range)
    with recorder.span("call"), recorder.span("unet", step=1, rows=3):
        pass
    assert seen == ["+call", "+unet step=1 rows=3", "-unet step=1 rows=3", "-call"]


def test_without_a_recorder_nothing_is_made():
    assert NO_TIMELINE.span("a", step=1) is NO_TIMELINE.span("b")
    with NO_TIMELINE.span("a"), NO_TIMELINE.span("a"):
        pass
