"""Guidance against the goldens and against float64, and the branch plan."""

import numpy as np
import pytest

from fastface_trt.errors import InvalidRequest, UnknownName
from fastface_trt.runtime.guidance import (
    VARIANTS,
    NamedSchedule,
    combine,
    guidance_step,
    parse_schedule,
    resolve_schedule,
)

NAMES = {"uncond": "u", "id": "i", "text": "t", "text+id": "ti"}
VARIANT_OF_TYPE = {3: 2, 1: 1, 2: 3}


def test_goldens(golden):
    cases, tensors = golden("dcg")
    assert cases
    for case in cases:
        step = guidance_step(
            case["alpha"],
            case["beta"],
            case["rescale_phi"],
            variant=VARIANT_OF_TYPE[case["dcg_type"]],
        )
        eps = tensors[f"{case['name']}.eps"]
        by_branch = {NAMES[b]: eps[i] for i, b in enumerate(case["branches"])}
        # Only the branches that the plan asks for: skipping the others must not change anything.
        guided = combine({b: by_branch[b] for b in step.branches}, step)
        expected = tensors[f"{case['name']}.out"][0]
        assert np.abs(guided - expected).max() < 1e-5, case["name"]


@pytest.mark.parametrize("variant", [1, 2, 3])
@pytest.mark.parametrize("rescale", [None, 0.0, 0.3, 1.0])
def test_equals_the_formula_in_float64(variant, rescale):
    rng = np.random.default_rng(variant)
    order, ((a, b), (c, d)) = VARIANTS[variant]
    eps = {x: rng.standard_normal((4, 8, 8)) * (1 + i) for i, x in enumerate(order)}
    alpha, beta = 1.7, 2.6
    guided = eps["u"] + alpha * (eps[a] - eps[b]) + beta * (eps[c] - eps[d])
    if rescale is not None:
        spread = np.mean([eps[x].std(ddof=1) for x in order[1:]])
        guided = guided * (rescale * spread / guided.std(ddof=1) + 1 - rescale)
    step = guidance_step(alpha, beta, rescale, variant=variant)
    ours = combine({k: v.astype(np.float32) for k, v in eps.items()}, step)
    assert np.abs(ours - guided).max() < 1e-5


def samples(alphas, betas, rescale, **options):
    return sum(
        len(guidance_step(a, b, rescale, **options).branches)
        for a, b in zip(alphas, betas, strict=True)
    )


def test_branch_plan_counts():
    alphas, betas = [1, 1.5, 1.5, 1], [1, 3, 3, 1]
    assert samples(alphas, betas, 0.75) == 10
    assert samples(alphas, betas, None) == 8
    assert samples(alphas, betas, 0.75, plan="lean") == 8
    assert samples(alphas, betas, 0.75, plan="full") == 12
    assert samples([1] * 4, [1] * 4, None) == 4
    assert samples([1] * 4, [1] * 4, None, couples_branches=True) == 12


def test_plans_agree_where_they_are_exact():
    rng = np.random.default_rng(0)
    eps = {b: rng.standard_normal((4, 8, 8)).astype(np.float32) for b in ("u", "i", "ti")}
    for alpha, beta, rescale in ((1, 1, None), (1, 1, 0.75), (1.5, 3, 0.75), (2, 2, None)):
        exact = guidance_step(alpha, beta, rescale)
        full = guidance_step(alpha, beta, rescale, plan="full")
        ours = combine({b: eps[b] for b in exact.branches}, exact)
        np.testing.assert_allclose(ours, combine(eps, full), rtol=1e-5, atol=1e-5)


def test_schedule_families():
    assert resolve_schedule("alpha", 1.5, 3) == [1.5] * 3
    assert NamedSchedule("cap", high=3).values(4) == [1, 3, 3, 1]
    assert NamedSchedule("linear", high=3, low=1).values(3) == [3, 2, 1]
    assert NamedSchedule("linear", high=3, low=1, inverse=True).values(3) == [1, 2, 3]
    assert NamedSchedule("cosine", high=3, low=1).values(3) == pytest.approx([3, 2, 1])
    assert NamedSchedule("cosine", high=3, low=1, clamp=(1.5, 2.5)).values(3) == pytest.approx(
        [2.5, 2, 1.5]
    )
    curve = NamedSchedule("power-cosine", high=3, low=1, power=2).values(5)
    assert curve[2] == pytest.approx(1 + 2 * (1 + np.cos(np.pi * 0.25)) / 2)
    assert NamedSchedule("cap", high=3).values(1) == [1.0]


def test_parse_schedule():
    assert parse_schedule("1.5") == 1.5
    assert parse_schedule("1,1.5,1.5,1") == [1, 1.5, 1.5, 1]
    assert parse_schedule("cosine:high=3,low=1,inverse=1,power=2,clamp=1..2.5") == NamedSchedule(
        "cosine", high=3, low=1, power=2, inverse=True, clamp=(1, 2.5)
    )


@pytest.mark.parametrize("text", ["1,x", "cosine", "cosine:high=x", "cosine:clamp=1"])
def test_bad_schedules_are_explained(text):
    with pytest.raises(InvalidRequest):
        parse_schedule(text)


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(UnknownName, match="cosine"):
        parse_schedule("cosin:high=2")
    with pytest.raises(UnknownName, match="high"):
        parse_schedule("cosine:hihg=2")
    with pytest.raises(InvalidRequest, match="2 values for 4 steps"):
        resolve_schedule("alpha", [1, 2], 4)
    with pytest.raises(InvalidRequest, match="finite"):
        resolve_schedule("alpha", float("nan"), 4)
