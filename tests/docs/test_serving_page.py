"""The serving page's lines for clients, as they stand there, against a real server."""

import base64
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from benchmarks.load.server import serve
from fastface_trt import FastFace
from tests.docs.pages import ROOT, blocks

pytestmark = pytest.mark.serving

BLOCKS = blocks(ROOT / "docs" / "serving.md")
URL = "http://127.0.0.1:8000"
PROMPT = "photo; person in a garden, smiling"


@pytest.fixture(scope="module")
def server():
    with serve("--ui") as server:
        yield "http://{}:{}".format(*server.wait_until_ready())


@pytest.fixture(scope="module")
def expected():
    with FastFace.load("mini") as fastface:
        face = ROOT / "fastface_trt/mini/faces/ada.png"
        return np.asarray(fastface(PROMPT, face, preset="am1+dcg", seed=5).images[0], np.int16)


def block(language, server):
    (text,) = (one.text for one in BLOCKS if one.language == language and URL + "/v1" in one.text)
    return text.replace(URL, server)


def test_curl(server, expected, tmp_path):
    script = block("sh", server).replace("cp fastface_trt", f"cp {ROOT}/fastface_trt")
    subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=tmp_path, check=True, timeout=120
    )
    shown = np.asarray(Image.open(tmp_path / "out.png"), np.int16)
    assert abs(shown - expected).max() <= 1
    assert len(json.loads((tmp_path / "two.json").read_text())["data"]) == 2
    events = re.findall(r"^event: (\S+)", (tmp_path / "events.txt").read_text(), re.MULTILINE)
    assert events.count("image_generation.progress") == 4
    assert events.count("image_generation.partial_image") == 2
    assert events[-1] == "image_generation.completed"


def test_openai(server, expected, tmp_path):
    (tmp_path / "ada.png").write_bytes((ROOT / "fastface_trt/mini/faces/ada.png").read_bytes())
    code = block("python", server) + "print(answer.data[0].b64_json)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    (tmp_path / "out.png").write_bytes(base64.b64decode(done.stdout))
    shown = np.asarray(Image.open(tmp_path / "out.png"), np.int16)
    assert abs(shown - expected).max() <= 1
