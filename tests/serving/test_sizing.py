"""Sizing: the arithmetic on a report of round numbers, and the wait against a simulated queue."""

import numpy as np
import pytest
from click.testing import CliRunner

from fastface_trt.bench.report import BranchPlan, Case, Distribution, Stage, Throughput
from fastface_trt.bench.sizing import (
    Operation,
    machine_names,
    markdown,
    mean_wait,
    sizes,
)
from fastface_trt.cli.main import cli
from fastface_trt.errors import InvalidRequest
from tests.bench import reports

STEPS = {"exact": (("i", "ti"), ("u", "i", "ti")), "full": (("u", "i", "ti"),) * 2}
LEAN = (("ti",), ("u", "i", "ti"))


def stage(name, seconds, step=None, branches=None):
    return Stage(
        name=name,
        step=step,
        branches=branches,
        rows=branches,
        calls=1,
        seconds=Distribution.of([seconds]),
    )


def case(features, requests):
    """Per picture 40 ms of encoding, steps of 2 and 3 branches, 30 ms of decoding, 10 ms more."""
    stages = [stage("text_encoder", 0.040)] if features == "fresh" else []
    stages += [
        stage("unet", 0.090 * requests, 0, 2),
        stage("guidance", 0.010 * requests, 0),
        stage("unet", 0.140 * requests, 1, 3),
        stage("guidance", 0.010 * requests, 1),
        stage("vae_decoder", 0.020 * requests),
        stage("png", 0.010 * requests),
        stage("noise", 0.004 * requests),
        stage("other", 0.006 * requests),
    ]
    return Case(
        preset="dcg",
        features=features,
        requests=requests,
        concurrency=1,
        warm_up=0,
        unet_samples=5,
        seconds=Distribution.of([sum(one.seconds.median for one in stages)]),
        stages=tuple(stages),
        throughput=Throughput(pictures=1, wall_seconds=1, pictures_per_second=1),
    )


@pytest.fixture
def report():
    plans = [("exact", STEPS["exact"]), ("full", STEPS["full"]), ("lean", LEAN)]
    return reports.make_report(("dcg",)).model_copy(
        update={
            "cases": (case("fresh", 1), case("cached", 1), case("cached", 4)),
            "branch_plans": tuple(
                BranchPlan(
                    preset="dcg", plan=name, branches=steps, unet_samples=sum(map(len, steps))
                )
                for name, steps in plans
            ),
        }
    )


def test_a_branch_plans_time_is_the_sum_of_its_stages(report):
    found = {(one.plan, one.requests): one for one in sizes(report, Operation(utilisation=0.5))}
    assert set(found) == {("exact", 1), ("full", 1), ("exact", 4), ("full", 4)}  # lean: no rate
    exact, full = found["exact", 1], found["full", 1]
    assert exact.denoise == pytest.approx(0.100 + 0.150)
    assert full.denoise == pytest.approx(2 * 0.150)
    for one in (exact, found["exact", 4]):
        assert one.encode == pytest.approx(0.040 + 0.010)
        assert one.decode == pytest.approx(0.030)
        assert one.seconds == pytest.approx(0.330)
        assert one.pictures_per_second == pytest.approx(1 / 0.330)
        assert one.pictures_per_hour == pytest.approx(1800 / 0.330)
        assert one.cost_per_thousand is None


def test_fill_known_faces_and_price(report):
    operation = Operation(utilisation=0.5, fill=0.5, fresh=0.25, price=2.0)
    exact = next(sizes(report, operation))
    assert exact.seconds == pytest.approx(0.25 * 0.040 + 0.010 + 0.250 / 0.5 + 0.030)
    assert exact.cost_per_thousand == pytest.approx(1000 * 2.0 * exact.seconds / 1800)
    assert "cost per 1000" in markdown(report, operation)
    assert "cost" not in markdown(report, Operation())


def test_plans_that_evaluate_the_same_branches_stand_once(report):
    same = [plan.model_copy(update={"branches": STEPS["full"]}) for plan in report.branch_plans]
    report = report.model_copy(update={"branch_plans": tuple(same)})
    assert [one.plan for one in sizes(report, Operation())] == ["exact", "exact"]


@pytest.mark.parametrize("utilisation", [0.3, 0.7, 0.9])
def test_the_wait_is_that_of_a_simulated_queue(utilisation):
    service = 0.2
    arrivals = np.random.default_rng(5).exponential(service / utilisation, 400_000)
    waits, wait = np.empty(len(arrivals)), 0.0
    for index, gap in enumerate(arrivals):  # Lindley's recursion
        wait = max(0.0, wait + service - gap)
        waits[index] = wait
    assert mean_wait(service, utilisation) == pytest.approx(waits.mean(), rel=0.05)


@pytest.mark.parametrize(
    "wrong",
    [
        {"utilisation": 1.0},
        {"utilisation": 0.0},
        {"utilisation": float("nan")},
        {"fill": 0.0},
        {"fill": 1.5},
        {"fresh": -0.1},
        {"price": -1.0},
        {"price": float("nan")},
    ],
)
def test_impossible_operation_is_refused(wrong):
    with pytest.raises(InvalidRequest):
        Operation(**wrong)


def test_hours_are_the_gpus_where_one_did_the_work(report):
    assert machine_names(report) == ("Test CPU, 2 cores", "machine-hour")
    environment = reports.make_environment(
        backend="tensorrt", start=reports.state(gpu=reports.gpu())
    )
    on_gpu = report.model_copy(update={"environment": environment})
    assert machine_names(on_gpu) == ("Test GPU", "GPU-hour")
    assert "pictures per GPU-hour at 70%" in markdown(on_gpu, Operation())


def test_command_prints_the_table_and_refuses_what_is_no_report(report, tmp_path):
    path = tmp_path / "bench.json"
    path.write_text(report.model_dump_json())
    ran = CliRunner().invoke(cli, ["bench", "sizing", str(path), "--price", "3"])
    assert ran.exit_code == 0, ran.output
    assert ran.output.strip() == markdown(report, Operation(price=3.0)).strip()
    path.write_text("{}")
    assert CliRunner().invoke(cli, ["bench", "sizing", str(path)]).exit_code == 2
