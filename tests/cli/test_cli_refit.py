"""`fastface-trt refit` as a person types it."""

import pytest
from click.testing import CliRunner

from fastface_trt.cli.main import USER_ERROR, cli

pytestmark = pytest.mark.engines


def run(*arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def cache(tiny_export, tmp_path_factory):
    folder = tmp_path_factory.mktemp("refit-cache")
    result = run("build", "--export", tiny_export[0], "--cache", folder, "--threads", 1)
    assert result.exit_code == 0, result.output
    return folder


def test_refit_makes_the_missing_engines_and_tells_numbers(tiny_export, half_scale_export, cache):
    command = ("refit", "--export", half_scale_export[0], "--cache", cache, "--threads", 1)
    result = run(*command, "--from", tiny_export[0])
    assert result.exit_code == 0, result.output
    text = " ".join(result.stderr.split())
    assert "unet: 56 weights changed (0.1 MB)" in text
    assert "difference from PyTorch: noise_prediction" in text
    others = len(half_scale_export[1].modules) - 1  # a LoRA changes only the UNet
    assert text.count("this engine exists") == others
    assert len(result.stdout.splitlines()) == others + 1
    again = run(*command, "--module", "unet")
    assert "unet: this engine exists" in " ".join(again.stderr.split())


def test_errors_are_one_sentence(tiny_export, half_scale_export, tmp_path):
    command = ("refit", "--export", half_scale_export[0], "--cache", tmp_path, "--module", "unet")
    for more, words in (
        ((), "no engine with the same inputs"),
        (("--from", tiny_export[0]), "has no engine for onnxruntime"),
        (("--module", "unett"), "Did you mean 'unet'"),
    ):
        result = run(*command, *more)
        assert result.exit_code == USER_ERROR
        assert words in " ".join(result.stderr.split())
        assert "Traceback" not in result.output
