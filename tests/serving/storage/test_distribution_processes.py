"""Processes that obtain at once, or are killed in the middle of it."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("fsspec")

from fastface_trt.serving.storage.distribution import obtain, publish
from tests.serving.small_export import write_small_export

CHILD = Path(__file__).with_name("obtain_until_killed.py")
ENOUGH = 10**12


def start(address, home, bytes_to_read):
    command = [sys.executable, str(CHILD), f"hanging://{address}", str(home), str(bytes_to_read)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def contents(folder):
    files = (path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture
def export(tmp_path):
    return write_small_export(tmp_path / "export")


def test_killed_in_the_middle_of_a_file_it_goes_on(export, tmp_path):
    home = tmp_path / "home"
    address = publish(export, str(tmp_path / "storage"))
    sizes = []
    for _ in range(3):
        with start(address, home, 800_000) as child:
            assert child.stdout.readline() == "hangs\n"
            child.kill()
        assert not list(home.glob("exports/*/*"))
        for file in home.glob("objects/*"):
            if file.suffix != ".part":
                assert hashlib.sha256(file.read_bytes()).hexdigest() == file.name
        sizes += [file.stat().st_size for file in home.glob("objects/*.part")]
    assert len(sizes) == 3
    assert 0 < sizes[0] < sizes[1] < sizes[2]
    assert contents(obtain(str(address), home=home).folder) == contents(export)


def test_two_at_once_read_everything_once(export, tmp_path):
    home = tmp_path / "home"
    address = publish(export, str(tmp_path / "storage"))
    with start(address, home, 400_000) as first:
        assert first.stdout.readline() == "hangs\n"
        # The first holds the file; the second waits for it, until the first is gone.
        with start(address, home, ENOUGH) as second:
            first.kill()
            assert contents(second.stdout.readline().strip()) == contents(export)
            assert second.wait(60) == 0
    children = [start(address, tmp_path / "fresh", ENOUGH) for _ in range(2)]
    for child in children:
        with child:
            assert contents(child.stdout.readline().strip()) == contents(export)
    assert not list((tmp_path / "fresh").glob("exports/.*"))
