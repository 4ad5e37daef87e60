"""Experiment files: what they expand to, and one sentence for each mistake with its place."""

import pytest

from fastface_trt.checkpoints import MINI, find_checkpoint
from fastface_trt.errors import FastFaceError, InvalidRequest, UnknownName
from fastface_trt.evaluation.experiment import (
    built_in,
    load_experiment,
    parse_experiment,
)
from fastface_trt.runtime.presets import PRESETS
from fastface_trt.runtime.request import GenerationRequest


def parsed(text):
    return parse_experiment(f'title = "t"\npairs = 4\n{text}', "mine", where="mine.toml")


@pytest.mark.parametrize("name", built_in())
def test_built_in_experiments_make_requests(name):
    experiment = load_experiment(name)
    settings = experiment.expanded()
    assert len(settings) >= 3
    for setting in settings:
        scheduler = setting.source.scheduler
        entry = MINI if scheduler is None else find_checkpoint(scheduler)
        request = GenerationRequest("x", **setting.request_fields(entry.steps))
        assert request.steps in entry.allowed_steps
        assert setting.baseline is not None


def test_the_built_in_ones_are_those_of_the_paper():
    assert {
        "presets",
        "pareto",
        "alpha_beta",
        "per_step",
        "guidance_ablation",
        "scope",
        "plan",
        "schedulers",
        "lora_scale",
    } < set(built_in())
    pareto = load_experiment("pareto").expanded()
    assert {s.fields["ip_adapter_scale"] for s in pareto} == {0.1, 0.35, 0.5, 0.65, 0.8, 0.95}
    assert {s.fields["preset"] for s in load_experiment("presets").expanded()} == set(PRESETS)
    ablation = load_experiment("guidance_ablation").expanded()
    assert {s.fields.get("dcg_variant") for s in ablation} == {1, 2, 3, None}


def test_product_of_axes_with_a_baseline_of_its_own_line():
    settings = parsed(
        'line = "preset"\nbaseline = {preset = "plain"}\n[fixed]\nsteps = 2\n[axes]\n'
        'preset = ["am1", "plain"]\nip_adapter_scale = [0.5, 0.8]'
    ).expanded()
    found = {s.name: (s.baseline, s.line, s.fields["steps"]) for s in settings}
    assert found == {
        "plain_ip_adapter_scale=0.5": ("plain_ip_adapter_scale=0.5", "plain", 2),
        "plain_ip_adapter_scale=0.8": ("plain_ip_adapter_scale=0.8", "plain", 2),
        "am1_ip_adapter_scale=0.5": ("plain_ip_adapter_scale=0.5", "am1", 2),
        "am1_ip_adapter_scale=0.8": ("plain_ip_adapter_scale=0.8", "am1", 2),
    }
    assert [s.line for s in settings] == ["plain", "plain", "am1", "am1"]  # baselines first


def test_one_at_a_time_varies_each_axis_alone():
    settings = parsed(
        'combine = "one at a time"\n[fixed]\npreset = "am1"\n[axes]\nscale = [1.0, 2.0]\n'
        "down.power = [1.5]"
    ).expanded()
    assert [dict(s.axes) for s in settings] == [
        {},
        {"scale": 1.0},
        {"scale": 2.0},
        {"down.power": 1.5},
    ]
    assert [s.line for s in settings] == [None, "scale", "scale", "down.power"]
    manipulation = settings[3].request_fields(4)["manipulation"]
    assert (manipulation.down.power, manipulation.up.power) == (1.5, 1.3)
    both = settings[2].request_fields(4)["manipulation"]
    assert (both.down.scale, both.up.scale, both.mid.kind) == (2.0, 2.0, "off")


def test_names_are_safe_in_file_names():
    settings = parsed(
        '[[settings]]\nname = "../a b/ü"\npreset = "dcg"\n[axes]\nalpha = [[1, 2, 2, 1], 1.5]'
    ).expanded()
    assert [s.name for s in settings] == ["alpha=1-2-2-1", "alpha=1.5", "a-b-ü"]


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("= 3", "line 3"),
        ("speed = 3", "at speed"),
        ("combine = 'sum'", "at combine"),
        ("[axes]\npresett = ['am1']", r"axes of experiment mine.*presett"),
        ("[fixed]\ndown.sale = 1", r"fixed of experiment mine.*down\.sale"),
        ("[[settings]]\nsteps = 2\n[[settings]]\nstep = 2", r"settings\[1\] of experiment mine"),
        ("[axes]\npreset = 'am1'", r"axes\.preset is 'am1'"),
        ("", "no settings"),
        ("baseline = 'plane'\n[axes]\npreset = ['plain']", "baseline in experiment mine 'plane'"),
        ("baseline = {steps = 2}\n[axes]\npreset = ['plain']", "No setting has the axes"),
        ("line = 'x'\n[axes]\npreset = ['plain']", r"axis \(line\) in experiment mine"),
        ("pixels = true\n[axes]\npreset = ['plain']", "pixels needs a baseline"),
        ("[axes]\nsteps = [2, 2]", "Two settings are called steps=2"),
    ],
)
def test_mistakes_are_one_sentence_with_their_place(text, place):
    with pytest.raises(FastFaceError, match=place):
        parsed(text).expanded()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ('preset = "am3"', "Setting am3: Unknown preset"),
        ('alpha = "soft"', "Setting .*Unknown schedule family"),
        ("alpha = [1.0, 2.0]", "has 2 values for 4 steps"),
        ("scale = 1.5", "does not manipulate the down part"),
        ("quantile = 7", "does not manipulate"),
        ("steps = 2.5", "steps is 2.5"),
    ],
)
def test_values_that_no_request_takes_name_the_setting(fields, message):
    (setting,) = parsed(f"[[settings]]\n{fields}").expanded()
    with pytest.raises(InvalidRequest, match=message):
        GenerationRequest("x", **setting.request_fields(4))


def test_files_and_names(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('title = "t"\npairs = 2\n[axes]\npreset = ["am1"]')
    assert load_experiment(str(file)).name == "mine"
    with pytest.raises(UnknownName, match="Did you mean 'presets'"):
        load_experiment("preset")
    with pytest.raises(InvalidRequest, match="cannot be read"):
        load_experiment(str(tmp_path / "none.toml"))
