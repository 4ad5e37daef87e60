"""`bench compare`: ratios, what is told apart, and what is refused."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

from fastface_trt.bench.compare import compare, comparison_tables, read_report
from fastface_trt.cli.main import USER_ERROR, cli
from fastface_trt.errors import InvalidRequest
from tests.bench.reports import MACHINE, make_report


def test_ratios_are_those_of_medians_and_a_change_is_seen():
    before, after = make_report(), make_report(slow=1.5, seed=50)
    ratios = compare(before, after)
    assert len(ratios) == 4 * 5  # four cases: the call and four stages
    for one in ratios:
        case = next(case for case in before.cases if case.label == one.case)
        if one.what == "whole call":
            assert one.first == pytest.approx(np.median(case.seconds.samples))
        assert one.ratio == pytest.approx(one.second / one.first)
        assert one.low <= one.ratio <= one.high
        assert one.low <= 1.5 <= one.high or abs(one.ratio / 1.5 - 1) < 0.1
        assert one.distinguishable


def test_runs_of_the_same_are_mostly_not_told_apart():
    ratios = [
        one
        for seed in range(4)
        for one in compare(make_report(seed=100 * seed), make_report(seed=100 * seed + 50))
    ]
    apart = np.mean([one.distinguishable for one in ratios])
    assert apart < 0.15


def test_what_no_stage_covers_has_no_ratio():
    assert "other" not in {one.what for one in compare(make_report(), make_report(seed=1))}


def test_ratios_within_reports_are_set_side_by_side():
    before, after = make_report(), make_report(slow=3, seed=50)
    *_, own = comparison_tables(before, after, compare(before, after))
    assert own.title.startswith("Ratios within each report")
    assert [row[:2] for row in own.rows] == [("plain, fresh / plain, cached", "overlap")]


@pytest.mark.parametrize("what", ["processor", "cores", "gpu"])
def test_other_machines_are_refused(what):
    other = make_report(machine=MACHINE | {what: "another"})
    with pytest.raises(InvalidRequest, match=f"different machines: {what} ") as caught:
        compare(make_report(), other)
    assert "--across-machines" in caught.value.hint
    assert compare(make_report(), other, across_machines=True)


@pytest.mark.parametrize(
    "work", [{"checkpoint": "x"}, {"width": 32}, {"height": 32}, {"steps": 4}, {"plan": "lean"}]
)
def test_other_work_is_refused(work):
    other = make_report(**work)
    with pytest.raises(InvalidRequest, match=f"different work: {next(iter(work))} ") as caught:
        compare(make_report(), other)
    assert "--different-work" in caught.value.hint
    assert compare(make_report(), other, different_work=True)


def test_presets_pair_up_in_order_when_work_may_differ():
    before, after = make_report(("plain",)), make_report(("am1",))
    with pytest.raises(InvalidRequest, match="presets"):
        compare(before, after)
    cases = {one.case for one in compare(before, after, different_work=True)}
    assert "plain, fresh / am1, fresh" in cases


def test_precision_is_what_one_compares():
    assert compare(make_report(), make_report(precision="fp16"))


def run(*arguments):
    return CliRunner().invoke(cli, ["bench", "compare", *map(str, arguments)])


def test_the_command(tmp_path):
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    a.write_text(make_report().model_dump_json())
    b.write_text(make_report(slow=0.5, seed=50).model_dump_json())
    result = run(a, b)
    assert result.exit_code == 0, result.output
    assert "B is faster" in result.stdout
    rows = json.loads(run(a, b, "--json").stdout)
    assert all(row["distinguishable"] and row["ratio"] < 0.7 for row in rows)
    b.write_text(make_report(steps=1).model_dump_json())
    refused = run(a, b)
    assert refused.exit_code == USER_ERROR
    assert refused.stderr.startswith("Error: The reports are of different work: steps 2 and 1.")


@pytest.mark.parametrize("content", [None, "{", "{}", '{"schema_version": 2}'])
def test_what_is_no_report_is_refused_in_a_sentence(tmp_path, content):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InvalidRequest, match=r"a\.json"):
        read_report(path)
    result = run(path, path)
    assert result.exit_code == USER_ERROR
    assert "Traceback" not in result.output
