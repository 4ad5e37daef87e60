"""Decoupled attention three ways (ONNX function, eager torch, float64 numpy) and the goldens."""

import numpy as np
import pytest
import torch

from fastface_trt.engines.contract import KINDS, MANIPULATION_COLUMNS, MASKED
from fastface_trt.export.attention import decoupled_attention as eager
from tests.export.onnx_functions import DecoupledAttention, session
from tests.export.reference import decoupled_attention as reference

SETTINGS = [
    {"kind": "off"},
    {"kind": "scale_power", "scale": 1.55, "power": 1.3},
    {"kind": "softmask", "scale": 1.55, "quantile": 0.65, "sharpness": 5.0},
    {"kind": "softmask", "scale": 1.0, "quantile": 0.3, "sharpness": 7.5, "adain_weight": 0.7},
    {"kind": "softmask", "quantile": 0.9, "invert_first_token": False, "adain_weight": 0.2},
    {"kind": "scale_power", "scale": 9.0, "power": 0.2, "upper_bound": 2.0},
]
DEFAULTS = {
    "scale": 1.0,
    "power": 1.0,
    "quantile": 0.65,
    "sharpness": 5.0,
    "adain_weight": 1.0,
    "invert_first_token": True,
    "upper_bound": 10.0,
}


def row(kind="off", **values):
    merged = DEFAULTS | values | {"kind": KINDS.index(kind)}
    return [float(merged[column]) for column in MANIPULATION_COLUMNS]


def tensors(seed, rows=3, heads=2, positions=64, size=16, tokens=4):
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((rows, heads, positions, size)).astype(np.float32) * 2
    k, v = rng.standard_normal((2, rows, heads, tokens, size)).astype(np.float32)
    return q, k, v


