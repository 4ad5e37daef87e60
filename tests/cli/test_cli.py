"""The command line: what a person types, what is printed, and exit codes."""

import importlib.metadata
import io
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from fastface_trt.checkpoints import CHECKPOINTS, FACEID_PLUS_V2, PULID, SDXL_BASE
from fastface_trt.cli.common import timed_lines
from fastface_trt.cli.main import USER_ERROR, cli
from fastface_trt.measure.tables import text_console
from fastface_trt.mini import folders
from fastface_trt.runtime.picture_file import read_parameters
from tests.helpers import face_models

PROMPT = "photo; person in a garden"


@pytest.fixture(scope="module")
def face(tmp_path_factory):
    canvas = np.full((320, 320, 3), 30, np.uint8)
    face_models.draw(canvas, (160, 160), 24, half=60)
    path = tmp_path_factory.mktemp("face") / "ada.png"
    Image.fromarray(canvas).save(path)
    return str(path)


def run(*arguments):
    return CliRunner().invoke(cli, [str(a) for a in arguments])


def generate(tiny_export, face, out, *more):
    return run(
        "generate",
        "--export",
        tiny_export[0],
        "--face",
        face,
        "--prompt",
        PROMPT,
        "--out",
        out,
        *more,
    )


def test_generate_writes_pictures_a_grid_and_numbers(tiny_export, face, tmp_path):
    result = generate(
        tiny_export,
        face,
        tmp_path,
        "--preset",
        "plain",
        "--preset",
        "am2+dcg",
        "--count",
        2,
        "--seed",
        7,
        "--grid",
        "--json",
    )
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert len(names) == 5
    assert "grid.png" in names
    assert report["unet_samples"] == 2 * 4 + 2 * 12
    first = read_parameters(report["files"][0])
    assert (first["prompt"], first["seed"], first["alpha"]) == (PROMPT, 7, [1.0] * 4)
    grid = Image.open(tmp_path / "grid.png")
    assert grid.width > 4 * 160


def test_options_reach_the_request(tiny_export, face, tmp_path):
    result = generate(
        tiny_export,
        face,
        tmp_path,
        "--alpha",
        "1,2,2,1",
        "--beta",
        "cap:high=4",
        "--guidance-rescale",
        "0.5",
        "--am-down",
        "scale=1.2,power=1.1",
        "--am-mid",
        "kind=softmask,sharpness=7/5/5/5",
        "--ip-scale",
        "down=0.5,up=0.9",
        "--size",
        "32x48",
        "--plan",
        "full",
        "--negative-prompt",
        "fog",
        "--scope",
        "branch",
        "--steps",
        4,
        "--json",
    )
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    values = read_parameters(report["files"][0])
    assert values["alpha"] == [1, 2, 2, 1]
    assert values["beta"] == [1, 4, 4, 1]
    assert values["guidance_rescale"] == 0.5
    assert values["manipulation"]["down"]["scale"] == 1.2
    assert values["manipulation"]["mid"]["sharpness"] == [7, 5, 5, 5]
    assert "up" not in values["manipulation"]
    assert values["ip_adapter_scale"] == {"down": 0.5, "up": 0.9}
    assert (values["width"], values["height"]) == (32, 48)
    assert report["unet_samples"] == 12


@pytest.mark.parametrize(
    ("format", "suffix"), [("png", ".png"), ("jpeg", ".jpg"), ("webp", ".webp")]
)
def test_formats(tiny_export, face, tmp_path, format, suffix):
    more = ("--quality", 70) if format != "png" else ()
    result = generate(
        tiny_export, face, tmp_path / "folder", "--format", format, "--count", 2, "--json", *more
    )
    assert result.exit_code == 0, result.output
    files = json.loads(result.stdout)["files"]
    assert [name[-len(suffix) :] for name in files] == [suffix] * 2
    for index, file in enumerate(files):
        with Image.open(file) as image:
            assert image.format == format.upper()
        shown = run("inspect", file)
        assert shown.exit_code == 0, shown.output
        assert json.loads(shown.stdout)["image_index"] == index

    alone = tmp_path / f"new/me{suffix}"
    result = generate(tiny_export, face, alone, "--no-ai-mark")
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(alone)
    with Image.open(alone) as image:
        assert image.format == format.upper()
    assert read_parameters(alone)["prompt"] == PROMPT
    assert b"trainedAlgorithmicMedia" not in alone.read_bytes()


