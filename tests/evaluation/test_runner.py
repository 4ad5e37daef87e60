"""Runs on the mini model: killed and continued, refused when they differ, and what they record."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastface_trt import FastFace
from fastface_trt.errors import InvalidRequest, NoFaceFound
from fastface_trt.evaluation.data import Dataset
from fastface_trt.evaluation.experiment import load_experiment
from fastface_trt.evaluation.mini import mini_dataset, mini_judges
from fastface_trt.evaluation.results import held_folder, read_results, read_run
from fastface_trt.evaluation.runner import RunOptions, pixel_distance, run_experiment
from fastface_trt.evaluation.tables import write_tables

PAIRS, BATCH = 6, 4
OPTIONS = RunOptions(batch=BATCH, keep=100)
EXPERIMENT = """
title = "Two settings"
pairs = 6
baseline = {plan = "exact"}
pixels = true
[fixed]
preset = "dcg"
steps = 2
[axes]
plan = ["lean", "exact"]
"""


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    file = tmp_path_factory.mktemp("experiment") / "two.toml"
    file.write_text(EXPERIMENT)
    return str(file)


@pytest.fixture(scope="module")
def data():
    return mini_dataset(PAIRS)


@pytest.fixture(scope="module")
def judges():
    return list(mini_judges().values())


@pytest.fixture(scope="module")
def whole(experiment, data, judges, tmp_path_factory):
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run_experiment(load_experiment(experiment), data, judges, out, OPTIONS)
    return out


def content(folder):
    """Everything of a run but times: results as they are ordered, and the pictures' bytes."""
    lines = [result.model_dump(exclude={"seconds"}) for result in read_results(folder)]
    files = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*.png")}
    return lines, files


def run_again(experiment, data, judges, out):
    done = []
    run_experiment(
        load_experiment(experiment), data, judges, out, OPTIONS, on_batch=lambda *x: done.append(x)
    )
    return done


def test_killed_run_continues_to_the_same_pictures_and_numbers(
    whole, experiment, data, judges, tmp_path
):
    out = tmp_path / "run"
    script = Path(__file__).with_name("run_until_killed.py")
    arguments = [experiment, str(out), str(PAIRS), str(BATCH), "2"]
    killed = subprocess.run([sys.executable, str(script), *arguments], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(read_results(out)) == PAIRS  # one setting: two batches of 4 and 2
    done = run_again(experiment, data, judges, out)
    assert done[0] == ("", PAIRS, 2 * PAIRS)  # nothing finished was made again
    assert len(done) == 3
    assert content(out) == content(whole)


@pytest.mark.parametrize(
    ("lines", "bytes_", "left"),  # the last batch has two pairs, the one before it four
    [(0, 1, 10), (0, 40, 10), (1, 0, 10), (1, 9, 10), (2, 9, 6), (4, 0, 6)],
)
def test_torn_end_is_dropped_and_its_batch_made_again(
    whole, experiment, data, judges, tmp_path, lines, bytes_, left
):
    out = tmp_path / "run"
    subprocess.run(["cp", "-r", str(whole), str(out)], check=True)
    results = out / "results.jsonl"
    kept = b"".join(results.read_bytes().splitlines(keepends=True)[: 2 * PAIRS - lines])
    results.write_bytes(kept[: len(kept) - bytes_])
    done = run_again(experiment, data, judges, out)
    assert done[0] == ("", left, 2 * PAIRS)
    assert content(out) == content(whole)


def test_finished_run_is_left_as_it_is(whole, experiment, data, judges):
    before = (whole / "results.jsonl").read_bytes()
    assert run_again(experiment, data, judges, whole) == [("", 2 * PAIRS, 2 * PAIRS)]
    assert (whole / "results.jsonl").read_bytes() == before


def test_pictures_are_those_of_single_requests(whole, data):
    result = next(r for r in read_results(whole) if r.setting == "plan=exact" and r.pair == 5)
    with FastFace.load("mini") as fastface:
        single = fastface(
            result.prompt,
            data.people[result.person],
            preset="dcg",
            num_inference_steps=2,
            seed=result.seed,
        )
    kept = np.asarray(Image.open(whole / result.picture)).astype(int)
    assert np.abs(kept - np.asarray(single.images[0])).max() <= 1
    assert result.unet_samples == single.unet_samples


def test_pixels_are_the_mean_absolute_difference_to_the_baseline(whole):
    by_name = {(r.setting, r.pair): r for r in read_results(whole)}
    for pair in range(PAIRS):
        lean, exact = (by_name[f"plan={plan}", pair] for plan in ("lean", "exact"))
        kept = [np.asarray(Image.open(whole / r.picture), dtype=float) for r in (lean, exact)]
        assert lean.metrics["pixels"] == pytest.approx(np.abs(kept[0] - kept[1]).mean())
        assert exact.metrics["pixels"] == 0
    assert any(by_name["plan=lean", pair].metrics["pixels"] > 0 for pair in range(PAIRS))


def test_pixel_distance_does_not_wrap_around():
    dark, bright = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)
    assert pixel_distance(dark, bright) == 255
    assert pixel_distance(dark, np.zeros((4, 5, 3), np.uint8)) is None


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda e, j: (e.replace("steps = 2", "steps = 3"), j), "settings"),
        (lambda e, j: (e, j[:-1]), "judges"),
        (lambda e, j: (e.replace("Two", "Three"), j), "title"),
    ],
)
def test_another_run_in_the_same_folder_is_refused(whole, judges, data, tmp_path, change, field):
    text, jury = change(EXPERIMENT, judges)
    file = tmp_path / "two.toml"
    file.write_text(text)
    before = {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()}
    with pytest.raises(InvalidRequest, match=f"another {field}"):
        run_experiment(load_experiment(str(file)), data, jury, whole, OPTIONS)
    assert {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()} == before


