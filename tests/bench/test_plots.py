"""Plots of a report: every one has a title, named axes, a legend and the number of samples."""

import pytest

from fastface_trt.bench import plots
from fastface_trt.bench.plots import roofline_plot
from fastface_trt.bench.report import make_roofline
from tests.bench.reports import make_case, make_report

REPORT = make_report(("plain", "am1"))


def roofline():
    case = make_case()
    counted = {stage.label: (4e9, 1e8, 0.004) for stage in case.stages if stage.name == "unet"}
    rates = {"matmul_flops_per_second": 1e12, "copy_bytes_per_second": 2e10}
    return make_roofline(case, counted, **rates)


def texts(figure):
    axes = [text for one in figure.axes for text in (one.get_title("left"), *one.texts)]
    legends = [one for one in (*figure.legends, *(a.get_legend() for a in figure.axes)) if one]
    labels = [text.get_text() for one in legends for text in one.get_texts()]
    return " ".join([*map(str, axes), *labels])


@pytest.mark.parametrize(
    ("draw", "samples"),
    [
        (lambda: plots.stage_waterfall(REPORT, "am1"), "n = 24"),
        (lambda: plots.latency_distribution(REPORT), "n = 24"),
        (lambda: plots.latency_over_requests(REPORT), "n = 24"),
        (lambda: plots.throughput_over_concurrency(REPORT), "at least 24 pictures"),
        (lambda: plots.unet_samples(REPORT), "UNet samples of a picture"),
        (lambda: roofline_plot(roofline()), "n = 24"),
    ],
)
def test_every_plot_says_what_it_shows(draw, samples):
    figure = draw()
    assert figure.legends or all(axes.get_legend() for axes in figure.axes)
    for axes in figure.axes:
        assert axes.get_title("left")
        assert axes.get_ylabel()
    assert figure.axes[-1].get_xlabel()
    assert samples in texts(figure)


def test_bars_follow_each_other_and_are_the_medians():
    case = REPORT.cases[2]
    bars = plots.stage_waterfall(REPORT, "am1").axes[0].patches
    medians = [1000 * stage.seconds.median for stage in case.stages]
    assert [bar.get_width() for bar in bars] == pytest.approx(medians)
    starts = [sum(medians[:at]) for at in range(len(medians))]
    assert [bar.get_x() for bar in bars] == pytest.approx(starts)


def test_time_per_picture_is_time_per_call_over_requests():
    whole, each = plots.latency_over_requests(REPORT).axes
    (counts, times), (_, per_picture) = (axes.lines[0].get_data() for axes in (whole, each))
    assert list(counts) == [1, 2]
    assert list(times / counts) == pytest.approx(list(per_picture))


def test_a_roofline_is_drawn_when_a_report_has_one(tmp_path):
    report = REPORT.model_copy(update={"roofline": roofline()})
    names = {path.stem for path in plots.write_plots(report, tmp_path)}
    assert "roofline" in names
    assert "roofline" not in {p.stem for p in plots.write_plots(REPORT, tmp_path / "without")}
    (first, _) = roofline().stages
    assert first.stage == "unet 1, 2 branches"
    assert first.achieved_seconds == make_case().stages[0].seconds.median
