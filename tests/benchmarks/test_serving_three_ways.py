"""The simulated servers against arithmetic by hand, and the command from end to end."""

import json
from dataclasses import replace

import pytest
from click.testing import CliRunner

from benchmarks.serving.__main__ import main
from benchmarks.serving.machine import Machine
from benchmarks.serving.servers import SERVERS, Arrival, Limits, continuous, static_batches
from benchmarks.serving.simulation import LOADS, Point, capacity, plans, poisson, simulate

FLAT = Machine("flat", "by hand", {1: 1.0, 24: 1.0}, decoding=0.5, preparation=0.25)
LINEAR = replace(FLAT, calls={1: 1.0, 24: 24.0})
STEPS = (1, 1, 1, 1)
LIMITS = Limits()


def every(count, gap, rows=STEPS):
    return [Arrival(n, n * gap, rows) for n in range(count)]


def test_plans_are_those_of_the_presets():
    assert plans() == [(1, 1, 1, 1), (2, 3, 3, 2), (3, 3, 3, 3), (2, 3, 3, 2)]
    # 4, 10, 12 and 10 rows on a machine where a row takes a second
    assert capacity(LINEAR) == pytest.approx(1 / (9 + 0.75))


@pytest.mark.parametrize("name", ["one by one", "continuous batching"])
def test_alone_a_picture_takes_its_own_time(name):
    outcome = SERVERS[name](every(5, 100.0), FLAT, LIMITS)
    assert list(outcome.latencies.values()) == [pytest.approx(4.75)] * 5
    assert outcome.rows == [1] * 20


def test_a_static_server_waits_for_company():
    outcome = static_batches(every(2, 100.0), FLAT, LIMITS, patience=3.0)
    assert outcome.latencies[0] == pytest.approx(3 + 4.75)
    together = static_batches(every(2, 1.0), FLAT, replace(LIMITS, max_running=2), patience=9.0)
    assert together.rows == [2] * 4
    # The second comes after 1 s; both are prepared, take four calls, and are decoded in turn.
    assert together.latencies == {0: pytest.approx(1 + 0.5 + 4 + 0.5), 1: pytest.approx(5.5)}


def test_one_by_one_takes_turns():
    outcome = SERVERS["one by one"](every(4, 0.0), FLAT, LIMITS)
    assert outcome.end == pytest.approx(4 * 4.75)
    assert outcome.latencies[3] == pytest.approx(outcome.end)


def test_who_comes_late_joins_the_calls_of_others():
    arrivals = [Arrival(0, 0.0, STEPS), Arrival(1, 1.5, STEPS)]
    outcome = continuous(arrivals, FLAT, LIMITS)
    # The first is prepared and stepped twice, at 2.25 s the second joins it.
    assert outcome.rows == [1, 1, 2, 2, 1, 1]
    assert outcome.latencies[0] == pytest.approx(0.25 + 2 + 0.25 + 2 + 0.5)
    assert outcome.end == pytest.approx(0.5 + 6 + 1)


def test_limits_hold_for_everybody():
    for name, server in SERVERS.items():
        outcome = server(every(40, 0.0, (3, 3)), FLAT, replace(LIMITS, max_rows=9, max_waiting=10))
        assert outcome.refused == 30, name
        assert len(outcome.latencies) == 10
        assert max(outcome.rows) <= 9
        assert sum(outcome.rows) == 10 * 6


def test_batching_gains_where_calls_cost_the_same_and_nothing_where_rows_do():
    arrivals = every(64, 0.0)
    ends = {
        machine.name + name: server(arrivals, machine, LIMITS).end
        for machine in (FLAT, replace(LINEAR, name="linear"))
        for name, server in SERVERS.items()
    }
    # 64 pictures in calls of 8: 32 calls instead of 256, and everybody prepares and decodes.
    assert ends["flatone by one"] == pytest.approx(256 + 48)
    assert ends["flatcontinuous batching"] == pytest.approx(32 + 48)
    assert ends["linearcontinuous batching"] == pytest.approx(ends["linearone by one"])


def test_a_point_says_what_became_of_all():
    outcome = SERVERS["one by one"](every(100, 1.0), FLAT, replace(LIMITS, max_waiting=5))
    point = Point.of("one by one", 4.75, outcome, LIMITS)
    assert point.requests == 100
    assert point.refused == pytest.approx(1 - len(outcome.latencies) / 100)
    assert point.throughput == pytest.approx(1 / 4.75, rel=0.01)
    assert point.p50 <= point.p99 <= 6 * 4.75 + 1e-9
    assert point.fill == pytest.approx(1 / 24)


def test_arrivals_are_poisson_and_the_same_for_every_server():
    arrivals = poisson(2.0, 4000, seed=3)
    assert arrivals == poisson(2.0, 4000, seed=3)
    assert arrivals[-1].at == pytest.approx(2000, rel=0.05)
    points = simulate(FLAT, 50, LIMITS)
    assert [(p.load, p.server) for p in points] == [(x, name) for x in LOADS for name in SERVERS]


@pytest.mark.serving
def test_the_command_writes_its_results(tmp_path):
    counts = ["--rounds", "2", "--requests", "2", "--simulated", "20", "--running", "2"]
    arguments = [*counts, "--out", str(tmp_path)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    facts = json.loads((tmp_path / "serving.json").read_text())
    assert {one["work"] for one in facts["measured"]} == {"presets mixed", "am1+dcg only"}
    for one in facts["measured"]:
        assert one["difference"] <= 1
        assert {len(seconds) for seconds in one["seconds"].values()} == {2}
        assert one["rows"] == (4 + 10 if one["work"] == "presets mixed" else 20)
        assert set(one["predicted"]) == set(SERVERS)
    assert [one["costs"].split(",")[0] for one in facts["simulated"]][1] == "assumed"
    for name in ("serving-mini.png", "serving-simulation.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
