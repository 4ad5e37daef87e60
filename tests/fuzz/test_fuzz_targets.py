import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("atheris")

from tests.fuzz.fuzz_targets import targets

RUNNER = Path(__file__).with_name("run_target.py")
TARGETS = targets()


def fuzz(name, folder, *options):
    """Return code and output of a process that fuzzes one target."""
    command = [sys.executable, RUNNER, name, folder / "corpus", *options]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900)
    return done.returncode, done.stdout + done.stderr


def runs(output):
    """How many inputs were run, as libFuzzer counts them."""
    return int(re.search(r"^Done (\d+) runs", output, re.M)[1])


@pytest.mark.serving
def test_inputs_are_more_than_100_000():
    assert sum(target.runs for target in TARGETS.values()) >= 100_000


@pytest.mark.serving
@pytest.mark.parametrize("name", TARGETS)
def test_nothing_is_found(name, tmp_path):
    code, output = fuzz(name, tmp_path)
    assert code == 0, output[-6000:]
    assert runs(output) == TARGETS[name].runs
    print(f"{name}: {runs(output)} inputs, nothing found")


def test_a_few_inputs_of_the_first_target_run(tmp_path):
    code, output = fuzz("picture", tmp_path, "-runs=500")
    assert code == 0, output[-6000:]
    assert runs(output) == 500
