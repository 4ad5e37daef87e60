"""The same request by every surface: command line, HTTP, Triton, C, Python, metadata."""

import json
from dataclasses import asdict, fields, replace

import numpy as np
import pytest
from click.testing import CliRunner

from fastface_trt import FastFace
from fastface_trt.cli.main import cli
from fastface_trt.embedding.host import Host
from fastface_trt.errors import Cancelled, FastFaceError, InvalidRequest, UnknownName
from fastface_trt.mini.folders import SAMPLE_FACES
from fastface_trt.runtime.guidance import NamedSchedule
from fastface_trt.runtime.manipulation import AttentionManipulation, PartManipulation
from fastface_trt.runtime.request import ALIASES, PARSED_FIELDS, GenerationRequest, parse_request
from fastface_trt.serving.http.bodies import _put, _text_fields
from fastface_trt.serving.http.schemas import GenerationBody, PartBody
from fastface_trt.serving.http.work_order import generation_requests
from fastface_trt.serving.settings import ServerSettings
from fastface_trt.serving.triton.served import read_pictures
from tests.serving.triton.triton_server import text

PROMPT, FACE = "photo; person in a garden", SAMPLE_FACES / "ada.png"


@pytest.fixture(scope="module")
def fastface():
    with FastFace.load() as loaded:
        yield loaded


@pytest.fixture
def asked(fastface, monkeypatch):
    """The requests that `FastFace.generate` is given, instead of being run."""
    requests = []

    def generate(self, given, *arguments, **options):
        requests.extend(given)
        raise Cancelled("Nothing is run.")

    monkeypatch.setattr(FastFace, "generate", generate)
    return requests


def by_python(fastface, asked, values):
    with pytest.raises(Cancelled):
        fastface(PROMPT, FACE, **values)
    return asked[-1]


def by_http(fastface, asked, values):
    body = GenerationBody.model_validate_json(json.dumps({"prompt": PROMPT, **values}))
    (request,) = generation_requests(body, fastface.manifest, ServerSettings())
    return request


def by_form(fastface, asked, values):
    form = {}
    for name, value in ({"prompt": PROMPT} | values).items():
        written = value if isinstance(value, str) else json.dumps(value)
        _put(form, name, written, _text_fields(GenerationBody))
    body = GenerationBody.model_validate(form)
    (request,) = generation_requests(body, fastface.manifest, ServerSettings())
    return request


def by_triton(fastface, asked, values):
    arrays = {"PROMPT": text(PROMPT), "PARAMETERS": text(json.dumps(values))}
    arrays["FACE_FILE"] = text(FACE.read_bytes())
    (picture,) = read_pictures(arrays, fastface.manifest)
    return picture.request


def by_c(fastface, asked, values):
    """What C's structs have a field for there, the rest as parameters_json."""

    class Session:
        def generate(self, request, *arguments, **options):
            asked.append(request)
            raise Cancelled("Nothing is run.")

    host = Host.__new__(Host)
    host._fastface, host._session = fastface, Session()
    struct = {"prompt": PROMPT, "seed": values.get("seed", 0)}
    struct |= {name: values[name] for name in ("preset", "steps") if name in values}
    further = {name: value for name, value in values.items() if name not in struct}
    with pytest.raises(Cancelled):
        host.generate(struct, json.dumps(further), None, None, None, None, None, (None,) * 3, None)
    return asked[-1]


def by_cli(fastface, asked, values):
    result = run_cli(values)
    assert result.exit_code == 2, result.output
    assert "Nothing is run" in result.stderr
    return asked[-1]


def run_cli(values):
    spelled = {"ip_adapter_scale": "--ip-scale"}
    command = ["generate", "--face", str(FACE), "--prompt", PROMPT]
    for name, value in values.items():
        if name == "manipulation":
            for part, parameters in value.items():
                items = (f"{key}={'/'.join(as_list(one))}" for key, one in parameters.items())
                command += [f"--am-{part}", ",".join(items)]
            continue
        if isinstance(value, dict):
            value = ",".join(f"{key}={one}" for key, one in value.items())
        value = "off" if value is None else ",".join(as_list(value))
        command += [spelled.get(name, f"--{name.replace('_', '-')}"), value]
    return CliRunner().invoke(cli, command)


def as_list(value):
    return [str(one) for one in value] if isinstance(value, list) else [str(value)]


SURFACES = [by_python, by_http, by_form, by_triton, by_c, by_cli]
PART = {"kind": "softmask", "scale": [1.0, 1.5, 1.5, 1.5], "sharpness": 7.5}
REQUEST = GenerationRequest(PROMPT, height=96, width=96)
CASES = {
    "nothing": ({}, REQUEST),
    "a preset": ({"preset": "am1+dcg", "seed": 7}, replace(REQUEST, seed=7).with_preset("am1+dcg")),
    "named schedules": (
        {"alpha": "cosine:high=3", "beta": "cap:high=4,low=2,inverse=1"},
        replace(
            REQUEST,
            alpha=NamedSchedule("cosine", 3.0),
            beta=NamedSchedule("cap", 4.0, low=2.0, inverse=True),
        ),
    ),
    "numbers and lists": (
        {"alpha": 1.5, "beta": [1, 2, 2, 1], "ip_adapter_scale": 0.5},
        replace(REQUEST, alpha=1.5, beta=[1.0, 2.0, 2.0, 1.0], ip_adapter_scale=0.5),
    ),
    "everything": (
        {
            "preset": "dcg",
            "seed": 2**64 - 1,
            "steps": 4,
            "size": "128x96",
            "negative_prompt": "fog",
            "prompt_syntax": "a1111",
            "ip_adapter_scale": {"down": 0.5, "up": 1.0},
            "guidance_rescale": None,
            "dcg_variant": 3,
            "scope": "branch",
            "plan": "lean",
            "manipulation": {"up": PART},
        },
        replace(
            REQUEST.with_preset("dcg"),
            seed=2**64 - 1,
            width=128,
            negative_prompt="fog",
            prompt_syntax="a1111",
            ip_adapter_scale={"down": 0.5, "up": 1.0},
            guidance_rescale=None,
            dcg_variant=3,
            scope="branch",
            plan="lean",
            manipulation=AttentionManipulation(up=PartManipulation(**PART)),
        ),
    ),
    "the old name of φ": ({"rescale": 0.5}, replace(REQUEST, guidance_rescale=0.5)),
}


