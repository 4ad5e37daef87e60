"""Requests: presets as published, validation, and a round trip through JSON."""

import json
from dataclasses import replace

import numpy as np
import pytest

from fastface_trt.engines.contract import MANIPULATION_COLUMNS, PARTS
from fastface_trt.errors import InvalidRequest, UnknownName
from fastface_trt.runtime.guidance import NamedSchedule
from fastface_trt.runtime.manipulation import (
    OFF,
    AttentionManipulation,
    PartManipulation,
    parse_manipulation,
)
from fastface_trt.runtime.presets import PRESETS
from fastface_trt.runtime.request import GenerationRequest

REQUEST = GenerationRequest("photo; person in a garden")
COLUMN = {name: index for index, name in enumerate(MANIPULATION_COLUMNS)}


def rows(preset, step, steps=4):
    request = replace(REQUEST, steps=steps).with_preset(preset)
    return request.manipulation.rows(step, steps)


def test_am1_is_the_released_configuration():
    down, mid, up = rows("am1", 2)
    assert down[COLUMN["kind"]] == up[COLUMN["kind"]] == 1
    assert mid[COLUMN["kind"]] == 0
    assert down[COLUMN["scale"]] == pytest.approx(1.55)
    assert up[COLUMN["scale"]] == pytest.approx(1.45)
    assert down[COLUMN["power"]] == up[COLUMN["power"]] == pytest.approx(1.3)
    assert down[COLUMN["upper_bound"]] == 10


@pytest.mark.parametrize(("preset", "weight"), [("am2", 1.0), ("am2+dcg", 0.7)])
def test_am2_is_the_released_configuration(preset, weight):
    first, second = rows(preset, 0), rows(preset, 1)
    for part in (PARTS.index("down"), PARTS.index("up")):
        assert first[part][COLUMN["sharpness"]] == 7.5
        assert second[part][COLUMN["sharpness"]] == 5
        assert first[part][COLUMN["scale"]] == 1
        assert second[part][COLUMN["scale"]] == pytest.approx(1.55)
        assert first[part][COLUMN["quantile"]] == pytest.approx(0.65)
        assert first[part][COLUMN["adain_weight"]] == pytest.approx(weight)
        assert first[part][COLUMN["invert_first_token"]] == 1


@pytest.mark.parametrize(
    ("preset", "samples"),
    [("plain", 4), ("dcg", 10), ("am1", 4), ("am1+dcg", 10), ("am2", 12), ("am2+dcg", 12)],
)
def test_unet_samples_of_the_presets(preset, samples):
    assert REQUEST.with_preset(preset).unet_samples == samples


def test_softmask_by_branch_skips_branches_again():
    assert REQUEST.with_preset("am2+dcg", scope="branch").unet_samples == 10


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("steps", [1, 2, 8])
def test_presets_fit_any_number_of_steps(preset, steps):
    request = replace(REQUEST, steps=steps).with_preset(preset)
    assert len(request.guidance_steps()) == steps


@pytest.mark.parametrize("preset", PRESETS)
def test_round_trip_through_json(preset):
    request = REQUEST.with_preset(preset, seed=7, ip_adapter_scale={"down": 0.5, "up": 0.9})
    again = GenerationRequest.from_dict(json.loads(json.dumps(request.to_dict())))
    assert again.to_dict() == request.to_dict()
    assert again.guidance_steps() == request.guidance_steps()
    for step in range(4):
        np.testing.assert_array_equal(
            again.manipulation.rows(step, 4), request.manipulation.rows(step, 4)
        )


def test_named_schedules_are_written_out():
    request = replace(REQUEST, alpha=NamedSchedule("linear", high=4, low=1))
    assert request.to_dict()["alpha"] == [4, 3, 2, 1]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", "  "),
        ("seed", -1),
        ("seed", 2**64),
        ("seed", 1.5),
        ("steps", 0),
        ("height", 10**6),
        ("alpha", [1, 2]),
        ("beta", float("nan")),
        ("guidance_rescale", 1.5),
        ("guidance_rescale", float("nan")),
        ("ip_adapter_scale", float("inf")),
        ("ip_adapter_scale", 100),
        ("ip_adapter_scale", "0.8"),
    ],
)
def test_bad_values_are_refused(field, value):
    with pytest.raises(InvalidRequest) as caught:
        replace(REQUEST, **{field: value})
    assert caught.value.hint


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("plan", "exakt"),
        ("scope", "batch"),
        ("dcg_variant", 4),
        ("ip_adapter_scale", {"downn": 1.0}),
    ],
)
def test_unknown_names_are_refused(field, value):
    with pytest.raises(UnknownName):
        replace(REQUEST, **{field: value})
    with pytest.raises(UnknownName, match="am1"):
        REQUEST.with_preset("am")


@pytest.mark.parametrize(
    "values",
    [
        {"quantile": 1.2},
        {"quantile": -0.1},
        {"power": -1},
        {"scale": float("nan")},
        {"adain_weight": 2},
        {"sharpness": float("inf")},
        {"scale": (1.0, float("nan"))},
        {"scale": True},
    ],
)
def test_bad_manipulations_are_refused(values):
    with pytest.raises(InvalidRequest):
        PartManipulation("softmask", **values)


def test_wrong_length_per_step_is_refused():
    part = PartManipulation("scale_power", scale=(1.0, 2.0))
    with pytest.raises(InvalidRequest, match="2 values for 4 steps"):
        replace(REQUEST, manipulation=AttentionManipulation(down=part))


def test_parse_manipulation():
    assert parse_manipulation("scale=1.55,power=1.3", OFF) == PartManipulation(
        "scale_power", scale=1.55, power=1.3
    )
    masked = parse_manipulation("sharpness=7.5/5/5/5,adain_weight=0.7", OFF)
    assert masked.kind == "softmask"
    assert masked.sharpness == (7.5, 5, 5, 5)
    assert parse_manipulation("power=2", masked).kind == "softmask"
    assert parse_manipulation("kind=off", masked).kind == "off"
    with pytest.raises(UnknownName, match="sharpness"):
        parse_manipulation("sharpnes=2", OFF)
    with pytest.raises(InvalidRequest):
        parse_manipulation("scale=big", OFF)
    with pytest.raises(UnknownName, match="softmask"):
        parse_manipulation("kind=softmax", OFF)


@pytest.mark.parametrize(("kind", "inverted"), [("faceid-plus-v2", 1), ("faceid", 0), ("pulid", 0)])
def test_the_first_token_is_inverted_where_the_adapter_needs_it(kind, inverted):
    settled = REQUEST.with_preset("am2").for_adapter(kind).manipulation
    assert settled.down.invert_first_token == bool(inverted)
    assert settled.rows(0, 4)[PARTS.index("up"), COLUMN["invert_first_token"]] == inverted
    chosen = AttentionManipulation(down=PartManipulation("softmask", invert_first_token=True))
    assert chosen.for_adapter(kind).down.invert_first_token is True
