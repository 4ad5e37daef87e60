"""Workers share out GPUs and cores."""

import pytest

from fastface_trt.engines.ort.threads import usable_cores
from fastface_trt.errors import BackendUnavailable
from fastface_trt.serving.settings import WorkerSettings
from fastface_trt.serving.workers.placement import place_workers


def visible(settings, count, gpus):
    return [one["CUDA_VISIBLE_DEVICES"] for one in place_workers(settings, count, gpus)[1]]


def test_one_worker_for_each_gpu(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    settings = WorkerSettings(backend="tensorrt")
    assert visible(settings, None, 3) == ["0", "1", "2"]
    assert visible(settings, 3, 2) == ["0", "1", "0"]
    assert visible(settings, 1, 2) == ["0"]


def test_only_the_gpus_that_this_process_may_use(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-8f2a")
    assert visible(WorkerSettings(backend="tensorrt-rtx"), None, 2) == ["3", "GPU-8f2a"]


def test_no_gpu():
    with pytest.raises(BackendUnavailable):
        place_workers(WorkerSettings(backend="tensorrt"), None, 0)


def test_workers_on_the_host_share_its_cores():
    settings, environments = place_workers(WorkerSettings(), 2)
    assert settings.threads == max(1, usable_cores() // 2)
    assert environments == [{}, {}]
    assert place_workers(WorkerSettings())[0].threads is None
    assert place_workers(WorkerSettings(threads=3), 2)[0].threads == 3