@pytest.mark.parametrize(
    ("out", "arguments", "says"),
    [
        ("a.png", ("--format", "webp"), "a.png says png, and the format asked for is webp"),
        ("a.jpg", ("--count", "2"), "is one file, and 2 pictures"),
        ("a.webp", ("--grid",), "is one file, and 2 pictures"),
        ("out", ("--quality", "80"), "no --quality"),
        ("a.png", ("--quality", "80"), "no --quality"),
    ],
)
def test_formats_that_contradict(tiny_export, face, tmp_path, out, arguments, says):
    result = generate(tiny_export, face, tmp_path / out, *arguments)
    assert result.exit_code == USER_ERROR, result.output
    error = result.stderr[result.stderr.index("Error:") :]
    assert says in error
    assert len(error.strip().splitlines()) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_picture_that_cannot_be_written_is_told(tiny_export, face, tmp_path):
    (tmp_path / "me.png").mkdir()
    result = generate(tiny_export, face, tmp_path / "me.png")
    assert result.exit_code == USER_ERROR, result.output
    assert "cannot be written" in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["me.png"]


def test_presets_can_be_overridden(tiny_export, face, tmp_path):
    result = generate(
        tiny_export,
        face,
        tmp_path,
        "--preset",
        "am1+dcg",
        "--rescale",
        "off",
        "--am-up",
        "scale=2",
        "--json",
    )
    values = read_parameters(json.loads(result.stdout)["files"][0])
    assert values["guidance_rescale"] is None
    assert values["manipulation"]["up"]["scale"] == 2
    assert values["manipulation"]["up"]["power"] == 1.3
    assert values["manipulation"]["down"]["scale"] == 1.55


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--preset", "am3"), "preset"),
        (("--alpha", "1,2"), "2 values for 4 steps"),
        (("--alpha", "1,x"), "not a schedule"),
        (("--am-down", "quantile=1.5"), "between 0 and 1"),
        (("--am-down", "power=-1"), "power"),
        (("--am-down", "scale=nan"), "scale"),
        (("--ip-scale", "much"), "ip-scale"),
        (("--rescale", "2"), "between 0 and 1"),
        (("--rescale", "some"), "rescale"),
        (("--size", "big"), "size"),
        (("--size", "30x30"), "multiples of"),
        (("--steps", "5"), "does not do 5 steps"),
        (("--seed", "-1"), "seed"),
        (("--backend", "onnxruntim"), "onnxruntime"),
        (("--backend", "tensorrt"), "tensorrt"),
        (("--face-index", "3"), "face"),
        (("--prompt", " "), "prompt is empty"),
        (("--face", "absent.png"), "absent.png"),
    ],
)
def test_mistakes_get_one_sentence_and_the_hint(tiny_export, face, tmp_path, arguments, says):
    result = generate(tiny_export, face, tmp_path / "out", *arguments)
    assert result.exit_code == USER_ERROR, result.output
    assert "Traceback" not in result.output
    error = result.stderr[result.stderr.index("Error:") :]
    assert says in error
    assert len(error.strip().splitlines()) == 2
    assert not (tmp_path / "out").exists()


def test_unwritable_output_is_explained(tiny_export, face, tmp_path):
    (tmp_path / "file").write_text("")
    result = generate(tiny_export, face, tmp_path / "file" / "out")
    assert result.exit_code == USER_ERROR, result.output
    assert "Traceback" not in result.output


