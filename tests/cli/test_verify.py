"""`fastface-trt verify`: tables, JSON and exit codes."""

import json

import pytest
from click.testing import CliRunner

import fastface_trt.cli.verify as command
from fastface_trt.cli.main import USER_ERROR, cli
from fastface_trt.verify.marked_outputs import MarkableModule
from tests.verify.wrong_backend import WrongBuilder, scaled


def run(*arguments):
    return CliRunner().invoke(cli, ["verify", *map(str, arguments)])


def test_a_good_backend_agrees(tiny_export, tmp_path):
    options = ("--module", "vae_decoder", "--module", "text_encoder", "--cache", tmp_path)
    result = run(tiny_export[0], *options, "--layers")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("agrees") == 3  # two of the decoder, one of the text encoder
    report = json.loads(run(tiny_export[0], *options, "--json").stdout)
    assert [one["module"] for one in report["modules"]] == ["vae_decoder", "text_encoder"]
    assert all(one["agrees"] and one["tolerance"] == 1e-4 for one in report["modules"])
    assert 0 < report["modules"][0]["outputs"]["picture"]["relative_l2"] < 1e-5
    assert report["layers"] == []


@pytest.fixture
def wrong(tiny_export, monkeypatch):
    folder, manifest = tiny_export
    marked = MarkableModule(manifest.modules["vae_decoder"], folder)
    convolutions = [name for name in marked.names if marked.info(name).op == "Conv"]
    tensor = convolutions[-1]  # no normalisation after it that would hide the fault
    monkeypatch.setattr(command, "verify_builder", lambda *a, **k: WrongBuilder(scaled(tensor)))
    return marked.info(tensor)


def test_a_wrong_backend_fails_and_is_explained(tiny_export, tmp_path, wrong):
    options = ("--module", "vae_decoder", "--cache", tmp_path)
    result = run(tiny_export[0], *options, "--layers")
    assert result.exit_code == 1, result.output
    assert "differs" in result.stdout
    assert f"parts from the reference at {wrong.name}" in result.stdout
    assert wrong.scope in result.stdout
    result = run(tiny_export[0], *options, "--layers", "--no-float64", "--json")
    assert result.exit_code == 1
    (layer,) = json.loads(result.stdout)["layers"]
    assert (layer["tensor"], layer["op"], layer["scope"]) == (wrong.name, "Conv", wrong.scope)
    assert layer["float64"] is None
    result = run(tiny_export[0], *options, "--tolerance", "0.9")
    assert result.exit_code == 0, result.output


def test_mistakes_get_one_sentence_and_the_hint(tiny_export):
    for arguments, says in (
        (("--module", "unett"), "'unet'"),
        (("--backend", "onnxruntim"), "'onnxruntime'"),
        (("--backend", "tensorrt"), "tensorrt"),
    ):
        result = run(tiny_export[0], *arguments)
        assert result.exit_code == USER_ERROR, result.output
        assert says in result.stderr
        assert "Traceback" not in result.output


def test_lint(tiny_export):
    result = run(tiny_export[0], "--lint", "--module", "vae_decoder")
    assert result.exit_code == 0, result.output
    assert "vae_decoder: clean" in result.stdout
    result = run(tiny_export[0], "--lint", "--module", "vae_decoder", "--json")
    assert json.loads(result.stdout)["lint"] == {"vae_decoder": []}
