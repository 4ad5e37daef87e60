"""`doctor --gpu`: what it compares, that a wrong backend fails, and what it says without a GPU."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

from fastface_trt.cli.main import USER_ERROR, cli
from fastface_trt.engines.cache import EngineCache
from fastface_trt.verify import self_test
from fastface_trt.verify.self_test import REFERENCE, SelfTest
from tests.conftest import GOLDEN


@pytest.fixture(scope="module")
def reference():
    return SelfTest((), EngineCache())._pictures(REFERENCE)


@pytest.fixture
def quick(monkeypatch, reference):
    """Pictures of the reference for every backend, and of `wrong` with a brighter picture."""

    def pictures(self, backend):
        images, seconds = reference
        return {
            name: image * 1.1 if backend == "wrong" else image for name, image in images.items()
        }, seconds

    monkeypatch.setattr(SelfTest, "_pictures", pictures)


def test_the_mini_model_is_the_same_on_the_reference_itself(reference):
    pictures, seconds = reference
    check = SelfTest((REFERENCE,), EngineCache())._mini(REFERENCE, pictures)
    assert check.passed
    assert {name for name in check.numbers if name.startswith("error")} == {
        f"error_{name}" for name in pictures
    }
    assert max(v for n, v in check.numbers.items() if n.startswith("error")) == 0
    assert seconds["picture_seconds_median"] > 0
    assert all(picture.std() > 0.05 for picture in pictures.values())


def test_a_backend_that_makes_other_pictures_fails(quick):
    good, bad = SelfTest((REFERENCE, "wrong"), EngineCache()).run()
    assert good.passed
    assert not bad.passed
    assert "1.0e-01 off" in bad.detail


def test_a_full_size_unet_is_compared_and_timed(quick, tiny_export, monkeypatch):
    test = SelfTest((REFERENCE,), EngineCache(), full_size=tiny_export[0])
    _, one, two, three = test.run()
    assert [c.name for c in (one, two, three)] == [
        f"full-size UNet, {n} branches" for n in (1, 2, 3)
    ]
    assert all(c.passed and c.numbers["unet_seconds_median"] > 0 for c in (one, two, three))
    assert one.numbers["error"] == 0
    outputs = iter(np.full((1, 4), value) for value in (*[1.0] * self_test._RUNS, 2.0))
    monkeypatch.setattr(self_test, "predict", lambda engine, inputs: next(outputs))
    assert not next(iter(test._full_size(REFERENCE, tiny_export[0]))).passed


def test_recorded_cases_are_replayed(quick):
    test = SelfTest((REFERENCE,), EngineCache(), recording=GOLDEN / "pipeline")
    _, replayed = test.run()
    assert replayed.passed, replayed.detail
    assert 0 < replayed.numbers["error"] < self_test.REPLAY_TOLERANCE


def test_a_backend_without_its_gpu_is_a_failed_check_and_a_report(quick, tmp_path, monkeypatch):
    def refuse(self, backend, expected):
        from fastface_trt.errors import BackendUnavailable

        raise BackendUnavailable("There is no GPU.", "Get one.")

    monkeypatch.setattr(SelfTest, "_mini", refuse)
    file = tmp_path / "reports" / "gpu.json"
    result = CliRunner().invoke(
        cli, ["doctor", "--gpu", "--backend", REFERENCE, "--out", str(file)]
    )
    assert result.exit_code == 1
    assert "There is no GPU." in result.output
    report = json.loads(file.read_text())
    assert [check["passed"] for check in report["checks"]] == [False]
    assert report["machine"]["machine"]


def test_without_a_gpu_there_is_nothing_to_test(monkeypatch):
    from fastface_trt.cli import doctor
    from fastface_trt.engines.backends import BackendStatus

    nothing = [BackendStatus("tensorrt", False, "", "no NVIDIA GPU and driver")]
    monkeypatch.setattr(doctor, "probe_backends", lambda: nothing)
    result = CliRunner().invoke(cli, ["doctor", "--gpu"])
    assert result.exit_code == USER_ERROR
    assert "nothing to test" in result.output
    assert "tensorrt: no NVIDIA GPU" in result.output
    result = CliRunner().invoke(cli, ["doctor", "--gpu", "--backend", "tensort"])
    assert "Did you mean 'tensorrt'" in result.output