def test_build_then_inspect(tiny_export, tmp_path):
    folder = tiny_export[0]
    result = run("build", "--export", folder, "--cache", tmp_path)
    assert result.exit_code == 0, result.output
    engines = result.stdout.split()
    assert len(engines) == 7
    assert run("cache", "verify", "--cache", tmp_path).output.count("ok") == 7
    shown = run("inspect", folder, "--verify").output
    assert "unet" in shown
    assert "faceid-plus-v2, 4 tokens" in " ".join(shown.split())
    assert "input_ids" in run("inspect", engines[0], "--verify").output
    assert json.loads(run("inspect", folder, "--json").stdout)["checkpoint"] == "tiny"
    assert json.loads(run("inspect", engines[0], "--json").stdout)["backend"] == "onnxruntime"
    wrong = run("build", "--export", folder, "--module", "unett")
    assert wrong.exit_code == USER_ERROR
    assert "'unet'" in wrong.stderr
    assert run("inspect", tmp_path).exit_code == USER_ERROR


def test_doctor_names_the_module_of_an_export_that_is_not_finite(tmp_path):
    from safetensors.numpy import load_file, save_file

    from fastface_trt.mini.folders import EXPORT

    assert "vae_decoder: finite" in run("doctor", "--export", EXPORT).output
    broken = tmp_path / "broken"
    shutil.copytree(EXPORT, broken)
    file = broken / "vae_decoder" / "probe.safetensors"
    tensors = load_file(file)
    tensors["output.picture"][0, 0, 0, 0] = np.nan
    save_file(tensors, file)
    found = run("doctor", "--export", broken)
    assert found.exit_code == USER_ERROR
    assert "vae_decoder" in found.output
    assert "--vae" in found.output


