"""The tests of a GPU (`make test-gpu`) themselves: the quick ones on the CPU, and what they say."""

import json
import os
import subprocess
import sys
from pathlib import Path

SUITE = Path(__file__).parent / "gpu"
QUICK = "changing or cpu and plain or batch or dlpack"


def run(results, backend, *arguments):
    environment = os.environ | {
        "FASTFACE_TEST_BACKEND": backend,
        "FASTFACE_TEST_RESULTS": str(results),
    }
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-rs", str(SUITE), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_on_the_cpu_the_quick_ones_pass_and_are_written_down(tmp_path):
    result = run(tmp_path / "cpu.json", "onnxruntime", "-k", QUICK)
    assert result.returncode == 0, result.stdout
    written = json.loads((tmp_path / "cpu.json").read_text())
    assert written["backend"] == "onnxruntime"
    assert written["machine"]["cores"] >= 1
    tests = {name.partition("::")[2]: one for name, one in written["tests"].items()}
    changing = tests["test_row_counts_change_without_changing_results"]
    assert changing["outcome"] == "passed"
    assert set(changing["call_ms"]) == {"1", "2", "3"}
    assert tests["test_pictures_are_those_of_the_cpu[plain]"]["relative_l2"] == 0
    assert tests["test_a_batch_is_what_each_would_be_alone"]["grey_levels"] <= 1


def test_without_the_backend_everything_is_skipped_in_a_sentence(tmp_path):
    result = run(tmp_path / "none.json", "onnxruntime-nv-tensorrt-rtx", "-k", QUICK)
    assert result.returncode == 0, result.stdout
    assert "onnxruntime-nv-tensorrt-rtx does not run here: " in result.stdout
    assert "passed" not in result.stdout
    assert not (tmp_path / "none.json").exists()


def test_a_name_that_is_no_backend_fails(tmp_path):
    result = run(tmp_path / "none.json", "onnxruntime-cudda", "-k", "changing")
    assert result.returncode == 1
    assert "onnxruntime-cudda, which is no backend" in result.stdout
