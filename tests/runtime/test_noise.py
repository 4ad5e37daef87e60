"""Noise is the documented function of (seed, picture, stream): checked by computing it again."""

import math

import numpy as np
import pytest
from scipy import stats

from fastface_trt.errors import InvalidRequest
from fastface_trt.runtime.sampling import standard_noise

MASK = 2**64 - 1


def philox_words(key, counter):
    """Philox-4x64-10 in plain integers: four 64-bit words for a 128-bit key and 256-bit counter."""
    k0, k1 = key & MASK, (key >> 64) & MASK
    c = [(counter >> (64 * i)) & MASK for i in range(4)]
    for round_ in range(10):
        if round_:
            k0, k1 = (k0 + 0x9E3779B97F4A7C15) & MASK, (k1 + 0xBB67AE8584CAA73B) & MASK
        p0, p1 = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [(p1 >> 64) ^ c[1] ^ k0, p1 & MASK, (p0 >> 64) ^ c[3] ^ k1, p0 & MASK]
    return c


@pytest.mark.parametrize(("seed", "picture", "stream"), [(0, 0, 0), (7, 3, 2), (2**64 - 1, 1, 5)])
def test_equals_the_documented_recipe(seed, picture, stream):
    expected = []
    for block in range(3):
        # numpy's Philox increments its counter before the first block.
        words = philox_words(seed + (picture << 64), (stream << 64) + block + 1)
        for w1, w2 in (words[:2], words[2:]):
            u1, u2 = ((w1 >> 11) + 1) * 2.0**-53, (w2 >> 11) * 2.0**-53
            radius = math.sqrt(-2 * math.log(u1))
            expected += [radius * math.cos(2 * math.pi * u2), radius * math.sin(2 * math.pi * u2)]
    noise = standard_noise(seed, picture, stream, (11,))
    np.testing.assert_allclose(noise, expected[:11], rtol=1e-6)


def test_is_standard_normal_and_streams_are_independent():
    a = standard_noise(3, 0, 0, (200_000,)).astype(np.float64)
    assert stats.kstest(a, "norm").pvalue > 1e-3
    for other in (
        standard_noise(3, 0, 1, a.shape),
        standard_noise(3, 1, 0, a.shape),
        standard_noise(4, 0, 0, a.shape),
    ):
        assert abs(np.corrcoef(a, other)[0, 1]) < 0.02


def test_shape_only_reshapes():
    flat = standard_noise(5, 0, 0, (24,))
    np.testing.assert_array_equal(standard_noise(5, 0, 0, (2, 3, 4)).ravel(), flat)
    assert flat.dtype == np.float32


def test_seed_out_of_range():
    with pytest.raises(InvalidRequest):
        standard_noise(2**64, 0, 0, (4,))
