"""The documentation as text: sizes, links, names of commands and options, marks of blocks."""

import ast
import importlib.util
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
import tomllib

from fastface_trt import errors
from fastface_trt.cli.main import cli
from tests.docs.pages import ALL, LANGUAGES, NEEDS, PAGES, ROOT, anchors

LINK = re.compile(r"\]\((?!https?:|mailto:)([^)#\s]*)(?:#([^)\s]*))?\)")
COMMAND_PAGES = [*PAGES, ROOT / ".github/workflows/tests.yml"]


def prose(page):
    return re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)


def name(value):
    return str(value.relative_to(ROOT)) if isinstance(value, Path) else str(value)


def test_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 10_000


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for target, anchor in LINK.findall(prose(page)):
        place = (page.parent / target).resolve() if target else page
        assert place.is_file(), target
        if anchor and place.suffix == ".md":
            assert anchor in anchors(place), f"{target}#{anchor}"


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert re.search(rf"- (?:.*: )?{re.escape(page.name)}$", navigation, re.MULTILINE), page


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_nothing_is_indented_code(page):
    """Every block of code is a fence, so that its mark and language can be seen."""
    assert not re.search(r"\n\n {4}(?![-*\d])\S", prose(page))


@pytest.mark.parametrize("block", ALL, ids=name)
def test_blocks_run_or_say_why_not(block):
    assert block.language in LANGUAGES
    kind, _, value = block.mark.partition(": ")
    if kind == "needs":
        assert set(value.split(", ")) <= NEEDS
    elif kind == "run by":
        assert (ROOT / value).is_file()
    else:
        assert not block.mark
        assert block.runs or block.language == "text"


@pytest.mark.parametrize("block", [b for b in ALL if b.language == "python"], ids=name)
def test_python_compiles(block):
    ast.parse(block.text)


def commands(text):
    """The words of every `fastface-trt` command in a shell script."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        for index, word in enumerate(words):
            if word == "fastface-trt" and index + 1 < len(words):
                end = next(
                    (i for i, w in enumerate(words[index:], index) if w in ("|", "&&", ";")), None
                )
                yield words[index + 1 : end]


def options_of(command):
    """A command's options; of a group also those of its commands."""
    own = {opt for one in command.params for opt in (*one.opts, *one.secondary_opts)}
    children = command.commands.values() if isinstance(command, click.Group) else ()
    return own.union(*map(options_of, children))


@pytest.mark.parametrize("block", [b for b in ALL if b.language == "sh"], ids=name)
def test_commands_and_options_exist(block):
    for command, *words in commands(block.text):
        options = options_of(cli.commands[command])
        for word in words:
            if word.startswith("--"):
                assert word.split("=")[0] in options, f"{command} {word}"


@pytest.mark.parametrize("page", COMMAND_PAGES, ids=name)
def test_named_commands_targets_and_modules_exist(page):
    text = page.read_text("utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for named in re.findall(r"(?:`|^|run: )make ([a-z][a-z-]*(?: [a-z-]+)*)", text, re.MULTILINE):
        assert set(named.split()) <= targets, named
    for command in re.findall(r"fastface-trt ([a-z][a-z-]*)", text):
        assert command in cli.commands, command
    for module in re.findall(r"python3? -m ([\w.]+)", text):
        assert importlib.util.find_spec(module), module
    for path in re.findall(r"`((?:tests|runtime|engines|export|benchmarks)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path


def test_extras_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for page in PAGES:
        for extras in re.findall(r"'(?:\.|fastface-trt)\[([\w,-]+)\]'", page.read_text("utf-8")):
            assert set(extras.split(",")) <= project["optional-dependencies"].keys(), extras


def test_every_error_is_explained():
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs/troubleshooting.md").read_text(), re.M)
    known = [
        one.code
        for one in vars(errors).values()
        if isinstance(one, type) and issubclass(one, errors.FastFaceError) and one.code != "error"
    ]
    assert rows == known


def test_packages_of_the_drawing_import_downwards():
    drawing = (ROOT / "docs/images/packages.svg").read_text()
    height = {
        package: int(y)
        for y, package in re.findall(r'class="package".* y="(\d+)".*>(\w+)</text>', drawing)
    }
    folder = ROOT / "fastface_trt"
    modules = {path.stem for path in folder.iterdir() if (path / "__init__.py").is_file()}
    assert height.keys() == modules | {"errors", "checkpoints"}
    for package in height:
        place = ROOT / package if (ROOT / package).is_dir() else folder / package
        for path in [*place.rglob("*.py")] or [folder / f"{package}.py"]:
            for used in re.findall(r"from fastface_trt\.(\w+)", path.read_text("utf-8")):
                assert used == package or height[package] < height[used], f"{path}: {used}"


def test_readme_for_an_index_has_absolute_links():
    convert = runpy.run_path(str(ROOT / "setup.py"))["readme_for_an_index"]
    text = (ROOT / "README.md").read_text("utf-8")
    assert convert(text, None) == text
    converted = convert(text, "https://example.org/somebody/fastface")
    assert not [target for target, _ in LINK.findall(converted) if target]
    assert "](https://example.org/somebody/fastface/raw/HEAD/benchmarks/results/" in converted
    assert "](https://example.org/somebody/fastface/blob/HEAD/docs/quick-start.md#" in converted


def test_the_site_is_built_strictly(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    done = subprocess.run(
        [*build, "--site-dir", str(tmp_path / "site")], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    built = {path.relative_to(tmp_path / "site") for path in (tmp_path / "site").rglob("*")}
    assert {Path("index.html"), Path("command-line.html"), Path("architecture.html")} <= built
    assert Path("repository/runtime/sampling.py.html") in built
    assert Path("repository/benchmarks/results/demo-prompts.png") in built
