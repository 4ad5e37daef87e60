"""The GPU benchmark as far as it goes without one: its refusal, its inputs and its check."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.attention_kernel import (
    SETTINGS,
    TOLERANCE,
    Case,
    Gpu,
    cases,
    inputs_of,
    relative_error,
)
from fastface_trt.errors import BackendUnavailable
from tests.engines.kernels.emulated import COMPILER, EmulatedAttention

ROOT = Path(__file__).parents[3]


def has_gpu():
    try:
        Gpu()
    except BackendUnavailable:
        return False
    return True


def test_without_a_gpu_it_says_so_in_one_sentence(tmp_path):
    if has_gpu():
        pytest.skip("this machine has a GPU")
    command = [sys.executable, "-m", "benchmarks.attention_kernel", "--out", tmp_path / "x.json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "needs an NVIDIA GPU" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_every_asked_for_shape_is_there():
    listed = list(cases())
    assert len(listed) == len(set(listed)) == 4 * 3 * 3 * len(SETTINGS)
    assert {case.requests for case in listed} == {1, 4}


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler (g++) on this machine")
def test_its_check_accepts_the_kernel_and_refuses_a_wrong_result(tmp_path):
    emulated = EmulatedAttention(tmp_path, np.float16)
    for setting in SETTINGS:
        case = Case(setting, rows=6, heads=1, positions=40)
        inputs = inputs_of(case, head_size=16)
        output = emulated(*inputs)
        assert relative_error(case, inputs, output) < TOLERANCE
        assert relative_error(case, inputs, output * np.float16(1.01)) > TOLERANCE
        other = replace(case, setting="off" if setting != "off" else "scale_power")
        assert relative_error(other, inputs, output) > TOLERANCE
