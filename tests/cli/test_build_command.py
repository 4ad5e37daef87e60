"""`fastface-trt build`: options from the command line to a builder, the log, and refusals."""

import json

import pytest
from click.testing import CliRunner

from fastface_trt.cli.build import build_options
from fastface_trt.cli.main import USER_ERROR, cli
from fastface_trt.engines.tensorrt.options import DynamicProfile
from fastface_trt.errors import InvalidRequest
from fastface_trt.mini import folders

NOTHING = dict.fromkeys(("sizes", "dynamic", "max_requests", "requests", "targets"))


def run(*arguments):
    return CliRunner().invoke(cli, [str(a) for a in arguments])


def test_sizes_in_pixels_become_latent_sizes():
    given = NOTHING | {"sizes": ("1024x768",), "dynamic": "512x512..1024x1024"}
    assert build_options(given, 8) == {
        "latent_sizes": ((96, 128),),
        "dynamic": DynamicProfile(smallest=(64, 64), largest=(128, 128)),
    }
    assert build_options(NOTHING, 8) == {}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sizes": ("1001x1024",)}, "does not fit the model"),
        ({"sizes": ("big",)}, "WIDTHxHEIGHT"),
        ({"dynamic": "512x512"}, "512x512..1024x1024"),
        ({"dynamic": "1024x1024..512x512"}, "larger than its largest"),
        ({"dynamic": "512x512..1024x1024", "max_requests": 999}, "max_requests"),
    ],
)
def test_sizes_that_do_not_read(given, message):
    with pytest.raises(InvalidRequest, match=message):
        build_options(NOTHING | given, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--branches", "1,x"), "not a list of whole numbers"),
        (("--branches", "1"), "does not take the build options branches"),
        (("--backend", "tensorrt-rtx", "--version-compatible"), "does not offer"),
        (("--backend", "tensorrt", "--target", "sm89"), "does not offer"),
        (("--backend", "tensorrt-rtx", "--target", "sm1"), "targets.0 is not valid"),
        (("--module", "unett"), "Did you mean 'unet'"),
        (("--provider-option", "use_tf32"), "Write KEY=VALUE"),
        (("--provider-option", "use_tf32=1"), "onnxruntime takes no provider options"),
    ],
)
def test_options_that_do_not_fit_are_one_sentence(tmp_path, arguments, message):
    result = run("build", "--cache", tmp_path, *arguments)
    assert result.exit_code == USER_ERROR
    assert message in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("command", ["build", "generate", "bench"])
def test_provider_options_reach_the_builder(tmp_path, command):
    """Which refuses them before anything is built, or a GPU is looked for."""
    needed = {"generate": ("--face", folders.SAMPLE_FACES / "ada.png", "--prompt", "a person")}
    where = ("--backend", "onnxruntime-cuda", "--cache", tmp_path, "--provider-option", "use_tf3=1")
    result = run(command, *where, *needed.get(command, ()))
    assert result.exit_code == USER_ERROR
    assert "Did you mean 'use_tf32'" in result.output
    assert list(tmp_path.iterdir()) == []


def test_the_log_holds_every_event(tiny_export, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    log = tmp_path / "logs" / "build.jsonl"
    arguments = ("--export", tiny_export[0], "--backend", "tensorrt-rtx", "--cache", tmp_path / "c")
    first = run("build", *arguments, "--module", "face_projection", "--log", log)
    assert first.exit_code == 0, first.output
    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert [events[0]["event"], events[-1]["event"]] == ["start", "finished"]
    assert events[0]["expected_seconds"] is None
    assert events[-1]["layers"] > 10
    assert {"parsed", "phase", "end"} <= {event["event"] for event in events}
    assert {event["module"] for event in events} == {"face_projection"}
    # A build of another kind knows from the first how long it will take.
    run("build", *arguments, "--module", "face_projection", "--log", log, "--optimization-level", 0)
    again = json.loads(log.read_text().splitlines()[0])
    assert again["expected_seconds"] == pytest.approx(events[-1]["seconds"])
