"""Errors cross from a worker's process to the server's as they are; hints name what works."""

import importlib.metadata
import pickle
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from fastface_trt import errors
from fastface_trt.errors import Busy, NoFaceFound, UnknownName, install_hint

ROOT = Path(__file__).parent.parent


def test_errors_survive_pickling():
    for error in (
        NoFaceFound("No face.", "Take another."),
        UnknownName("preset", "am3", ("am1", "am2")),
        Busy("Full.", "Come back.", retry_after=2.5),
    ):
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is type(error)
        assert (copy.message, copy.hint, str(copy), vars(copy)) == (
            error.message,
            error.hint,
            str(error),
            vars(error),
        )


def test_a_clone_installs_itself_with_the_extra():
    assert shlex.split(install_hint("serve", "ray")) == [
        *["pip", "install", "-e"],
        f"{ROOT}[serve,ray]",
    ]


def test_a_clone_in_a_folder_with_spaces_is_one_word(tmp_path, monkeypatch):
    folder = tmp_path / "it's a clone"
    folder.mkdir()
    (folder / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    monkeypatch.setattr(errors, "_SOURCES", folder)
    assert shlex.split(install_hint("heif"))[-1] == f"{folder}[heif]"


@pytest.mark.parametrize(
    "extras", [("serve",), ("export", "evaluate"), ("tensorrt-rtx",), ("gpu",)]
)
def test_without_a_clone_the_command_names_what_the_extras_ask_for(extras, tmp_path, monkeypatch):
    monkeypatch.setattr(errors, "_SOURCES", tmp_path)
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "somebody-elses"')

    def facts(requirement):
        return requirement.name, str(requirement.specifier), frozenset(requirement.extras)

    wanted = {
        facts(one)
        for one in map(Requirement, importlib.metadata.requires("fastface-trt"))
        if one.marker and any(one.marker.evaluate({"extra": extra}) for extra in extras)
    }
    words = shlex.split(install_hint(*extras))
    assert words[:2] == ["pip", "install"]
    named = map(Requirement, words[2:])
    assert {facts(o) for o in named if not o.marker or o.marker.evaluate()} == wanted != set()


def test_no_hint_names_the_package_as_if_an_index_had_it():
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    for name in done.stdout.split():
        path = ROOT / name
        if (
            path.suffix in (".py", ".md", ".toml", ".yaml")
            and path.is_file()
            and path != Path(__file__)
        ):
            assert not re.search(r"pip install '?fastface-trt", path.read_text("utf-8")), name


@pytest.mark.parametrize("module", ["runtime.face", "runtime.picture_file"])
def test_opencv_that_lacks_a_library_is_one_sentence_with_its_packages(module, tmp_path):
    """A module cv2 that fails as OpenCV's own does on a system without libGL."""
    (tmp_path / "cv2.py").write_text(
        "raise ImportError('libGL.so.1: cannot open shared object file: No such file or directory')"
    )
    face = ROOT / "fastface_trt/mini/faces/ada.png"
    code = {
        "runtime.face": "from fastface_trt.cli.main import main; import sys; "
        f"sys.argv[1:] = ['generate', '--face', {str(face)!r}, '--prompt', 'x']; main()",
        "runtime.picture_file": "import numpy as np\n"
        "from fastface_trt.errors import MissingDependency\n"
        "from fastface_trt.runtime.picture_file import encode_picture\n"
        "try: encode_picture(np.zeros((8, 8, 3), np.uint8), parameters={})\n"
        "except MissingDependency as error: sys.exit('Error: ' + str(error))",
    }[module]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{code}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode in (1, 2)
    assert "Traceback" not in done.stderr
    said = " ".join(done.stderr.partition("Error: ")[2].split())
    assert said.startswith("OpenCV cannot be imported: libGL.so.1: cannot open shared object file")
    assert "apt-get install -y libgl1 libglib2.0-0" in said
