"""Four times the load that the server can take: every request is accounted for."""

import pytest

from benchmarks.load.__main__ import run_load

pytestmark = pytest.mark.serving


@pytest.mark.parametrize("requests", [10_000])
def test_every_request_ends_as_it_should(requests):
    report = run_load(requests, times_capacity=4.0, latency_budget=3.0)
    assert not report.problems
    assert sum(report.outcomes.values()) == requests
    assert set(report.outcomes) <= {"picture", "busy", "unavailable", "deadline"}
    assert min(report.outcomes["picture"], report.outcomes["busy"]) > requests / 100
    assert report.wrong_pictures == 0
    assert report.repeated_ids == 0
    # What the server counted is what its clients saw: nothing was made twice, nothing got lost.
    assert report.server_tasks["picture"] == report.outcomes["picture"]
    assert report.server_tasks.get("deadline_passed", 0) == report.outcomes.get("deadline", 0)
    # Flat: the line through the last half grows by no more than its noise, or by 1 %.
    memory = report.memory
    assert memory.samples > 10
    assert memory.growth <= max(memory.noise, memory.median / 100)
