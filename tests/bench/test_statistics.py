"""Percentiles and intervals against numpy and scipy, fences and drift against their definitions."""

import numpy as np
import pytest
import scipy.stats

from fastface_trt.bench.report import Distribution
from fastface_trt.measure import statistics


def lognormal(n, seed=0, scale=1.0):
    return scale * np.random.default_rng(seed).lognormal(0, 0.4, n)


def test_a_distribution_is_what_numpy_says():
    samples = lognormal(137)
    found = Distribution.of(samples)
    assert found.samples == tuple(samples)
    assert (found.n, found.minimum, found.maximum) == (137, samples.min(), samples.max())
    for name, percent in (("median", 50), ("p90", 90), ("p95", 95), ("p99", 99)):
        assert getattr(found, name) == pytest.approx(np.percentile(samples, percent), rel=1e-12)


def test_the_interval_of_the_median_is_scipys():
    """Two sets of resamples of one sample; the ends of an interval are themselves estimates."""
    samples = lognormal(400, seed=3)
    theirs = scipy.stats.bootstrap(
        (samples,), np.median, method="percentile", n_resamples=20000, rng=1
    ).confidence_interval
    low, high = statistics.median_interval(samples)
    width = theirs.high - theirs.low
    assert low == pytest.approx(theirs.low, abs=0.04 * width)
    assert high == pytest.approx(theirs.high, abs=0.04 * width)


def test_the_interval_holds_the_true_median_about_as_often_as_it_says():
    held = 0
    for seed in range(200):
        low, high = statistics.median_interval(lognormal(41, seed=seed))
        held += low <= 1 <= high  # exp(0)
    # 95 % of 200 give or take 3.2 standard deviations of a binomial.
    assert 180 <= held <= 199


def test_the_interval_of_a_ratio_holds_the_ratio():
    held = 0
    for seed in range(100):
        first, second = lognormal(31, seed), lognormal(47, 1000 + seed, scale=1.3)
        low, high = statistics.ratio_interval(first, second)
        held += low <= 1.3 <= high
    assert 88 <= held <= 100
    low, high = statistics.ratio_interval([2.0] * 5, [3.0] * 7)
    assert (low, high) == (1.5, 1.5)


def test_equal_samples_give_equal_intervals():
    samples = lognormal(25)
    assert statistics.median_interval(samples) == statistics.median_interval(list(samples))


def test_outliers_are_those_outside_tukeys_fences():
    samples = [10.0, 11, 12, 13, 14, 15, 16, 17, 18, 100, -60]
    low, high = np.percentile(samples, [25, 75])
    reach = 1.5 * scipy.stats.iqr(samples)
    expected = [i for i, x in enumerate(samples) if not low - reach <= x <= high + reach]
    assert statistics.outliers(samples) == tuple(expected) == (9, 10)
    assert statistics.outliers([1.0, 1.0, 1.0, 50.0]) == ()


def test_drift_is_the_second_half_over_the_first():
    steady = lognormal(40) / 100 + 1
    _, low, high = statistics.drift(steady)
    assert low <= 1 <= high
    ratio, low, high = statistics.drift([*steady[:20], *(1.2 * steady[:20])])
    assert ratio == pytest.approx(1.2)
    assert low > 1
    assert high < 1.3
    assert statistics.drift([1, 2, 3, 4]) == (1.0, 1.0, 1.0)