def test_other_data_and_other_folders_are_refused(whole, experiment, judges, data, tmp_path):
    with pytest.raises(InvalidRequest, match="another pairs"):
        run_experiment(load_experiment(experiment), mini_dataset(7), judges, whole, OPTIONS)
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(InvalidRequest, match=r"holds files but no run\.json"):
        run_experiment(load_experiment(experiment), data, judges, tmp_path, OPTIONS)
    with (
        held_folder(tmp_path / "busy"),
        pytest.raises(InvalidRequest, match="Another process"),
        held_folder(tmp_path / "busy"),
    ):
        pass


def test_damaged_line_is_named(whole, experiment, data, judges, tmp_path):
    out = tmp_path / "run"
    subprocess.run(["cp", "-r", str(whole), str(out)], check=True)
    lines = (out / "results.jsonl").read_text().splitlines()
    lines[2] = lines[2][:50]
    (out / "results.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(InvalidRequest, match="damaged in line 3"):
        run_experiment(load_experiment(experiment), data, judges, out, OPTIONS)


def test_people_without_a_face_are_named_before_the_first_picture(
    experiment, data, judges, tmp_path
):
    blank = np.full((96, 96, 3), 128, np.uint8)
    people = {**data.people, "person-01": blank, "person-03": blank}
    files = {**data.files, "person-01": "photos/b.png", "person-03": "photos/d.png"}
    faceless = Dataset("mini", people, data.pairs, files)
    with pytest.raises(NoFaceFound, match=r"2 source pictures .*photos/b\.png, photos/d\.png"):
        run_experiment(load_experiment(experiment), faceless, judges, tmp_path / "run", OPTIONS)
    assert not (tmp_path / "run" / "results.jsonl").exists()


def test_record_says_what_ran(whole):
    record = read_run(whole)
    assert record.pairs == PAIRS
    assert [s.name for s in record.settings] == ["plan=exact", "plan=lean"]
    assert record.settings[1].baseline == "plan=exact"
    assert record.settings[0].request["alpha"] == [1.0, 1.0]
    assert {column.name for column in record.judges} >= {"id", "clip", "ffc", "pixels"}
    assert len(list((whole / "faces").glob("*.png"))) == PAIRS


def test_tables_and_summary_hold_means_of_the_lines(whole):
    text = write_tables(whole).read_text()
    summary = json.loads((whole / "summary.json").read_text())
    lean = next(s for s in summary["settings"] if s["name"] == "plan=lean")
    results = [r for r in read_results(whole) if r.setting == "plan=lean"]
    exact = {r.pair: r for r in read_results(whole) if r.setting == "plan=exact"}
    known = [r.metrics["clip"] for r in results]
    assert lean["metrics"]["clip"]["mean"] == pytest.approx(np.mean(known), abs=1e-6)
    assert lean["metrics"]["clip"]["n"] == PAIRS
    differences = [r.metrics["clip"] - exact[r.pair].metrics["clip"] for r in results]
    assert lean["metrics"]["clip"]["difference"]["mean"] == pytest.approx(
        np.mean(differences), abs=1e-6
    )
    assert lean["unet_samples"] == results[0].unet_samples == 2
    assert "| plan=lean | plan=exact |" in text
    assert f"{PAIRS} pairs per setting, the same" in text


def test_baselines_run_before_what_is_compared_with_them():
    from fastface_trt.evaluation.experiment import Setting
    from fastface_trt.evaluation.runner import _rounds

    def setting(name, scheduler, baseline):
        return Setting(name, {}, {"scheduler": scheduler}, None, baseline)

    settings = [
        setting("a", "lcm", "a"),
        setting("b", "lcm", "c"),
        setting("c", "hyper", "c"),
        setting("d", "hyper", "a"),
    ]
    rounds = [
        (source.scheduler, [s.name for s in members]) for source, members in _rounds(settings)
    ]
    assert rounds == [("lcm", ["a"]), ("hyper", ["c"]), ("lcm", ["b"]), ("hyper", ["d"])]
