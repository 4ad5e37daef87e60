"""The benchmark on the simulated GPU: stages that run there are timed by the device."""

import gc

import pytest

from fastface_trt import FastFace
from fastface_trt.bench.measure import Measurement, Workload, chrome_trace
from fastface_trt.mini.folders import SAMPLE_FACES
from tests.engines.gpu_double import simulated_gpu

pytestmark = pytest.mark.usefixtures("quick_collections")

ON_GPU = {"image_encoder", "text_encoder", "text_encoder_2", "unet", "guidance", "vae_decoder"}


def test_stages_are_timed_by_the_device(tmp_path):
    given = Workload(
        presets=("am1+dcg",),
        face=SAMPLE_FACES / "ada.png",
        prompt="photo; person in a garden",
        concurrency=(1, 2),
        runs=1,
        warm_up=1,
    )
    with (
        simulated_gpu("tensorrt") as (cuda, _),
        FastFace.load("mini", backend="tensorrt", cache=tmp_path) as gpu,
    ):
        measurement = Measurement(gpu, given)
        cases = measurement.cases()
        trace = chrome_trace(measurement.last_spans)
        gpu.close()
        del measurement
        gc.collect()
        assert cuda.leaks() == []
    assert [case.concurrency for case in cases] == [1, 1, 2]
    for case in cases:
        for stage in case.stages:
            # A piece of work takes a whole millisecond there, and so does every sum of them.
            pieces = stage.seconds.samples[0] * 1000
            assert (abs(pieces - round(pieces)) < 1e-6) or stage.name not in ON_GPU
            assert stage.name not in ON_GPU or round(pieces) >= 1
    rows = {e["tid"] % 2 for e in trace["traceEvents"] if e["ph"] == "X" and e["name"] == "unet"}
    assert rows == {0, 1}  # when it was queued, and when it ran
