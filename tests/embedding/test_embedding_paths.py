"""What a build asks the package for, and what header, library and Python agree on."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from fastface_trt import errors
from fastface_trt.cli.main import cli
from fastface_trt.embedding import __main__ as paths
from fastface_trt.errors import FastFaceError

HEADER = (paths.INCLUDES / "fastface_trt.h").read_text()


def codes():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    return {kind.code for kind in kinds if issubclass(kind, FastFaceError)}


def printed(*options):
    return CliRunner().invoke(cli, ["embedding", *options]).output.splitlines()


def test_paths_lead_to_the_files():
    (include,) = printed("--includes")
    assert {file.name for file in Path(include.removeprefix("-I")).iterdir()} == {
        "fastface_trt.h",
        "fastface.hpp",
    }
    sources = printed("--sources")
    assert sources
    assert all(Path(file).suffix == ".cpp" and Path(file).is_file() for file in sources)
    for options in ((), ("--cmake-dir",)):
        (folder,) = printed(*options)
        assert (Path(folder) / "CMakeLists.txt").is_file()


def test_cmake_compiles_every_source():
    cmake = (paths.CMAKE_DIR / "CMakeLists.txt").read_text()
    assert set(re.findall(r"src/(\w+\.cpp)", cmake)) == {file.name for file in paths.sources()}


def test_the_module_is_a_command_too():
    done = subprocess.run(
        [sys.executable, "-m", "fastface_trt.embedding", "--cmake-dir"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [str(paths.CMAKE_DIR)]


@pytest.mark.parametrize("code", sorted(codes()))
def test_every_error_has_a_status(code):
    host = (paths.CMAKE_DIR / "src" / "fastface_host.cpp").read_text()
    constant = f"FASTFACE_{code.upper()}"
    assert re.search(rf"\b{constant} = \d+", HEADER), constant
    assert f'{{"{code}", {constant}}}' in host


def test_no_status_is_given_twice():
    numbers = re.findall(r"^  FASTFACE_\w+ = (\d+)", HEADER, re.M)
    assert len(numbers) == len(set(numbers)) >= len(codes())


def test_the_wheel_brings_the_files():
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert '"fastface_trt.embedding" = ["CMakeLists.txt", "include/*"' in project
