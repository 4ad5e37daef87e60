"""The CUDA kernels' arithmetic, executed on the CPU, against float64 and the goldens."""

import numpy as np
import pytest

from fastface_trt.engines.contract import MASKED
from tests.engines.kernels.emulated import COMPILER, EmulatedAttention, aligned
from tests.export.reference import decoupled_attention as reference
from tests.export.test_attention import SETTINGS, relative, row, tensors

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler (g++) on this machine")

SETTINGS = [*SETTINGS, {"kind": "softmask", "quantile": 0.0}, {"kind": "softmask", "quantile": 1.0}]


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    return EmulatedAttention(tmp_path_factory.mktemp("half"), np.float16)


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return EmulatedAttention(tmp_path_factory.mktemp("single"), np.float32)


@pytest.fixture(scope="module")
def heads_last(tmp_path_factory):
    folder = tmp_path_factory.mktemp("heads_last")
    return {dtype: EmulatedAttention(folder, dtype, True) for dtype in (np.float16, np.float32)}


def test_goldens(golden, single):
    cases, recorded = golden("am")
    assert cases
    for case in cases:
        name = case["name"]
        settings = {
            "kind": case["transform"],
            "scale": case["scale"],
            "power": case["power"] or 1.0,
            "quantile": case["quantile"] or 0.0,
            "sharpness": case["d"] or 0.0,
            "adain_weight": case["adain_weight"] if case["adain"] else 1.0,
            "invert_first_token": case["invert_first_token"],
            "upper_bound": case["upper_bound"],
        }
        q, k, v, expected = (recorded[f"{name}.{x}"] for x in ("q", "k", "v", "out"))
        tolerance = 1e-5 if case["transform"] == "scale_power" else 5e-4
        ours = single(q, k, v, [row(**settings)], [1.0])
        assert relative(ours, expected) < tolerance, name


