"""`fastface-trt serve`: what it refuses, its keys, and a server with the mini model."""

import base64
import io
import json
import os
import re
import signal
import subprocess
import sys

import httpx
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from rich.console import Console

from fastface_trt import FastFace
from fastface_trt.cli import serve as serve_command
from fastface_trt.cli.main import cli
from fastface_trt.cli.serve import KEYS_VARIABLE, METRICS_VARIABLE, read_keys, serve
from fastface_trt.errors import InvalidRequest, StorageError
from fastface_trt.mini.folders import SAMPLE_FACES
from fastface_trt.serving.settings import ServerSettings, WorkerSettings

PROMPT = "photo; person in a garden, smiling"
KEY = "the-key-of-ada"


def test_keys_come_from_a_file_and_the_environment(tmp_path, monkeypatch):
    file = tmp_path / "keys"
    file.write_text("# of Ada\nfirst-key\n\n second-key \nfirst-key\n")
    monkeypatch.setenv(KEYS_VARIABLE, "third-key,fourth-key\n")
    assert read_keys(file, KEYS_VARIABLE) == ("first-key", "second-key", "third-key", "fourth-key")
    monkeypatch.delenv(KEYS_VARIABLE)
    assert read_keys(None, KEYS_VARIABLE) == ()


@pytest.mark.parametrize("field", ["api_keys", "metrics_keys"])
@pytest.mark.parametrize(
    "key", ["", "2short", "schlüsselbund", "with blank inside", "tab\tin-it-x", "ends-in-a-line\n"]
)
def test_what_is_no_key_is_refused_without_showing_it(field, key):
    with pytest.raises(InvalidRequest) as caught:
        ServerSettings.model_validate({field: ("a-good-key", key)})
    assert not key or key not in str(caught.value)


@pytest.mark.parametrize("variable", [KEYS_VARIABLE, METRICS_VARIABLE])
@pytest.mark.parametrize("value", ["", " ", ",", " , ", "\n,\t"])
def test_a_variable_without_keys_is_no_start(variable, value):
    result = CliRunner().invoke(cli, ["serve"], env={variable: value})
    assert result.exit_code == 2
    assert f"{variable} is set, and there are no keys in it." in result.output


def test_a_file_without_keys_lets_nobody_in(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# none yet\n")
    with pytest.raises(InvalidRequest, match="no keys"):
        read_keys(file, "UNSET")
    with pytest.raises(StorageError):
        read_keys(tmp_path / "missing", "UNSET")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--host", "0.0.0.0"], "Without API keys"),
        (["--host", "no such host", "--allow-anonymous"], "cannot listen"),
        (["--export", "nowhere"], "nowhere"),
        (["--schedule-of", "nothing"], "Unknown"),
        (["--check", "no.such:Check"], "cannot be found"),
        (["--c2pa-key", "key.pem"], "certificate"),
        (["--backend", "tensorrt"], "GPU"),
    ],
)
def test_what_it_refuses_before_it_starts_anything(options, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)
    result = CliRunner().invoke(cli, ["serve", *options])
    assert result.exit_code == 2, result.output
    assert sentence in result.output
    assert "Traceback" not in result.output


def test_keys_are_never_options():
    text = CliRunner().invoke(cli, ["serve", "--help"]).output
    assert "--api-keys-file" in text
    assert not re.search(r"--api-keys?\s", text)


def test_from_end_to_end_with_the_mini_model(tmp_path):
    command = [sys.executable, "-m", "fastface_trt.cli.main", "serve", "--port", "0"]
    environment = {**os.environ, KEYS_VARIABLE: KEY}
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            lines = []
            for line in process.stderr:
                lines.append(json.loads(line))
                if lines[-1].get("state") == "ready":
                    break
            url = next(line["address"] for line in lines if line["message"] == "listening")
            with httpx.Client(
                base_url=url, headers={"Authorization": f"Bearer {KEY}"}, timeout=120
            ) as client:
                pictures = _use(client)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
            rest = process.stderr.read()
        finally:
            process.kill()
    assert PROMPT not in rest
    assert KEY not in rest
    with FastFace.load("mini") as fastface:
        face = SAMPLE_FACES / "ada.png"
        expected = fastface(PROMPT, face, preset="am1+dcg", seed=3, num_images_per_prompt=2)
    for picture, image in zip(pictures, expected.images, strict=True):
        assert np.abs(picture.astype(int) - np.asarray(image).astype(int)).max() <= 1


def _use(client):
    """Register a face, and make pictures of it, streamed and not; those of the plain answer."""
    file = (SAMPLE_FACES / "ada.png").read_bytes()
    face = client.post("/v1/faces", files={"image": file})
    assert face.status_code == 201, face.text
    body = {"prompt": PROMPT, "preset": "am1+dcg", "seed": 3, "face_id": face.json()["id"]}
    plain = client.post("/v1/images/generations", json=body | {"n": 2}).json()["data"]
    streamed = client.post("/v1/images/generations", json=body | {"stream": True}).text
    last = json.loads(streamed.strip().split("\n\n")[-1].split("data: ")[1])
    assert last["type"] == "image_generation.completed"
    assert last["b64_json"] == plain[0]["b64_json"]
    metrics = client.get("/metrics").text
    assert 'fastface_tasks_total{outcome="picture"} 3.0' in metrics
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(one["b64_json"])))) for one in plain]


@pytest.mark.parametrize(
    ("host", "ui", "said"),
    [
        ("127.0.0.1", True, "open http://127.0.0.1:8123/\n"),
        ("0.0.0.0", True, "open http://127.0.0.1:8123/\n"),
        ("::", True, "open http://[::1]:8123/\n"),
        ("localhost", False, "open http://localhost:8123/docs (--ui has a page)\n"),
    ],
)
def test_on_a_terminal_it_says_what_to_open_and_in_a_log_it_does_not(host, ui, said, monkeypatch):
    for terminal in (True, False):
        out = io.StringIO()
        screen = Console(file=out, force_terminal=terminal, color_system=None, highlight=False)
        monkeypatch.setattr(serve_command, "console", lambda screen=screen: screen)
        serve_command._say_address(8123, ServerSettings(host=host, ui=ui))
        assert out.getvalue() == (said if terminal else "")


def test_every_setting_has_an_option():
    under_other_names = {
        "export": "export_folder",
        "licence_acknowledged": "accept_licence",
        "api_keys": "api_keys_file",
        "metrics_keys": "metrics_keys_file",
        "ai_mark": "no_ai_mark",
        "engine_options": "provider_options",  # all that a command line has of them
    }
    options = {option.name for option in serve.params}
    settings = {**WorkerSettings.model_fields, **ServerSettings.model_fields}
    assert {under_other_names.get(name, name) for name in settings} <= options
