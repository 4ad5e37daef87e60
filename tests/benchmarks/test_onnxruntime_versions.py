"""The matrix of onnxruntime versions: what it covers, and what it says when a cell fails."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from packaging.requirements import Requirement

from benchmarks import onnxruntime_versions as matrix
from benchmarks.onnxruntime_versions import BOUNDS, MATRIX, RESULTS, ROOT, Cell

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DEPENDENCIES = {
    requirement.name: requirement
    for requirement in map(
        Requirement,
        tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"],
    )
}


def lower_bound(name):
    (bound,) = [one.version for one in DEPENDENCIES[name].specifier if one.operator == ">="]
    return bound


def test_the_bounds_of_the_package_are_those_that_are_run():
    (_, oldest, beside), (_, newest) = BOUNDS
    assert oldest.startswith(lower_bound("onnxruntime") + ".")
    assert beside == f"onnx=={lower_bound('onnx')}.0"
    assert all(DEPENDENCIES["onnxruntime"].specifier.contains(cell[1]) for cell in MATRIX)
    assert newest == max((cell[1] for cell in MATRIX), key=lambda v: tuple(map(int, v.split("."))))


def test_the_results_are_of_this_matrix_and_every_cell_that_ran_passed():
    cells = json.loads(RESULTS.read_text())["cells"]
    assert [(cell["python"], cell["onnxruntime"]) for cell in cells] == [c[:2] for c in MATRIX]
    assert {cell["onnxruntime"]: cell["reason"] for cell in cells if not cell["passed"]} == {}
    for cell in cells:
        assert cell["versions"]["onnxruntime"] == cell["onnxruntime"]
        assert cell["versions"]["python"].startswith(cell["python"])
        assert all(matrix.is_close(**numbers) for numbers in cell["pictures"].values())


def test_an_interpreter_is_one_that_runs(monkeypatch, tmp_path):
    here = ".".join(map(str, sys.version_info[:2]))
    assert matrix.find_python(here) is not None
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    shim = tmp_path / "python3.99"
    shim.write_text("#!/bin/sh\nexit 127\n")
    shim.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert matrix.find_python("3.99") is None


def failing(says):
    def run(*command):
        raise subprocess.CalledProcessError(1, command, stderr=says)

    return run


@pytest.mark.parametrize(
    ("says", "reason"),
    [
        ("WARNING: x\nERROR: No matching distribution\nhint", "ERROR: No matching distribution"),
        ("a line\n  the last one\n", "the last one"),
    ],
)
def test_a_cell_says_why_it_failed(monkeypatch, tmp_path, says, reason):
    monkeypatch.setattr(matrix, "find_python", lambda version: Path(sys.executable))
    monkeypatch.setattr(matrix, "_run", failing(says))
    cell = Cell("3.11", "1.20.1")
    matrix.run_cell(cell, tmp_path / "a.whl", tmp_path)
    assert (cell.ran, cell.passed, cell.reason) == (True, False, reason)


def test_a_missing_python_is_said_and_no_failure(monkeypatch, tmp_path):
    monkeypatch.setattr(matrix, "build_wheel", lambda folder: folder / "a.whl")
    monkeypatch.setattr(matrix, "find_python", lambda version: None)
    out = tmp_path / "out.json"
    result = CliRunner().invoke(matrix.main, ["--bounds", "--out", str(out)])
    assert result.exit_code == 0
    assert "not run" in result.stdout
    cells = json.loads(out.read_text())["cells"]
    assert [cell["reason"] for cell in cells] == ["no Python 3.11 here"] * 2

    def fails(cell, wheel, folder):
        cell.ran, cell.reason = True, "a picture is not the golden one"

    monkeypatch.setattr(matrix, "run_cell", fails)
    assert CliRunner().invoke(matrix.main, ["--only", "1.32.0"]).exit_code == 1
