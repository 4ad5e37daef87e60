"""Threads by measurement, on a clock that the test owns."""

import pytest

from fastface_trt.engines.ort import threads as threads_module
from fastface_trt.engines.ort.threads import (
    THREADS_FILE,
    candidates,
    fastest_threads,
    read_threads,
    write_threads,
)


class Clock:
    """Every run takes as long as its number of threads says."""

    def __init__(self, seconds):
        self.seconds, self.now, self.opened = seconds, 0.0, []

    def prepare(self, threads):
        self.opened.append(threads)

        def run():
            self.now += self.seconds[threads]

        return run


@pytest.mark.parametrize(
    ("cores", "expected"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])]
)
def test_candidates(cores, expected):
    assert list(candidates(cores)) == expected


@pytest.mark.parametrize(
    ("seconds", "best", "opened"),
    [
        ({1: 8.0, 2: 4.0, 4: 2.0, 8: 1.0}, 8, [1, 2, 4, 8]),  # the more the better
        ({1: 8.0, 2: 7.9, 4: 7.8, 8: 7.7}, 1, [1, 2, 4, 8]),  # not worth the others' cores
        ({1: 8.0, 2: 5.0, 4: 9.0, 8: 1.0}, 2, [1, 2, 4]),  # clearly slower: stops looking
    ],
)
def test_fastest(seconds, best, opened):
    clock = Clock(seconds)
    measured = fastest_threads(clock.prepare, 8, lambda: clock.now)
    assert next(iter(measured)) == best
    assert measured == pytest.approx({threads: seconds[threads] for threads in opened})
    assert clock.opened == opened


def test_written_and_read_up_to_the_cores_here(tmp_path, monkeypatch):
    assert read_threads(tmp_path) is None
    monkeypatch.setattr(threads_module, "usable_cores", lambda: 6)
    write_threads(tmp_path, {4: 0.5, 1: 1.0})
    assert read_threads(tmp_path) == 4
    write_threads(tmp_path, {2**31: 0.5})
    assert read_threads(tmp_path) == 6


@pytest.mark.parametrize(
    "text",
    ['{"threads": 0}', '{"threads": -1}', '{"threads": 1.5}', '{"threads": "4"}',
     '{"threads": true}',
     "{}", "[]", "5", "", "[" * 100_000, '{"threads": NaN}', '{"threads": [4]}'],
)  # fmt: skip
def test_a_file_of_nonsense_measured_nothing(tmp_path, text):
    (tmp_path / THREADS_FILE).write_text(text)
    assert read_threads(tmp_path) is None
