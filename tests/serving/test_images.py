"""The images' own content, built without a container engine, serves a picture and finds a face.

Minutes and a gigabyte: `make test-image`, as root.
"""

import base64
import io
import json
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest
from PIL import Image

from tests.serving.image_root import build

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "fastface_trt" / "serving" / "deploy"
FACE = ROOT / "fastface_trt" / "mini" / "faces" / "ada.png"
KEY = "a-key-for-this-test"
pytestmark = pytest.mark.image


@pytest.fixture(
    scope="module",
    # TensorRT is gigabytes, and lies on an index of NVIDIA's: "gpu" is the whole of it.
    params=os.environ.get("FASTFACE_TEST_IMAGES", "cpu,gpu-without-tensorrt").split(","),
)
def image(request, tmp_path_factory):
    """The stages of an image as folders, and the command that a container of it runs."""
    if os.geteuid() or not shutil.which("debootstrap"):
        pytest.fail("This needs root and debootstrap: apt-get install -y debootstrap.")
    folder = tmp_path_factory.mktemp("image")
    name, _, extra = request.param.partition("-without-")
    yield build(DEPLOY / f"Dockerfile.{name}", ROOT, folder, without=extra)
    shutil.rmtree(folder)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def curl(port, path, *more):
    command = ["curl", "-sS", "-f", f"http://127.0.0.1:{port}{path}", *more]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_container_serves_a_picture_and_stops_when_asked(image):
    (*_, stage), words = image
    port = free_port()
    # The backend of the GPU's image needs a GPU; of an option given twice, the last counts.
    words = [*words, "--port", str(port), "--backend", "onnxruntime"]
    command = stage.command(words, FASTFACE_API_KEYS=KEY)
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while curl(port, "/v2/health/ready").returncode and server.poll() is None:
            assert time.monotonic() < deadline, "not ready after two minutes"
            time.sleep(0.5)
        form = ("-F", f"image=@{FACE}", "--form-string", "prompt=photo; person in a garden")
        answer = curl(port, "/v1/images/edits", "-H", f"Authorization: Bearer {KEY}", *form)
    finally:
        server.terminate()
        log = server.communicate(timeout=60)[1]
    assert answer.returncode == 0, log[-3000:]
    (picture,) = json.loads(answer.stdout)["data"]
    assert Image.open(io.BytesIO(base64.b64decode(picture["b64_json"]))).size == (96, 96)
    assert server.returncode == 0, log[-3000:]


def test_doctor_finds_the_sample_face_in_a_container(image):
    (*_, stage), (program, *_) = image
    done = subprocess.run(stage.command([program, "doctor", "--json"]), capture_output=True)
    face = json.loads(done.stdout)["face"]
    assert (done.returncode, face["works"]) == (0, True)
    assert "own code (InsightFace is not installed)" in face["detail"]
    assert not list(stage.folder.rglob("cv2"))
