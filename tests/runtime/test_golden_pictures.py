"""The mini model's pictures against golden ones from eager PyTorch, by perceptual distance.

The golden pictures come from tests/helpers/golden_pictures.py, which shares no engine with the
runtime. Bytes are not compared: another kernel rounds otherwise, and a pixel moves by a step.
"""

import json

import numpy as np
import pytest

from benchmarks.onnxruntime_versions import distance as distance_to_golden
from benchmarks.onnxruntime_versions import is_close
from fastface_trt import FastFace
from fastface_trt.mini.folders import SAMPLE_FACES
from tests.conftest import GOLDEN

PICTURES = GOLDEN / "pictures"
CASES = json.loads((PICTURES / "cases.json").read_text())


@pytest.fixture(scope="module")
def fastface():
    with FastFace.load("mini") as opened:
        yield opened


def distance(fastface, name, **changed):
    case = CASES[name]
    result = fastface(
        case["prompt"],
        SAMPLE_FACES / f"{case['face']}.png",
        preset=name,
        seed=case["seed"],
        **changed,
    )
    return distance_to_golden(np.asarray(result.images[0]), name)


@pytest.mark.parametrize("name", CASES)
def test_pictures_are_the_golden_ones(fastface, name):
    similarity, difference = distance(fastface, name)
    assert is_close(similarity, difference), (similarity, difference)


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("dcg", {"beta": [1.0, 2.7, 2.7, 1.0]}),
        ("am1+dcg", {"alpha": [1.0, 1.3, 1.3, 1.0]}),
        ("am2+dcg", {"guidance_rescale": None}),
        ("dcg", {"guidance_rescale": 0.7}),
        ("dcg", {"dcg_variant": 3}),
        ("plain", {"ip_adapter_scale": 0.7}),
        ("am1", {"preset_of": "plain"}),
        ("am2", {"preset_of": "plain"}),
    ],
)
def test_a_changed_coefficient_is_seen(fastface, name, changed):
    if "preset_of" in changed:
        changed = {"manipulation": fastface.request("x", preset="plain").manipulation}
    assert not is_close(*distance(fastface, name, **changed))