SHAPES = [
    (3, 2, 64, 64),
    (1, 1, 33, 8),
    (2, 3, 101, 8),
    (1, 2, 1, 64),
    (2, 1, 577, 64),  # more than a block of launch 2, more than one round of launch 1
    (1, 2, 50, 24),  # three of four lanes hold a chunk
    (1, 1, 40, 128),
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_equations_in_float64(single, settings, shape):
    rows, heads, positions, size = shape
    q, k, v = tensors(positions, rows, heads, positions, size)
    expected = reference(q, k, v, ip_scale=0.8, **settings)
    ours = single(q, k, v, np.float32([row(**settings)]), np.float32([0.8]))
    assert relative(ours, expected) < 2e-5


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("shape", [(3, 2, 256, 64), (2, 1, 61, 8)])
def test_fp16_is_the_float32_result_rounded_once(half, settings, shape):
    rows, heads, positions, size = shape
    q, k, v = (x.astype(np.float16) for x in tensors(5, rows, heads, positions, size))
    expected = reference(q, k, v, ip_scale=0.8, **settings)
    ours = half(q, k, v, [row(**settings)], [0.8])
    assert ours.dtype == np.float16
    # Half a unit in the last place of fp16 everywhere, and float32's own error beside it.
    scale = np.abs(expected).max()
    assert (np.abs(ours - expected) <= 2.0**-11 * np.abs(expected) + 3e-5 * scale).all()


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_heads_last_with_an_addend(single, heads_last, settings, shape):
    """[B,N,H·D] gives the bits of [B,H,N,D]; what it is added to is added in float32."""
    rows, heads, positions, size = shape
    q, k, v = tensors(positions, rows, heads, positions, size)
    parameters = (np.float32([row(**settings)]), np.float32([0.8]))
    alone = heads_last[np.float32](q, k, v, *parameters)
    assert np.array_equal(alone, single(q, k, v, *parameters))
    base = tensors(1, rows, heads, positions, size)[0]
    added = heads_last[np.float32](q, k, v, *parameters, base=base)
    assert np.array_equal(added, alone + base)


@pytest.mark.parametrize("settings", SETTINGS)
def test_heads_last_in_fp16_is_rounded_once(heads_last, settings):
    q, k, v = (x.astype(np.float16) for x in tensors(5, 3, 2, 61, 16))
    base = tensors(6, 3, 2, 61, 16)[0].astype(np.float16)
    ours = heads_last[np.float16](q, k, v, [row(**settings)], [0.8], base=base)
    expected = base + reference(q, k, v, ip_scale=0.8, **settings)
    scale = np.abs(expected).max()
    assert (np.abs(ours - expected) <= 2.0**-11 * np.abs(expected) + 3e-5 * scale).all()


def test_requests_in_a_batch_do_not_see_each_other(single):
    """Four requests of three branches with four settings equal four single runs, bit for bit."""
    settings, scales = [SETTINGS[0], SETTINGS[1], SETTINGS[3], SETTINGS[2]], [0.2, 0.5, 0.8, 1.1]
    parts = [tensors(seed, size=8) for seed in range(4)]
    batch = [np.concatenate(x) for x in zip(*parts, strict=True)]
    together = single(*batch, [row(**s) for s in settings], scales)
    for index, (q, k, v) in enumerate(parts):
        alone = single(q, k, v, [row(**settings[index])], [scales[index]])
        assert np.array_equal(together[3 * index : 3 * index + 3], alone)
        expected = reference(q, k, v, ip_scale=scales[index], **settings[index])
        assert relative(alone, expected) < 2e-5


def test_scope_branch_is_a_parameter_row_per_branch(single):
    q, k, v = tensors(3, size=8)
    by_branch = single(q, k, v, [row(**SETTINGS[3])] * 3, [1.0] * 3)
    for branch in range(3):
        one = slice(branch, branch + 1)
        assert relative(by_branch[one], reference(q[one], k[one], v[one], **SETTINGS[3])) < 2e-5
    assert relative(by_branch, single(q, k, v, [row(**SETTINGS[3])], [1.0])) > 1e-3


@pytest.mark.parametrize("settings", SETTINGS[:4])
def test_no_thread_reads_what_another_has_still_to_write(single, settings):
    """The same bits whichever way round threads run between two barriers."""
    q, k, v = tensors(7, 2, 2, 545, 16)
    arguments = (q, k, v, [row(**settings)], [0.8])
    assert np.array_equal(single(*arguments), single(*arguments, reverse=True))


def test_flat_maps_stay_finite(single):
    q, k, v = tensors(0, size=8)
    flat = np.zeros_like(q)
    out = single(flat, k, v, [row(**SETTINGS[3])], [1.0])
    np.testing.assert_allclose(out, reference(flat, k, v, **SETTINGS[3]), atol=1e-5)


def test_saturated_maps(single):
    """Logits so large that maps are 0 and 1 nearly everywhere: ties, and rows of one value."""
    q, k, v = tensors(1, size=8)
    for settings in SETTINGS[2:4]:
        expected = reference(q * 60, k, v, **settings)
        assert relative(single(q * 60, k, v, [row(**settings)], [1.0]), expected) < 2e-4


LEVELS = [0.0, 0.001, 0.25, 0.5, 0.65, 0.9, 0.999, 1.0]


@pytest.mark.parametrize("positions", [1, 2, 37, 600])
@pytest.mark.parametrize(("spread", "repeats"), [(0, 1), (0.01, 1), (1, 1), (30, 1), (1, 5)])
def test_quantile_is_exact(single, positions, spread, repeats):
    """The row statistics equal numpy's, to the last bits, of the map that the kernel wrote."""
    q, k, v = tensors(positions, len(LEVELS), 1, positions, 8)
    q = np.repeat(q, repeats, axis=2)[:, :, :positions]  # ties
    settings = [row("softmask", quantile=level, invert_first_token=False) for level in LEVELS]
    single(q * spread, k, v, settings, [1.0] * len(LEVELS))
    maps = single.maps[:, 0].astype(np.float64)
    minimum, maximum, quantile = np.moveaxis(single.statistics[:, 0], 1, 0)
    assert np.array_equal(minimum, maps.min(1))
    assert np.array_equal(maximum, maps.max(1))
    expected = [
        np.quantile(a, np.float64(np.float32(level)), axis=0)
        for a, level in zip(maps, LEVELS, strict=True)
    ]
    np.testing.assert_allclose(quantile, np.maximum(expected, 1e-6), rtol=3e-7)


@pytest.mark.parametrize("settings", [*SETTINGS, {"kind": "scale_power", "power": 0.0}])
@pytest.mark.parametrize("tokens", [16, 18, 80])
def test_any_number_of_tokens_with_a_mask(heads_last, settings, tokens):
    """Requests with all tokens and with some of them, whatever lies in the others' place."""
    there = (tokens, tokens // 2)
    q, k, v = tensors(tokens, 4, 2, 45, 16, tokens)
    mask = aligned((4, tokens), np.float32)
    mask[2:, there[1] :] = MASKED
    base = tensors(1, 4, 2, 45, 16)[0]
    scales = [0.8, 1.1]
    ours = heads_last[np.float32](q, k, v, [row(**settings)] * 2, scales, base=base, mask=mask)
    for request, count in enumerate(there):
        at = slice(2 * request, 2 * request + 2)
        own_k, own_v = k[at, :, :count], v[at, :, :count]
        expected = reference(q[at], own_k, own_v, ip_scale=scales[request], **settings)
        assert relative(ours[at] - base[at], expected) < 2e-5


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("shape", [(3, 2, 64, 64), (2, 1, 577, 24)])
def test_many_tokens_without_a_mask_at_every_shape(single, settings, shape):
    q, k, v = tensors(7, *shape, 16)
    expected = reference(q, k, v, ip_scale=0.8, **settings)
    ours = single(q, k, v, [row(**settings)], [0.8])
    assert relative(ours, expected) < 2e-5
