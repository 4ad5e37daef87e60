"""Figures follow from what varies, and show the numbers of the results."""

from math import isnan

import numpy as np
import pytest

from fastface_trt.errors import MissingDependency
from fastface_trt.evaluation import figures as plots
from fastface_trt.evaluation.axes import find_axes, group_along
from fastface_trt.evaluation.figures import choose_figures
from fastface_trt.evaluation.report import choose_sheets, draw_sheet, extremes, findings
from fastface_trt.evaluation.run_view import interval_text, read_view, verdict
from fastface_trt.measure.statistics import Interval
from fastface_trt.measure.style import LIGHT, encode
from tests.evaluation.synthetic_run import (
    JUDGES,
    ablation_settings,
    effect,
    grid_settings,
    pareto_settings,
    setting_name,
    step_settings,
    write_run,
)

THREE = JUDGES[:3]  # id, id_other, clip


def view(folder, settings, **options):
    return read_view(write_run(folder / "run", settings, judges=THREE, **options))


@pytest.mark.parametrize(
    ("settings", "figures", "sheets"),
    [
        (pareto_settings(), {"pareto-id-clip", "curve-ip_adapter_scale"}, set()),
        (grid_settings(), {"grid-alpha-beta"}, {"pictures-alpha-beta"}),
        (
            grid_settings([[1.0] * 4, [1.0, 2.0, 2.0, 1.0]], [[1.0] * 4, [1.0, 3.0, 3.0, 1.0]]),
            {"grid-alpha-beta"},
            {"pictures-alpha-beta"},
        ),
        (step_settings(), {"bars"}, {"strip-beta-1"}),
        (ablation_settings(), {"bars"}, set()),
        ([{"power": p} for p in (1.0, 1.3, 1.6)], {"curve-power"}, set()),
        ([{"power": p} for p in (1.0, 1.3)], {"bars"}, set()),
        (
            [{"dcg_variant": v, "rescale": r} for v in (1, 2, 3) for r in ("off", 0.75)],
            {"bars"},
            set(),
        ),
        (
            [{"preset": "plain"}, *({"raised": "beta", "step": n} for n in (1, 2, 3, 4))],
            {"curve-step"},
            {"strip-step-1"},
        ),
    ],
)
def test_axes_choose_figures(tmp_path, settings, figures, sheets):
    run = view(tmp_path, settings, pairs=3, kept=2)
    assert {figure.key for figure in choose_figures(run)} == figures | {"differences"}
    chosen = {sheet.key for sheet in choose_sheets(run)}
    assert {key for key in chosen if not key.startswith("contact-sheet")} == sheets
    assert any(key.startswith("contact-sheet") for key in chosen)


def test_the_name_of_an_experiment_chooses_nothing(tmp_path):
    run = view(tmp_path, ablation_settings(), pairs=2, kept=0, experiment="pareto", title="α × β")
    assert {figure.key for figure in choose_figures(run)} == {"bars", "differences"}
    assert choose_sheets(run) == []


def test_a_front_shows_means_and_intervals(tmp_path):
    run = view(tmp_path, pareto_settings(), pairs=10, kept=0)
    axis = run.axes["ip_adapter_scale"]
    groups = group_along(run, [axis.name])
    assert [group.label for group in groups] == ["plain", "am1"]
    figure = plots.pareto_front(run, axis, groups, run.judge("clip"), run.judge("id"), LIGHT)
    (axes,) = figure.axes
    drawn = [line for line in axes.lines if not line.get_label().startswith("_")]
    for line, group in zip(drawn, groups, strict=True):
        for x, y, setting in zip(*line.get_data(), group.settings, strict=True):
            scores = [
                [result.metrics[name] for result in run.results[setting.name].values()]
                for name in ("clip", "id")
            ]
            assert (x, y) == pytest.approx(tuple(map(np.mean, scores)))
    assert [text.get_text() for text in axes.texts] == ["0.35", "0.5", "0.8"] * 2
    assert "n = 10 pairs" in figure.get_suptitle()
    assert axes.get_xlabel() == "prompt match [probability] ↑"
    assert encode(figure).startswith(b"\x89PNG")


def test_a_heat_map_has_every_value_in_its_cell(tmp_path):
    run = view(tmp_path, grid_settings(), pairs=4, kept=0)
    group = group_along(run, ("alpha", "beta"))[0]
    axes = run.axes
    figure = plots.heat_maps(run, group, axes["alpha"], axes["beta"], run.judges[:1], LIGHT)
    image = figure.axes[0].images[0].get_array()
    for setting in run.settings:
        row = (1.0, 1.5, 2.0).index(setting.axes["alpha"])
        column = (1.0, 2.0, 3.0).index(setting.axes["beta"])
        ids = [result.metrics["id"] for result in run.results[setting.name].values()]
        assert image[row, column] == pytest.approx(np.mean(ids))


