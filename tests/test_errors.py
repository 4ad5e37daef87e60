"""Errors cross from a worker's process to the server's as they are; hints name what works."""

import importlib.metadata
import pickle
import re
import shlex
import subprocess
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
