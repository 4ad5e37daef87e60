"""`evaluate` as a user types it: runs, tables, and one sentence for each mistake."""

import json

import pytest
from click.testing import CliRunner

from fastface_trt.cli.main import cli


def evaluate(*arguments):
    return CliRunner().invoke(cli, ["evaluate", *map(str, arguments)])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    file = folder / "mine.toml"
    file.write_text('title = "Mine"\npairs = 2\n[axes]\nsteps = [1, 2]\n')
    result = evaluate(file, "--out", folder / "run", "--judges", "clip", "--keep", 1)
    assert result.exit_code == 0, result.output
    return folder / "run", result


def test_run_writes_tables_summary_and_the_first_pictures(finished):
    out, result = finished
    assert "## Mine" in result.stdout
    assert (out / "tables.md").read_text() in result.stdout
    summary = json.loads((out / "summary.json").read_text())
    assert [setting["name"] for setting in summary["settings"]] == ["steps=1", "steps=2"]
    assert all(set(setting["metrics"]) == {"clip"} for setting in summary["settings"])
    assert len(list(out.glob("pictures/*/*.png"))) == 2


def test_tables_of_an_unfinished_run(finished):
    out, _ = finished
    lines = (out / "results.jsonl").read_text().splitlines(keepends=True)
    (out / "results.jsonl").write_text("".join(lines[:3]) + lines[3][:20])
    result = evaluate("tables", out)
    assert result.exit_code == 0
    assert "unfinished: at least 1 are there" in result.stdout


def test_list_shows_the_experiments():
    result = evaluate("list")
    assert "presets" in result.stdout
    assert "6 settings" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("preset",), "Did you mean 'presets'"),
        (("presets", "--data", "nowhere"), "There is no data at nowhere"),
        (("presets", "--judges", "idd"), "Unknown judge 'idd'"),
        (("presets", "--pairs", 9, "--all-pairs"), "exclude each other"),
        (("presets", "--clip", "x"), "has judges of its own"),
        (("presets", "--pairs", 2, "--export", "nowhere"), "There is no folder nowhere"),
        (("tables", "nowhere"), "nowhere holds no run"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    result = evaluate(*arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output
    assert not list(tmp_path.glob("out/*/*/results.jsonl"))
