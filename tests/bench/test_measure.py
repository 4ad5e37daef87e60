"""From spans to stages and cases: sums, order, and what the pipeline is asked for."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from fastface_trt.bench.measure import Measurement, Setting, Workload, paired_ratios, stages
from fastface_trt.mini.folders import SAMPLE_FACES
from fastface_trt.runtime.timeline import Recorder


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def call(clock, first, second, rest):
    """One call's spans: two UNet steps, the second in two parts, and time that no stage covers."""
    recorder = Recorder(clock)
    with recorder.span("call"):
        with recorder.span("unet", step=0, branches=1, rows=2):
            clock.now += first
        for _ in range(2):
            with recorder.span("unet", step=1, branches=3, rows=6):
                clock.now += second / 2
        clock.now += rest
    return recorder.spans()


def test_stages_are_sums_per_call_and_other_is_the_rest():
    clock = Clock()
    found = stages([call(clock, 1, 2, 4), call(clock, 2, 4, 8)])
    assert [(s.label, s.calls, s.rows, s.seconds.samples) for s in found] == [
        ("unet 1, 1 branch", 1, 2, (1, 2)),
        ("unet 2, 3 branches", 2, 12, (2, 4)),
        ("other", 1, None, (4, 8)),
    ]


class Double:
    """Stands for `FastFace`: takes a known time per call, and notes what it was asked."""

    def __init__(self, clock, fail=False):
        self.clock, self.fail = clock, fail
        self.forgotten = 0
        self.asked = []
        self.threads = set()
        self.lock = threading.Lock()

    def request(self, prompt, *, preset, steps, **fields):
        return SimpleNamespace(preset=preset, **fields)

    def forget(self):
        self.forgotten += 1

    def analyze(self, picture):
        return "a known face"

    def generate(self, requests, faces, timeline, on_picture):
        if self.fail:
            raise ValueError("no")
        with self.lock:
            self.asked.append((requests[0].preset, faces[0], [r.image_index for r in requests]))
            self.threads.add(threading.get_ident())
        with timeline.span("unet", step=0, branches=1, rows=len(requests)):
            self.clock.now += len(requests) * (2 if requests[0].preset == "am1" else 1)
        image = Image.fromarray(np.zeros((2, 2, 3), np.uint8))
        for index in range(len(requests)):
            on_picture(index, image, {})
        return SimpleNamespace(unet_samples=4 * len(requests))


def workload(**changes):
    fields = {"presets": ("plain", "am1"), "face": SAMPLE_FACES / "ada.png", "prompt": "p"}
    return Workload(**(fields | {"runs": 3, "warm_up": 2} | changes))


def test_every_setting_is_measured_and_warm_up_is_not_counted():
    clock = Clock()
    double = Double(clock)
    given = workload(requests=(1, 3))
    cases = Measurement(double, given, clock=clock).cases()
    assert [(c.label, c.unet_samples) for c in cases] == [
        ("plain, fresh", 4),
        ("plain, cached", 4),
        ("am1, fresh", 4),
        ("am1, cached", 4),
        ("plain, cached, 3 requests", 12),
        ("am1, cached, 3 requests", 12),
    ]
    assert [c.seconds.median for c in cases] == [1, 1, 2, 2, 3, 6]
    # Encoding has a thread of its own, and is a stage of the call all the same.
    assert [[s.name for s in c.stages] for c in cases] == [["unet", "png", "other"]] * 6
    assert [stage.calls for stage in cases[-1].stages] == [1, 3, 1]
    assert [c.throughput.pictures_per_second for c in cases] == [1, 1, 0.5, 0.5, 1, 0.5]
    assert {c.seconds.n for c in cases} == {3}
    assert double.forgotten == 2 * 5
    # In turns: what disturbs one disturbs its neighbours.
    turn = [
        ("plain", given.face, [0]),
        ("plain", "a known face", [0]),
        ("am1", given.face, [0]),
        ("am1", "a known face", [0]),
    ]
    assert double.asked[:20] == turn * 5
    assert double.asked[20] == ("plain", "a known face", [0, 1, 2])
    ratios = {(r.case, r.over): r.ratio for r in paired_ratios(cases)}
    assert ratios == {
        ("plain, fresh", "plain, cached"): 1,
        ("am1, fresh", "am1, cached"): 1,
        ("am1, cached", "plain, cached"): 2,
    }


def test_threads_call_one_model_and_throughput_counts_all_of_them():
    double = Double(Clock())
    given = workload(presets=("plain",), concurrency=(1, 3), runs=5)
    threaded = Measurement(double, given).cases()[-1]
    assert (threaded.concurrency, threaded.seconds.n) == (3, 6)
    assert threaded.throughput.pictures == 6
    assert len(double.threads) == 4
    rate = threaded.throughput.pictures_per_second
    assert rate == pytest.approx(6 / threaded.throughput.wall_seconds)


def test_a_thread_that_fails_stops_the_others():
    measurement = Measurement(Double(Clock(), fail=True), workload())
    with pytest.raises(ValueError, match="no"):
        measurement._threaded(Setting("plain", "cached", 1, 3))
