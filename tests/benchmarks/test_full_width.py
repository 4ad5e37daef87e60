"""The full-width step: its arithmetic, and the whole of it on the mini model."""

import json
from functools import partial

import numpy as np
import pytest
from rich.console import Console

from benchmarks.peers import full_width
from benchmarks.peers.full_width import (
    branch_rows,
    picture_seconds,
    ratio_of_medians,
    run_full_width,
    run_job,
)
from benchmarks.peers.step_jobs import Job, make_inputs
from fastface_trt.errors import EngineFailed


def test_a_picture_needs_ten_of_twelve_samples():
    assert branch_rows() == [2, 3, 3, 2]
    seconds = {"3": [3.0, 30.0, 3.0], "2": [2.0, 2.0, 20.0]}
    assert picture_seconds(seconds, branch_rows()) == 10
    assert picture_seconds(seconds, [3, 3, 3, 3]) == 12


def test_ratios_of_separate_runs_have_the_spread_of_both():
    slow, fast = {"3": [4.0] * 5}, {"3": [2.0] * 5}
    exact = ratio_of_medians(*(partial(picture_seconds, s, [3]) for s in (slow, fast)))
    assert (exact.median, exact.low, exact.high) == (2, 2, 2)
    spread = {"3": [1.0, 2.0, 3.0, 2.0, 2.0]}
    wide = ratio_of_medians(*(partial(picture_seconds, s, [3]) for s in (slow, spread)))
    assert wide.low < wide.median == 2 < wide.high


def test_fewer_rows_are_the_last_of_more():
    """Two branches are i and ti of the three, so the request stays the same."""
    three, two = (make_inputs(rows, 8, 16, 12) for rows in (3, 2))
    assert all(len(a) == 3 for a in three.values() if len(a) != 1)
    for name, array in two.items():
        assert np.array_equal(array, three[name][-len(array) :]), name


def test_a_failing_process_is_one_sentence(tmp_path):
    job = Job("absent", "peer", "mini", 24, str(tmp_path), 1)
    with pytest.raises(EngineFailed, match=r"peer.*absent.*KeyError") as caught:
        run_job(job)
    assert "memory" in caught.value.hint


def test_another_prediction_is_not_reported(tmp_path, monkeypatch):
    def pretend(job):
        if job.kind in ("pytorch", "engine"):
            value = 1.0 if job.kind == "pytorch" else 1.01
            job.write()
            np.save(job.prediction, np.full((3, 4, 8, 8), value, np.float32))
        return {"seconds": {"3": [1.0], "2": [1.0]}, "process_seconds": 1.0, "peak_memory_gb": 1.0}

    monkeypatch.setattr(full_width, "run_job", pretend)
    out = tmp_path / "out.json"
    with pytest.raises(EngineFailed, match=r"differs from PyTorch's by 1.0e-02"):
        run_full_width(out, Console(), model="mini", side=8, work=tmp_path)
    assert not out.exists()


@pytest.mark.long
def test_the_whole_of_it_on_the_mini_model(tmp_path):
    out = tmp_path / "results" / "step.json"
    run_full_width(out, Console(), repeats=2, model="mini", side=24, work=tmp_path)
    facts = json.loads(out.read_text())
    assert facts["rows_per_step"] == [2, 3, 3, 2]
    ours, theirs = facts["peers"]["fastface-trt"], facts["peers"]["pytorch"]
    assert (theirs["samples_per_picture"], ours["samples_per_picture"]) == (12, 10)
    assert 0 < ours["difference"] < full_width.TOLERANCE
    assert len(ours["seconds"]["3"]) == len(theirs["seconds"]["2"]) == 2
    assert theirs["speed_per_sample"]["median"] == 1
    assert "fastface-trt" in out.with_suffix(".md").read_text()