def test_inspect_says_what_the_unet_predicts(tmp_path):
    from fastface_trt.mini.folders import EXPORT

    assert "DDIMScheduler for epsilon, face" in " ".join(run("inspect", EXPORT).output.split())
    manifest = json.loads((EXPORT / "manifest.json").read_text())
    manifest["scheduler"] |= {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    shown = " ".join(run("inspect", tmp_path).output.split())
    assert "DDIMScheduler for v_prediction, zero terminal SNR, face" in shown


def test_doctor():
    assert "onnxruntime" in run("doctor").output
    report = json.loads(run("doctor", "--json").stdout)
    works = {b["name"]: b["works"] for b in report["backends"]}
    assert works["onnxruntime"]
    assert all(b["works"] or b["hint"] for b in report["backends"])
    assert report["face"]["works"]
    assert "found the face of ada.png" in report["face"]["detail"]


def test_doctor_says_whose_code_finds_faces(monkeypatch):
    found = json.loads(run("doctor", "--json").stdout)["face"]["detail"]
    assert f"by InsightFace {importlib.metadata.version('insightface')}" in found
    for name in [n for n in sys.modules if n.split(".")[0] == "insightface"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "insightface", None)
    found = json.loads(run("doctor", "--json").stdout)["face"]["detail"]
    assert "by this package's own code (InsightFace cannot be imported: " in found


def test_doctor_fails_where_no_face_can_be_found(monkeypatch, tmp_path):
    faces = tmp_path / "faces"
    faces.mkdir()
    Image.new("RGB", (96, 96)).save(faces / "ada.png")
    monkeypatch.setattr("fastface_trt.cli.doctor.SAMPLE_FACES", faces)
    shown, report = run("doctor"), run("doctor", "--json")
    assert (shown.exit_code, report.exit_code) == (1, 1)
    face = json.loads(report.stdout)["face"]
    assert not face["works"]
    assert f"Faces: {face['detail']} {face['hint']}" in shown.stdout


def test_hints_keep_their_brackets_and_tables_in_a_pipe_their_columns():
    """`[tensorrt]` is no markup, and a pipe has no width that text would be cut to."""
    report = json.loads(run("doctor", "--json").stdout)
    hints = {b["hint"] for b in report["backends"] if b["hint"]}
    assert any("[" in hint for hint in hints)
    shown = run("doctor").output
    assert all(hint in shown for hint in hints)
    installed = (f"{p} {v}" for packages in report["extras"].values() for p, v in packages.items())
    assert all(one in shown for one in installed if not one.endswith("None"))


def test_what_looks_like_markup_is_text(tmp_path):
    for text in ("[/wow]", "[red]", ":smile:"):
        result = run("inspect", tmp_path / text)
        assert result.exit_code == USER_ERROR
        assert text in result.stderr
    lines = io.StringIO()
    console = text_console()
    console.file = lines
    timed_lines(console)("a [/wow] [red]prompt[/red] :smile:")
    assert lines.getvalue().endswith("a [/wow] [red]prompt[/red] :smile:\n")


def test_a_fresh_home_stays_clean(tmp_path):
    """ONNX Runtime would keep an id of the device and events for its telemetry there."""
    code = (
        "import fastface_trt.cli.main, onnxruntime;"
        f"onnxruntime.InferenceSession({str(folders.EXPORT / 'guidance_step/model.onnx')!r})"
    )
    environment = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"}
    subprocess.run(
        [sys.executable, "-c", code], env=environment | {"HOME": str(tmp_path)}, check=True
    )
    assert list(tmp_path.rglob("*")) == []


def test_export_asks_for_the_licence_first():
    result = run("export", "--checkpoint", "hyper")
    assert result.exit_code == USER_ERROR
    assert "--accept-licence" in result.stderr


def test_export_asks_for_the_named_adapters_licence():
    result = run("export", "--checkpoint", "mini", "--adapter", "pulid")
    assert result.exit_code == USER_ERROR
    assert "guozinan/PuLID" in result.stderr
    assert "--accept-licence" in result.stderr


def test_export_mistakes(tmp_path):
    for arguments, says in (
        (("--checkpoint", "hiper"), "hyper"),
        (("--checkpoint", "hyper", "--random-weights", "--steps", 3), "3 steps"),
        (("--checkpoint", "hyper", "--random-weights", "--vae", "x/y"), "no weights"),
        (("--checkpoint", "hyper", "--random-weights", "--adapter", "x/y"), "faceid-plus-v2"),
        (("--checkpoint", "mini", "--zero-tokens", 4), "--adapter pulid"),
        (("--checkpoint", "mini", "--adapter", str(tmp_path / "a.bin")), "a.bin"),
        (("--checkpoint", "mini", "--calibration-faces", str(tmp_path)), "not calibrated"),
        (("--checkpoint", "hyper", "--precision", "fp8", "--accept-licence"), "photographs"),
        (("--checkpoint", "mini", "--precision", "bf16", "--weight-storage", "fp16"), "store"),
    ):
        result = run("export", *arguments, tmp_path / "out")
        assert result.exit_code == USER_ERROR, result.output
        assert says in result.stderr
        assert not (tmp_path / "out").exists()


def test_help_of_every_command():
    for name in cli.commands:
        result = run(name, "--help")
        assert result.exit_code == 0
        assert "Options" in result.output


@pytest.mark.parametrize(
    "arguments",
    [
        ("build", "--cache"),
        ("evaluate", "presets", "--pairs", 1, "--out"),
        ("publish", "mini"),
        ("export-triton",),
        ("demo", "--out"),
        ("generate", "--face", folders.SAMPLE_FACES / "ada.png", "--prompt", "x", "--cache"),
    ],
)
def test_a_folder_that_cannot_be_is_one_sentence(arguments):
    result = run(*arguments, "/proc/nope")
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == USER_ERROR
    assert "nope" in result.stderr
    assert "cannot be written: No such file or directory." in result.stderr


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("hyper",), {"h94/IP-Adapter-FaceID"}),
        (("turbo",), {"h94/IP-Adapter-FaceID", "stabilityai/sdxl-turbo"}),
        (("turbo", "--base", "other/base"), {"h94/IP-Adapter-FaceID"}),
        (("lcm", "--adapter", "pulid"), {"guozinan/PuLID"}),
    ],
)
def test_the_licence_sentence_names_the_weights_that_are_restricted(options, named, tmp_path):
    result = run("export", "--checkpoint", *options, tmp_path / "out")
    assert result.exit_code == USER_ERROR
    said = result.stderr.partition("(")[2]
    items = (SDXL_BASE, PULID, FACEID_PLUS_V2, CHECKPOINTS["turbo"].base)
    known = {"other/base", *(item.location for item in items)}
    assert {location for location in known if location in said} == named
    assert "RAIL" not in said
