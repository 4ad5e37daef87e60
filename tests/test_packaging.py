"""A clone is the package; so is what is built from it, with every module once."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path
from zipfile import ZipFile

import pytest

from fastface_trt import __version__

ROOT = Path(__file__).parent.parent
LARGE = 200_000  # bytes: weights, which take longer to compress than all else
LINKED = ("engines", "export", "runtime")
BUILT_FROM = (*LINKED, "fastface_trt", "LICENSE", "README.md", "pyproject.toml", "setup.py")
BUILD = (
    "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
)
IMPORT = """
from importlib.util import find_spec
import fastface_trt.engines.files
for name in ("cli.main", "export.options", "runtime.pipeline", "serving.ui.page"):
    assert find_spec(f"fastface_trt.{name}"), name
print(fastface_trt.engines.files.__file__)
"""


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """What a clone holds of the package, its three links among it; large files are empty."""

    def copy(source, target):
        if Path(source).stat().st_size > LARGE:
            return Path(target).touch()
        return shutil.copy(source, target)

    folder = tmp_path_factory.mktemp("clone")
    for name in BUILT_FROM:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name,
                folder / name,
                symlinks=True,
                ignore=shutil.ignore_patterns("__pycache__"),
                copy_function=copy,
            )
        else:
            shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Let setuptools make a wheel or an sdist of a folder, without a network; the file."""

    def build(folder, kind):
        out = tmp_path_factory.mktemp(kind)
        command = [sys.executable, "-c", BUILD, f"build_{kind}", out]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        for left in (folder / "build", *folder.glob("*.egg-info")):
            shutil.rmtree(left, ignore_errors=True)
        (file,) = out.iterdir()
        return file

    return build


@pytest.fixture(scope="module")
def wheel(clone, build):
    return build(clone, "wheel")


def contents(wheel):
    return ZipFile(wheel).namelist()


def expected(folder):
    """The names in a wheel of the package's Python files, and of the files beside them."""
    for path in (file for name in ("fastface_trt", *LINKED) for file in (folder / name).rglob("*")):
        relative = path.relative_to(folder)
        linked = relative.parts[0] == "fastface_trt" and relative.parts[1] in LINKED
        if path.is_file() and not linked:
            top = () if relative.parts[0] == "fastface_trt" else ("fastface_trt",)
            yield "/".join((*top, *relative.parts))


def imported_from(*, path=(), site=(), cwd):
    """Where the package comes from in a Python that has our requirements, but not us."""
    code = f"import site\nfor folder in {list(map(str, site))}: site.addsitedir(folder)\n{IMPORT}"
    found = os.pathsep.join(map(str, (*path, *site, sysconfig.get_path("purelib"))))
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": found},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


def test_a_wheel_holds_what_the_folders_hold_and_each_once(clone, wheel):
    inside = [name for name in contents(wheel) if ".dist-info/" not in name]
    assert [name for name, count in Counter(inside).items() if count > 1] == []
    assert {
        name for name in set(expected(clone)) ^ set(inside) if not name.endswith(".md")
    } == set()


def test_one_version_is_in_the_wheel_the_citation_the_changelog_and_kubernetes(wheel):
    """It stands in `fastface_trt/__init__.py`; a release writes the others after it."""
    said = {"wheel": wheel.name.split("-")[1]}
    for name, pattern in {
        "CITATION.cff": r"^version: (\S+)$",
        "CHANGELOG.md": r"^## (\d\S*)",  # the newest first
        "fastface_trt/serving/deploy/kubernetes.yaml": r"image: \S+:gpu-(\S+)$",
    }.items():
        said[name] = re.search(pattern, (ROOT / name).read_text("utf-8"), re.MULTILINE)[1]
    assert set(said.values()) == {__version__}, said


def test_the_wheel_of_an_sdist_is_the_same(clone, wheel, build, tmp_path):
    shutil.unpack_archive(build(clone, "sdist"), tmp_path)
    (unpacked,) = tmp_path.iterdir()
    assert sorted(contents(build(unpacked, "wheel"))) == sorted(contents(wheel))


def test_a_checkout_without_links_makes_the_same_wheel(clone, wheel, build, tmp_path):
    folder = tmp_path / "clone"
    shutil.copytree(clone, folder, symlinks=True)
    for name in LINKED:
        (folder / "fastface_trt" / name).unlink()
        (folder / "fastface_trt" / name).write_text(f"../{name}")
    assert sorted(contents(build(folder, "wheel"))) == sorted(contents(wheel))


def test_the_wheel_imports(wheel, tmp_path):
    ZipFile(wheel).extractall(tmp_path / "installed")
    found = imported_from(site=[tmp_path / "installed"], cwd=tmp_path)
    assert found == tmp_path / "installed/fastface_trt/engines/files.py"


def test_an_editable_install_imports(clone, build, tmp_path):
    ZipFile(build(clone, "editable")).extractall(tmp_path / "installed")
    found = imported_from(site=[tmp_path / "installed"], cwd=tmp_path)
    assert found.resolve() == clone.resolve() / "engines/files.py"


def test_a_clone_imports_and_mypy_finds_it_without_an_install(clone, tmp_path):
    found = imported_from(path=[clone], cwd=tmp_path)
    assert found.resolve() == clone.resolve() / "engines/files.py"
    command = [sys.executable, "-m", "mypy", "--cache-dir", tmp_path, "--follow-imports", "skip"]
    command += ["-m", "fastface_trt.engines.files", "-m", "fastface_trt.errors"]
    done = subprocess.run(command, cwd=clone, capture_output=True, text=True)
    assert (done.returncode, "2 source files" in done.stdout) == (0, True), done.stdout
