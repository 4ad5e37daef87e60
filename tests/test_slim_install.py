"""What the package needs of others is what it asks for: the rest is blocked, and it works."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib
from packaging.requirements import Requirement
from PIL import Image

ROOT = Path(__file__).parent.parent
HEAVY = {"cv2", "scipy", "skimage", "insightface", "torch", "requests", "matplotlib"}

BLOCKING = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

BLOCKED = set(sys.argv.pop(1).split(","))
sys.meta_path.insert(0, Blocked())
"""


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def needed():
    """Distributions that the package asks for without extras, and what those ask for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    waiting, found = list(project["dependencies"]), set()
    while waiting:
        requirement = Requirement(waiting.pop())
        name = canonical(requirement.name)
        if name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        found.add(name)
        waiting += importlib.metadata.requires(name) or ()
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run Python where nothing can be imported that another distribution brings."""
    mine = needed() | {"fastface-trt", "pip", "setuptools"}
    brought = importlib.metadata.packages_distributions()
    blocked = {m for m, names in brought.items() if not mine.intersection(map(canonical, names))}
    assert blocked >= HEAVY
    home = tmp_path_factory.mktemp("slim")

    def run(code, *arguments):
        command = [sys.executable, "-c", f"{BLOCKING}\n{code}", ",".join(blocked), *arguments]
        done = subprocess.run(
            [str(one) for one in command],
            cwd=home,
            env={**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(home)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    run.home = home
    return run


COMMAND = "from fastface_trt.cli.main import main; main()"


def test_a_picture_is_made_where_only_what_is_asked_for_is_installed(run):
    face = ROOT / "fastface_trt/mini/faces/ada.png"
    options = ("--prompt", "photo; person in a garden", "--out", "me.png")
    run(COMMAND, "generate", "--face", face, *options)
    with Image.open(run.home / "me.png") as picture:
        assert picture.size == (96, 96)
    assert "garden" in run(COMMAND, "inspect", "me.png")


def test_doctor_finds_a_face_there_and_says_by_whose_code(run):
    detail = json.loads(run(COMMAND, "doctor", "--json"))["face"]["detail"]
    assert "found the face of ada.png" in detail
    assert "by this package's own code" in detail


def test_every_module_of_the_runtime_can_be_imported_there(run):
    names = [f"fastface_trt.runtime.{path.stem}" for path in (ROOT / "runtime").glob("[a-z]*.py")]
    run("\n".join(f"import {name}" for name in names))
