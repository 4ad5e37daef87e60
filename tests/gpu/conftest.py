"""Tests of a real GPU: which backend they ask, and the file that says what they found.

FASTFACE_TEST_BACKEND names the backend (`onnxruntime-cuda`). With `onnxruntime` they run on the CPU
as far as that means anything, which is how they themselves are tested. What they measure goes to
benchmarks/results/gpu-<machine>.json, or to the file that FASTFACE_TEST_RESULTS names.
"""

import json
import os
import platform
import re
import shutil
from datetime import date
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CPU = "onnxruntime"
BACKEND = os.environ.get("FASTFACE_TEST_BACKEND", "onnxruntime-cuda")
_RESULTS = pytest.StashKey[dict]()


def pytest_configure(config):
    config.stash[_RESULTS] = {}


@pytest.fixture(scope="session")
def backend():
    """The name of the backend under test; skips, saying why, where it does not run."""
    from fastface_trt.engines.backends import probe_backends

    status = next((one for one in probe_backends() if one.name == BACKEND), None)
    if status is None:
        pytest.fail(f"FASTFACE_TEST_BACKEND names {BACKEND}, which is no backend.")
    if not status.works:
        pytest.skip(f"{BACKEND} does not run here: {status.detail}")
    return BACKEND


@pytest.fixture(scope="session")
def on_gpu(backend):
    """Skips where only a GPU means anything."""
    if backend == CPU:
        pytest.skip("This test means something on a GPU only.")


@pytest.fixture
def record(request):
    """Keeps numbers of this test for the machine's file: `record(name=value)`."""
    numbers = request.config.stash[_RESULTS].setdefault(request.node.nodeid, {})
    return lambda **found: numbers.update(found)


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """An engine cache of the whole run, deleted with it: it comes to hold 20 GB."""
    from fastface_trt.engines.cache import EngineCache

    folder = tmp_path_factory.mktemp("engines")
    yield EngineCache(folder)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def cpu(backend, store):
    """The mini model on the CPU."""
    from fastface_trt import FastFace

    with FastFace.load("mini", backend=CPU, cache=store.root) as loaded:
        loaded.warm_up()
        yield loaded


@pytest.fixture(scope="session")
def tested(backend, store):
    """The mini model on the backend under test."""
    from fastface_trt import FastFace

    with FastFace.load("mini", backend=backend, cache=store.root) as loaded:
        loaded.warm_up()
        yield loaded


@pytest.fixture(scope="session")
def face(cpu):
    from fastface_trt.mini.folders import SAMPLE_FACES

    return cpu.analyze(SAMPLE_FACES / "ada.png")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if Path(__file__).parent in item.path.parents and (call.when == "call" or not report.passed):
        numbers = item.config.stash[_RESULTS].setdefault(item.nodeid, {})
        numbers |= {"outcome": report.outcome, "seconds": round(report.duration, 3)}
        if report.skipped:
            numbers["reason"] = report.longrepr[2].removeprefix("Skipped: ")
    return report


def pytest_sessionfinish(session):
    results = session.config.stash[_RESULTS]
    named = os.environ.get("FASTFACE_TEST_RESULTS")
    ran = any(one.get("outcome") != "skipped" for one in results.values())
    if not ran or not (named or BACKEND != CPU):
        return
    from fastface_trt import __version__
    from fastface_trt.engines.hardware import cuda_driver, cuda_hardware
    from fastface_trt.measure.machine import describe_machine

    gpu = {} if BACKEND == CPU else cuda_hardware() | cuda_driver()
    name = re.sub("[^a-z0-9]+", "-", gpu.get("gpu", platform.node()).lower()).strip("-")
    path = Path(named) if named else ROOT / "benchmarks" / "results" / f"gpu-{name}.json"
    facts = {
        "date": date.today().isoformat(),
        "fastface_trt": __version__,
        "backend": BACKEND,
        "machine": describe_machine() | gpu,
        "seconds": round(sum(one.get("seconds", 0) for one in results.values()), 1),
        "tests": {key.partition("gpu/")[2]: one for key, one in results.items()},
    }
    path.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