def relative(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.fixture(scope="module")
def function():
    return DecoupledAttention()


def eager_numpy(q, k, v, rows, ip_scale, dtype=torch.float32):
    arguments = [torch.from_numpy(np.asarray(x)).to(dtype) for x in (q, k, v, rows, ip_scale)]
    return eager(*arguments).numpy()


def test_goldens(golden, function):
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
        for run in (function, eager_numpy):
            ours = run(q, k, v, np.float32([row(**settings)]), np.float32([1.0]))
            assert relative(ours, expected) < tolerance, name


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("shape", [(3, 2, 64, 16), (2, 3, 100, 8), (1, 1, 16, 64), (3, 5, 144, 32)])
def test_equals_the_equations_in_float64(function, settings, shape):
    rows, heads, positions, size = shape
    q, k, v = tensors(positions, rows, heads, positions, size)
    expected = reference(q, k, v, ip_scale=0.8, **settings)
    parameters, ip_scale = np.float32([row(**settings)]), np.float32([0.8])
    assert relative(function(q, k, v, parameters, ip_scale), expected) < 2e-5
    assert relative(eager_numpy(q, k, v, parameters, ip_scale), expected) < 2e-5
    exact = eager_numpy(q, k, v, np.float64([row(**settings)]), np.float64([0.8]), torch.float64)
    assert relative(exact, expected) < 1e-9


@pytest.mark.parametrize("settings", SETTINGS)
def test_quantile_of_crowded_maps_is_fine_enough(function, settings):
    """Sharp maps put most of 1024 values next to 0, where a coarse bracket holds many of them."""
    q, k, v = tensors(1, 3, 2, 1024, 64)
    expected = reference(3 * q, k, v, **settings)
    assert relative(function(3 * q, k, v, [row(**settings)], [1.0]), expected) < 2e-6


@pytest.mark.parametrize("tokens", [1, 2, 16, 52])
@pytest.mark.parametrize("settings", SETTINGS[:4])
def test_any_number_of_tokens(tokens, settings):
    q, k, v = tensors(tokens, tokens=tokens)
    if tokens == 1 and settings["kind"] == "softmask":
        pytest.skip("the reference's std over one token is undefined")
    expected = reference(q, k, v, ip_scale=0.8, **settings)
    ours = DecoupledAttention(tokens=tokens)(q, k, v, [row(**settings)], [0.8])
    assert relative(ours, expected) < 2e-5


@pytest.mark.parametrize("settings", [*SETTINGS, {"kind": "scale_power", "power": 0.0}])
@pytest.mark.parametrize("run", ["function", "eager"])
def test_masked_tokens_are_as_if_they_were_not_there(settings, run):
    """Requests of one, two and five groups of 16 tokens in a batch, whatever lies in the rest."""
    there, tokens = (16, 32, 80), 80
    q, k, v = tensors(7, rows=9, tokens=tokens, positions=36)
    mask = np.full((9, tokens), MASKED, np.float32)
    for request, count in enumerate(there):
        mask[3 * request : 3 * request + 3, :count] = 0
    parameters, scales = [row(**settings)] * 3, [0.8, 0.5, 1.1]
    if run == "function":
        ours = DecoupledAttention(tokens=tokens, masked=True)(q, k, v, parameters, scales, mask)
    else:
        given = (q, k, v, np.float32(parameters), np.float32(scales), mask)
        ours = eager(*(torch.from_numpy(one) for one in given)).numpy()
    for request, count in enumerate(there):
        rows = slice(3 * request, 3 * request + 3)
        own_k, own_v = k[rows, :, :count], v[rows, :, :count]
        expected = reference(q[rows], own_k, own_v, ip_scale=scales[request], **settings)
        assert relative(ours[rows], expected) < 2e-5


def test_requests_in_a_batch_do_not_see_each_other(function):
    """Four requests of three branches with four settings equal four single runs."""
    settings, scales = SETTINGS[1:5], [0.2, 0.5, 0.8, 1.1]
    parts = [tensors(seed) for seed in range(4)]
    batch = [np.concatenate(x) for x in zip(*parts, strict=True)]
    together = function(*batch, [row(**s) for s in settings], scales)
    for index, (q, k, v) in enumerate(parts):
        single = function(q, k, v, [row(**settings[index])], [scales[index]])
        assert relative(together[3 * index : 3 * index + 3], single) < 1e-6
        expected = reference(q, k, v, ip_scale=scales[index], **settings[index])
        assert relative(single, expected) < 2e-5


def test_scope_branch_is_a_parameter_row_per_branch(function):
    q, k, v = tensors(3)
    by_branch = function(q, k, v, [row(**SETTINGS[3])] * 3, [1.0] * 3)
    for branch in range(3):
        one = slice(branch, branch + 1)
        expected = reference(q[one], k[one], v[one], **SETTINGS[3])
        assert relative(by_branch[one], expected) < 2e-5
    by_request = function(q, k, v, [row(**SETTINGS[3])], [1.0])
    assert relative(by_branch, by_request) > 1e-3


def test_flat_maps_stay_finite(function):
    q, k, v = tensors(0)
    out = function(np.zeros_like(q), k, v, [row(**SETTINGS[3])], [1.0])
    assert np.isfinite(out).all()
    expected = reference(np.zeros_like(q), k, v, **SETTINGS[3])
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_fp16_has_float32_statistics():
    q, k, v = (x.astype(np.float16) for x in tensors(5, positions=256, size=64))
    for settings in SETTINGS:
        out = DecoupledAttention(np.float16)(q, k, v, [row(**settings)], [0.8])
        assert out.dtype == np.float16
        assert relative(out.astype(np.float64), reference(q, k, v, ip_scale=0.8, **settings)) < 1e-2


@pytest.fixture(scope="module", params=[4, 80])
def quantile(request):
    return session("Quantile", {"x": 4, "level": 4, "last": 4}, 4, tokens=request.param)


LEVELS = np.float32([0, 0.001, 0.25, 0.5, 0.65, 0.9, 0.999, 1.0])


@pytest.mark.parametrize("positions", [16, 36, 100, 1024, 4096])
@pytest.mark.parametrize("kind", ["normal", "constant", "cauchy", "tied", "softmax", "two values"])
def test_quantile_equals_numpy(quantile, kind, positions):
    rng = np.random.default_rng(positions)
    shape = (len(LEVELS), 2, 3, positions)
    x = {
        "normal": lambda: rng.standard_normal(shape),
        "constant": lambda: np.full(shape, -3.7),
        "cauchy": lambda: rng.standard_cauchy(shape),
        "tied": lambda: rng.integers(0, 5, shape),
        "softmax": lambda: 1 / (1 + np.exp(-6 * rng.standard_normal(shape))),
        "two values": lambda: (rng.random(shape) < 0.65) * 1e-3,
    }[kind]().astype(np.float32)
    low, extent = x.min(axis=-1, keepdims=True), np.ptp(x, axis=-1, keepdims=True)
    x = (x - low) / np.where(extent > 0, extent, 1)  # the function takes values in [0, 1]
    level, last = LEVELS[:, None, None, None], np.full((1, 1, 1, 1), positions - 1, np.float32)
    ours = quantile.run(None, {"x": x, "level": level, "last": last})[0]
    expected = np.stack(
        [
            np.quantile(x[i].astype(np.float64), float(level), axis=-1, keepdims=True)
            for i, level in enumerate(LEVELS)
        ]
    )
    extent = np.ptp(x, axis=-1, keepdims=True)
    assert (np.abs(ours - expected) <= 1e-4 * extent + 1e-6 * np.abs(expected)).all()
