"""Intervals against scipy's bootstrap, differences pair by pair against plain arithmetic."""

import numpy as np
import pytest
from scipy.stats import binomtest, bootstrap

from fastface_trt.evaluation.tables import caution
from fastface_trt.measure.statistics import Interval, paired_difference


def test_interval_is_that_of_scipy():
    values = np.random.default_rng(0).gamma(2.0, 0.2, 300)
    found = Interval.of(values)
    expected = bootstrap(
        (values,), np.mean, method="percentile", n_resamples=20000, rng=np.random.default_rng(1)
    ).confidence_interval
    width = expected.high - expected.low
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(expected.low, abs=0.05 * width)
    assert found.high == pytest.approx(expected.high, abs=0.05 * width)
    assert found.n == 300


def test_blocks_bound_memory_and_change_nothing(monkeypatch):
    values = list(np.random.default_rng(2).normal(size=50))
    whole = Interval.of(values)
    monkeypatch.setattr("fastface_trt.measure.statistics._BLOCK", 120)
    assert Interval.of(values) == whole


def test_differences_are_taken_pair_by_pair_where_both_are_known():
    baseline = {0: 1.0, 1: 100.0, 2: None, 3: 7.0}
    found = paired_difference({0: 1.5, 1: 100.5, 2: 3.0, 4: 9.0}, baseline)
    assert (found.mean, found.low, found.high, found.n) == (0.5, 0.5, 0.5, 2)
    assert paired_difference({5: 1.0}, baseline) is None
    assert not paired_difference({0: 2.0, 3: 6.0}, baseline).excludes_zero


@pytest.mark.parametrize("pairs", range(1, 13))
def test_a_difference_is_named_only_where_a_sign_test_could_show_one(pairs):
    """All pairs of one sign: scipy's exact test says how often that is chance."""
    found = Interval.of([0.1 + 0.01 * pair for pair in range(pairs)])
    chance = binomtest(pairs, pairs, 0.5).pvalue
    assert found.excludes_zero == (chance < 0.05)
    said = " ".join(caution(pairs))
    assert ("say nothing" in said) == (chance >= 0.05)
    assert (f"{100 * chance:.3g} % of runs" in said) == (chance >= 0.05)