@pytest.mark.parametrize("surface", SURFACES)
@pytest.mark.parametrize("case", CASES)
def test_the_same_request_by_every_surface(fastface, asked, surface, case):
    values, expected = CASES[case]
    assert surface(fastface, asked, values) == expected


@pytest.mark.parametrize(
    "values",
    [
        {"manipulation.up": "scale=2", "manipulation.down": {"power": 1.1}},
        {"manipulation.up.scale": 2, "manipulation.down.power": "1.1"},
    ],
)
def test_dotted_options_change_the_presets_manipulation(fastface, asked, values):
    for surface in (by_python, by_triton, by_c):
        made = surface(fastface, asked, {"preset": "am1"} | values).manipulation
        preset = REQUEST.with_preset("am1").manipulation
        assert made.up == replace(preset.up, scale=2.0)
        assert made.down == replace(preset.down, power=1.1)
        assert made.mid == preset.mid


def test_names_of_diffusers_and_of_older_pictures(fastface, asked):
    for given in ({"steps": 2}, {"num_inference_steps": 2}, {"steps": 2, "num_inference_steps": 2}):
        assert by_python(fastface, asked, given).steps == 2
    with pytest.raises(InvalidRequest, match="num_inference_steps and steps are one field"):
        fastface(PROMPT, FACE, steps=2, num_inference_steps=4)
    told = REQUEST.with_preset("am2+dcg", image_index=3).to_dict()
    older = {{v: k for k, v in ALIASES.items()}.get(k, k): v for k, v in told.items()}
    assert {"rescale", "picture"} <= older.keys()
    assert GenerationRequest.from_dict(older) == GenerationRequest.from_dict(told)
    assert GenerationRequest.from_dict(older).image_index == 3
    with pytest.raises(InvalidRequest, match="rescale and guidance_rescale are one field"):
        GenerationRequest.from_dict(told | {"rescale": 0.1})


@pytest.mark.parametrize(
    ("values", "option", "field"),
    [
        ({"alpha": "1,2"}, "--alpha has 2 values", "alpha has 2 values"),
        ({"beta": "cosin:high=3"}, "--beta: Unknown schedule", "beta: Unknown schedule"),
        ({"guidance_rescale": 2}, "--guidance-rescale is 2", "guidance_rescale is 2"),
        ({"ip_adapter_scale": 99}, "--ip-scale is 99", "ip_adapter_scale is 99"),
        ({"seed": -1}, "--seed is -1", "seed is -1"),
        (
            {"manipulation": {"up": {"kind": "softmask", "scale": [1, 2]}}},
            "--am-up: scale has 2 values",
            "manipulation.up: scale has 2 values",
        ),
        ({"size": "100x96"}, "--size: 100x96 does not fit", "size: 100x96 does not fit"),
    ],
)
def test_errors_name_the_field_as_it_is_spelled(fastface, asked, values, option, field):
    result = run_cli(values)
    assert result.exit_code == 2
    assert option in result.stderr
    for surface in (by_python, by_triton):
        with pytest.raises(FastFaceError) as caught:
            surface(fastface, asked, values)
        assert caught.value.message.startswith(field)
        assert str(caught.value).startswith(field)
        assert field.startswith(caught.value.param)
    assert asked == []


def test_errors_of_the_old_name_say_it():
    with pytest.raises(InvalidRequest, match=r"^rescale is 'much'") as caught:
        parse_request({"prompt": PROMPT, "rescale": "much"})
    assert caught.value.param == "rescale"
    with pytest.raises(InvalidRequest, match="guidance_rescale"):
        parse_request({"prompt": PROMPT, "guidance_rescal": 1})
    with pytest.raises(UnknownName, match="of the UNet 'top'"):
        parse_request({"prompt": PROMPT, "manipulation.top": "scale=1"})
    with pytest.raises(InvalidRequest, match="size and width"):
        parse_request({"prompt": PROMPT, "size": "96x96", "width": 128})


def test_the_http_body_declares_what_a_request_has():
    names = {f.name for f in fields(GenerationRequest)} - {"width", "height", "image_index"}
    assert names | {
        "preset",
        "size",
        "rescale",
        "num_inference_steps",
    } == GenerationBody.model_fields.keys() & (PARSED_FIELDS | ALIASES.keys())
    assert PartBody().model_dump() == asdict(PartManipulation())


def test_per_step_values_are_equal_however_they_are_written():
    lists, tuples = (PartManipulation("softmask", scale=kind((1.0, 2.0))) for kind in (list, tuple))
    assert lists == tuples
    np.testing.assert_array_equal(lists.row(1, 2), tuples.row(1, 2))
