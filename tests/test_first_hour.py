"""A newcomer's hour: the wheel in a new environment, an empty home, and what is left behind.

Minutes, most of them pip's, and the package index: `make test-first-hour`.
"""

import base64
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
BUILT_FROM = ("engines", "export", "runtime", "fastface_trt", "LICENSE", "README.md")
BUILT_FROM += ("pyproject.toml", "setup.py")
# conftest.py lets what tests start import the clone, which a newcomer has not.
PIP = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
PROMPT = "photo; person in a garden, smiling"
pytestmark = pytest.mark.hour


def sh(*command, **options):
    return subprocess.run([*map(str, command)], capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory):
    """Somebody with the wheel and one extra in an environment, and nothing else of ours.

    `run` runs commands of the environment in the folder `desk`, which has a picture; `home` and
    `temporary` are empty at first.
    """
    place = tmp_path_factory.mktemp("newcomer")
    one = SimpleNamespace(desk=place / "desk", home=place / "home", temporary=place / "tmp")
    sources, wheels, environment = place / "sources", place / "wheels", place / "venv"
    for folder in (one.desk, one.home, one.temporary, sources):
        folder.mkdir()
    for command in (
        ("cp", "-a", *(ROOT / name for name in BUILT_FROM), sources),  # a build leaves files
        (sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", wheels, sources),
        (sys.executable, "-m", "venv", environment),
    ):
        done = sh(*command, env=PIP)
        assert done.returncode == 0, done.stderr
    (wheel,) = wheels.iterdir()
    one.wheel = wheel
    done = sh(environment / "bin/pip", "install", "-q", f"{wheel}[serve]", env=PIP)
    assert done.returncode == 0, done.stderr
    sample = ROOT / "fastface_trt" / "mini" / "faces" / "ada.png"
    (one.desk / "me.png").write_bytes(sample.read_bytes())
    one.options = {
        "cwd": one.desk,
        "env": {
            "PATH": f"{environment / 'bin'}:/usr/bin:/bin",
            "HOME": str(one.home),
            "TMPDIR": str(one.temporary),
        },
    }
    one.pip = environment / "bin/pip"
    one.run = lambda *arguments: sh(environment / "bin/fastface-trt", *arguments, **one.options)
    one.start = lambda *arguments: subprocess.Popen(
        [environment / "bin/fastface-trt", *arguments], stderr=subprocess.PIPE, **one.options
    )
    return one


def pictures(newcomer):
    """Every picture in the folder `out`, and its pixels."""
    found = {}
    for path in (newcomer.desk / "out").rglob("*.png"):
        with Image.open(path) as picture:
            found[path] = picture.tobytes()
    return found


def files(folder):
    return [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]


def test_doctor_finds_a_face(newcomer):
    done = newcomer.run("doctor", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["face"]["works"]
    assert next(b for b in report["backends"] if b["name"] == "onnxruntime")["works"]


def test_faces_are_found_without_opencv(newcomer):
    detail = json.loads(newcomer.run("doctor", "--json").stdout)["face"]["detail"]
    assert "own code (InsightFace is not installed)" in detail
    environment = newcomer.pip.parent.parent
    assert not [
        *environment.rglob("cv2"),
        *environment.rglob("scipy"),
        *environment.rglob("skimage"),
    ]


def test_two_runs_with_other_parameters_leave_two_pictures_that_say_how(newcomer):
    for seed, preset in ((1, "plain"), (2, "am1+dcg")):
        face = ("--face", "me.png", "--prompt", PROMPT, "--out", "out")
        done = newcomer.run("generate", *face, "--seed", str(seed), "--preset", preset)
        assert done.returncode == 0, done.stderr
    found = pictures(newcomer)
    assert len(set(found.values())) == 2
    shown = [newcomer.run("inspect", path).stdout for path in found]
    assert all(PROMPT in one for one in shown)


def test_ctrl_c_ends_with_one_sentence_and_only_whole_pictures(newcomer):
    many = ("--prompt", PROMPT, "--count", "100", "--seed", "50", "--out", "out")
    process = newcomer.start("generate", "--face", "me.png", *many)
    said = b""
    while b"step" not in said:
        said += process.stderr.readline()
    process.send_signal(signal.SIGINT)
    said += process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert b"Traceback" not in said
    pictures(newcomer)  # opens each
    assert not [path for path in files(newcomer.desk) if path.name.startswith(".")]


def test_a_served_picture_comes_by_curl_and_the_server_stops(newcomer):
    process = newcomer.start("serve", "--port", "0")
    try:
        address = None
        for line in process.stderr:
            said = json.loads(line)
            address = said.get("address", address)
            if said.get("state") == "ready":
                break
        form = ("-F", "image=@me.png", "--form-string", f"prompt={PROMPT}")
        answer = sh("curl", "-sS", "-f", f"{address}/v1/images/edits", *form, **newcomer.options)
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.communicate()
    assert answer.returncode == 0, answer.stderr
    (picture,) = json.loads(answer.stdout)["data"]
    assert Image.open(io.BytesIO(base64.b64decode(picture["b64_json"]))).size == (96, 96)


def test_what_a_hint_says_to_install_can_be_installed_without_the_package_on_an_index(newcomer):
    (newcomer.desk / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0heicmif1" + bytes(64))
    asked = ("generate", "--face", "photo.heic", "--prompt", PROMPT)
    refused = newcomer.run(*asked)
    assert refused.returncode == 2
    command = re.search(r"pip (install .*?)(?:, or|$)", refused.stderr, re.MULTILINE)[1]
    done = sh(newcomer.pip, *shlex.split(command), "-q", env=PIP)
    assert done.returncode == 0, done.stderr
    assert "pip install" not in newcomer.run(*asked).stderr


def test_nothing_is_left_behind_but_the_documented_cache(newcomer):
    assert {path.parts[:2] for path in files(newcomer.home)} == {(".cache", "fastface-trt")}
    assert files(newcomer.temporary) == []
    assert {path.parts[0] for path in files(newcomer.desk)} == {"me.png", "photo.heic", "out"}


def megabytes(environment):
    """What `du` counts below a folder, with the environment's Python and pip."""
    return int(sh("du", "-sm", environment).stdout.split()[0])


def test_insightface_can_be_added_and_more_than_doubles_the_size(newcomer):
    """Last, because its environment is another one then."""
    environment = newcomer.pip.parent.parent
    before = megabytes(environment)
    done = sh(newcomer.pip, "install", "-q", f"{newcomer.wheel}[insightface]", env=PIP)
    assert done.returncode == 0, done.stderr
    after = megabytes(environment)
    print(f"{before} MB with the extra serve, {after} MB with InsightFace besides")
    assert before < 420
    assert before + 300 < after
