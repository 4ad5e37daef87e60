"""What a report says against itself, and what it knows of the machine."""

import sys
from types import SimpleNamespace

import numpy as np
import pynvml
import pytest

from fastface_trt.bench.report import Distribution
from fastface_trt.bench.run import notes
from fastface_trt.bench.tables import markdown
from fastface_trt.measure import machine as gpu
from tests.bench.reports import gpu as gpu_state
from tests.bench.reports import make_case, make_environment, make_report, state


def case(samples):
    return make_case().model_copy(update={"seconds": Distribution.of(samples)})


def said(samples, **environment):
    return " ".join(notes([case(samples)], make_environment(**environment), None))


STEADY = 0.1 + 0.001 * np.random.default_rng(0).random(200)


def test_a_quiet_run_says_nothing():
    assert said(STEADY) == ""


def test_outliers_are_said_and_stay_in_the_numbers():
    samples = [*STEADY, 0.5]
    assert "1 of 201 calls lie outside Tukey's fences, the farthest at 500.0 ms" in said(samples)
    assert case(samples).seconds.maximum == 0.5


def test_a_machine_that_slows_down_is_said():
    words = said([*STEADY[:100], *(1.1 * STEADY[:100])])
    assert "the second half of the calls was 10% slower than the first" in words
    assert "faster" in said([*(1.1 * STEADY[:100]), *STEADY[:100]])


def test_company_and_throttling_are_said():
    assert "something else was running" in said(STEADY, start=state(load_average=1.5))
    assert "own threads count" in said(STEADY, end=state(load_average=3.0))
    hot = state(gpu=gpu_state(throttled=("power limit", "heat (driver)")))
    words = said(STEADY, end=hot)
    assert "Test GPU was throttled after the calls: power limit, heat (driver)." in words


def test_few_samples_are_said():
    assert "as few as 20 samples" in said(STEADY[:20])


def test_unet_samples_are_told_of_what_was_measured():
    report = make_report(("plain", "dcg"))
    measured = report.model_copy(
        update={"cases": tuple(case for case in report.cases if case.preset == "dcg")}
    )
    _, _, table = markdown(measured, ()).partition("## UNet samples per step")
    rows = [line.split("|") for line in table.partition("##")[0].splitlines() if "+ti" in line]
    assert [(row[1].strip(), row[2].strip()) for row in rows] == [("dcg", report.work.plan)]


@pytest.fixture
def nvml(monkeypatch):
    """NVML with one GPU: every name is looked up on the real binding."""
    reasons = pynvml.nvmlClocksEventReasonSwPowerCap | pynvml.nvmlClocksThrottleReasonGpuIdle
    answers = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetHandleByUUID": lambda name: name,
        "nvmlDeviceGetName": lambda device: f"GPU {device}",
        "nvmlSystemGetDriverVersion": lambda: b"999.1",
        "nvmlDeviceGetClockInfo": lambda device, kind: 1000 + kind,
        "nvmlDeviceGetPowerUsage": lambda device: 123456,
        "nvmlDeviceGetCurrentClocksEventReasons": lambda device: reasons,
        "nvmlDeviceGetComputeRunningProcesses": lambda device: [
            SimpleNamespace(pid=1, usedGpuMemory=5),
            SimpleNamespace(pid=gpu.os.getpid(), usedGpuMemory=2**30),
        ],
    }

    def missing(*arguments):
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    class Double:
        def __getattr__(self, name):
            real = getattr(pynvml, name)
            called = callable(real) and not isinstance(real, type)
            return answers.get(name, missing) if called else real

    monkeypatch.setitem(sys.modules, "pynvml", Double())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return answers


def test_the_gpu_is_asked_and_may_not_answer(nvml, monkeypatch):
    found = gpu.gpu_state()
    assert (found.name, found.driver, found.watts) == ("GPU 0", "999.1", 123.456)
    assert (found.sm_megahertz, found.memory_megahertz) == (1001, 1002)
    assert found.celsius is None
    assert found.throttled == ("power limit",)
    assert gpu.gpu_bytes() == 2**30
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    assert gpu.gpu_state().name == "GPU 3"


def test_without_a_gpu_there_is_nothing_to_say(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gpu.gpu_state() is None
    assert gpu.gpu_bytes() is None
