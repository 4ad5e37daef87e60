"""Values of wrong types, as they come out of JSON: found by fuzzing, or neighbours of what was."""

import numpy as np
import pytest

from fastface_trt.errors import FastFaceError, InvalidRequest
from fastface_trt.runtime.manipulation import is_number
from fastface_trt.runtime.request import GenerationRequest

HUGE = 10**400


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": 5},
        {"prompt": None},
        {"prompt": "half a pair: \ud800"},
        {"negative_prompt": ["a"]},
        {"negative_prompt": "\udfff"},
        {"guidance_rescale": "0.5x"},
        {"guidance_rescale": True},
        {"guidance_rescale": HUGE},
        {"guidance_rescale": [0.5]},
        {"alpha": "1.5x"},
        {"alpha": ""},
        {"alpha": None},
        {"alpha": {}},
        {"alpha": [1, None, 1, 1]},
        {"alpha": [1, "x", 1, 1]},
        {"alpha": [1, [1], 1, 1]},
        {"alpha": HUGE},
        {"beta": 1e39},
        {"beta": float("nan")},
        {"ip_adapter_scale": HUGE},
        {"ip_adapter_scale": "0.8x"},
        {"ip_adapter_scale": {"up": None}},
        {"ip_adapter_scale": {5: 1.0}},
        {"ip_adapter_scale": None},
        {"seed": HUGE},
        {"plan": ["exact"]},
        {"plan": {}},
        {"scope": None},
        {"dcg_variant": "2.0"},
        {"dcg_variant": [2]},
        {"manipulation": None},
        {"manipulation": []},
        {"manipulation": "softmask"},
        {"manipulation": {"up": None}},
        {"manipulation": {"up": ["scale"]}},
        {"manipulation": {5: {}}},
        {"manipulation": {"up": {"kind": ["softmask"]}}},
        {"manipulation": {"up": {"kind": "softmask", "scale": HUGE}}},
        {"manipulation": {"up": {"kind": "softmask", "scale": "1234"}}},
        {"manipulation": {"up": {"kind": "softmask", "scale": []}}},
        {"manipulation": {"up": {"kind": "softmask", "upper_bound": 1e300}}},
        {"manipulation": {"up": {"kind": "softmask", "invert_first_token": "no"}}},
        {"manipulation": {"up": {"kind": "softmask", "invert_first_token": [1]}}},
    ],
)
def test_a_wrong_type_is_an_error_of_the_user(fields):
    with pytest.raises(FastFaceError) as caught:
        GenerationRequest.from_dict({"prompt": "a person", **fields})
    assert len(str(caught.value)) < 300


def test_a_request_without_a_prompt():
    with pytest.raises(InvalidRequest, match="no prompt"):
        GenerationRequest.from_dict({})


@pytest.mark.parametrize("value", [0, -1.5, 3e38, np.float32(2), np.int64(3)])
def test_numbers(value):
    assert is_number(value)


@pytest.mark.parametrize("value", [True, "1", None, [], 1j, HUGE, -HUGE, 1e39, np.inf, np.nan])
def test_no_numbers(value):
    assert not is_number(value)
