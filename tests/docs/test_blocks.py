"""Blocks of the pages, and the examples, run as they stand there on the mini model."""

import json
import os
import subprocess
import sys

import pytest
from PIL import Image

from tests.docs.pages import PAGES, ROOT, blocks

RUNNING = [page for page in PAGES if any(block.runs for block in blocks(page))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NO_TORCH = "import sys; sys.modules.update(dict.fromkeys(('torch', 'diffusers', 'transformers')))\n"


@pytest.fixture
def clone(tmp_path):
    """A folder with the clone's files, the command line on PATH, and a picture `me.png`."""
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "fastface-trt"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m fastface_trt.cli.main "$@"\n')
    command.chmod(0o755)
    work = tmp_path / "work"
    work.mkdir()
    for name in ("fastface_trt", "tests", "benchmarks"):
        (work / name).symlink_to(ROOT / name)
    (work / "me.png").write_bytes((ROOT / "fastface_trt/mini/faces/ada.png").read_bytes())
    return work


def run(command, work):
    path = f"{work.parent / 'bin'}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command,
        cwd=work,
        env=os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("page", RUNNING, ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_of_a_page(page, clone):
    for block in blocks(page):
        if block.runs and block.language == "sh":
            run(["bash", "-euo", "pipefail", "-c", block.text], clone)
        elif block.runs:
            run([sys.executable, "-c", NO_TORCH + block.text], clone)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example(example, clone):
    """Written pictures are of the mini model's size and not of one colour."""
    code = NO_TORCH + f"import runpy; sys.argv[1:] = ['made']; runpy.run_path({str(example)!r})"
    assert run([sys.executable, "-c", code], clone)
    pictures = list((clone / "made").glob("*.png"))
    assert pictures
    for path in pictures:
        picture = Image.open(path).convert("L")
        assert min(picture.size) >= 96
        low, high = picture.getextrema()
        assert high - low > 50


def test_notebook(clone):
    """Its cells, one after the other; it is stored without output."""
    notebook = json.loads((ROOT / "examples/tour.ipynb").read_text("utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)
    code = "\n".join("".join(cell["source"]) for cell in cells)
    out = run([sys.executable, "-c", f"{NO_TORCH}{code}\nprint(sheet.size)"], clone)
    assert out.splitlines()[-1].startswith("(")


def test_examples_are_listed():
    listed = (ROOT / "examples/README.md").read_text("utf-8")
    for path in (ROOT / "examples").iterdir():
        assert path.name == "README.md" or f"]({path.name})" in listed