def test_differences_are_paired_and_find_the_true_effect(tmp_path):
    run = view(tmp_path, pareto_settings(), pairs=60, kept=0)
    baselines = {s.name: s.baseline for s in run.settings}
    assert run.by_name[
        baselines[setting_name({"preset": "am1", "ip_adapter_scale": 0.5})]
    ].axes == {
        "preset": "plain",
        "ip_adapter_scale": 0.5,
    }
    for setting in run.compared:
        truth = effect(setting.axes) - effect(run.baseline_of(setting).axes)
        found = run.difference(setting, "id")
        assert found.n == 60
        # The spread of pairs is 0.15, of pictures 0.02: only pairing is as sharp as this.
        assert found.high - found.low < 0.03
        assert abs(found.mean - truth) < 0.015
        assert verdict(found, run.judge("id")) == 1
    assert not {s.name for s in run.compared} & {s.name for s in run.baselines}


def test_constant_judges_are_left_out(tmp_path):
    run = read_view(write_run(tmp_path / "run", ablation_settings(), pairs=4, kept=0))
    assert "ffc" not in {judge.name for judge in run.varying(run.settings)}
    figure = next(one for one in choose_figures(run) if one.key == "bars")
    assert "Left out, because every picture has the same: no face." in figure.caption
    panels = [axes for axes in figure.draw(LIGHT).axes if axes.get_visible()]
    assert [axes.get_title("left") for axes in panels] == [judge[1] for judge in JUDGES[:-1]]


def test_findings_say_what_differs_and_nothing_else(tmp_path):
    run = view(tmp_path, ablation_settings(("plain", "am1", "am2")), pairs=60, kept=0)
    sentences = findings(run)
    (identity,) = [one for one in sentences if one.startswith("ID, same person")]
    assert "2 of 2 settings are better than “plain”, most of all “am1”: +0.0" in identity
    assert "worse" not in identity
    # Presets have no effect on the other two judges.
    for judge in ("ID, other people", "prompt match"):
        (sentence,) = [one for one in sentences if one.startswith(judge)]
        assert "none of 2 settings can be told apart" in sentence
    assert not any("too narrow" in one for one in sentences)
    assert any("too narrow" in one for one in findings(view(tmp_path / "b", ablation_settings())))


def test_best_and_worst_are_by_id(tmp_path):
    run = view(tmp_path, ablation_settings(("plain", "am1")), pairs=10, kept=8)
    plain, top = extremes(run)
    assert (plain.setting.name, top.setting.name) == ("preset=plain", "preset=am1")
    kept = sorted(
        (run.results["preset=am1"][pair].metrics["id"] for pair in range(8)), reverse=True
    )
    assert [result.metrics["id"] for result in top.best] == kept[:4]
    assert [result.metrics["id"] for result in top.worst] == kept[:3:-1]


def test_one_value_has_no_interval(tmp_path):
    run = view(tmp_path, ablation_settings(("plain", "am1")), pairs=1, kept=0)
    difference = run.difference(run.settings[1], "id")
    assert difference.n == 1
    assert isnan(difference.low)
    assert verdict(difference, run.judge("id")) == 0
    assert isnan(run.difference(run.settings[0], "id").mean)


@pytest.mark.parametrize(
    ("interval", "text"),
    [
        (Interval(0.25, 0.125, 0.5, 9), "+0.250 (+0.125 to +0.500)"),
        (Interval(-0.0001, -0.001, 0.0004, 9), "0.000 (-0.001 to 0.000)"),
        (Interval(0.01, 0.00004, 0.02, 9), "+0.01000 (+0.00004 to +0.02000)"),
        (Interval(0.5, float("nan"), float("nan"), 1), "+0.500 (n = 1)"),
        (Interval(float("nan"), float("nan"), float("nan"), 0), "no value"),
    ],
)
def test_intervals_in_words(interval, text):
    assert interval_text(interval, sign=True) == text


def test_lists_per_step_are_numbers_only_where_that_tells_them_apart():
    between = [{"beta": [1.0, b, b, 1.0]} for b in (3.0, 1.0, 2.0)]
    axis = find_axes(between)["beta"]
    assert [axis.scalar(value) for value in axis.values] == [1.0, 2.0, 3.0]
    assert axis.text([1.0, 3.0, 3.0, 1.0]) == "β 3"
    one_step = find_axes([{"beta": [2.0, 1.0]}, {"beta": [1.0, 2.0]}])["beta"]
    assert one_step.scalars is None
    assert one_step.per_step
    assert find_axes([{"beta": 1.0}, {"beta": 1.0}]) == {}


def test_a_strip_begins_with_what_it_is_compared_with(tmp_path):
    settings = [{"preset": "plain"}, *({"raised": "beta", "step": n} for n in (2, 1))]
    run = view(tmp_path, settings, pairs=2, kept=2)
    (strip,) = [sheet for sheet in choose_sheets(run) if sheet.key == "strip-step-1"]
    assert strip.columns == ("plain", "step 1", "step 2")
    picture = draw_sheet(strip, 64)
    assert picture.width > 4 * 64
    assert strip.pictures == 6


def test_matplotlib_is_asked_for_by_name(monkeypatch):
    from fastface_trt.measure.style import new_figure

    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependency, match="pip install matplotlib"):
        new_figure(1, 1)
