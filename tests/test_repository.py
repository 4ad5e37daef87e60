"""Rules of the house that no linter knows: who imports torch, how long files are, README."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = {
    "diffusers",
    "modelopt",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "peft",
    "torch",
    "transformers",
}
CODE = [
    path
    for folder in ("fastface_trt", "export", "engines", "runtime", "benchmarks", "tests")
    for path in (ROOT / folder).rglob("*.py")
]


def imports(path):
    """Top-level names imported anywhere in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield (node.module or "").split(".")[0]


@pytest.mark.parametrize("folder", ["runtime", "engines", "fastface_trt"])
def test_only_export_imports_torch(folder):
    offenders = {
        str(path.relative_to(ROOT)): heavy
        for path in (ROOT / folder).rglob("*.py")
        if (heavy := HEAVY & set(imports(path)))
    }
    # Asked for by name: the projection of a replayed recording, and CLIP as a judge of pictures.
    for name in ("fastface_trt/replay.py", "fastface_trt/evaluation/clip_judges.py"):
        offenders.pop(name, None)
    # The benchmark counts operations from the graph and writes one of its own, only when asked.
    for file in ("static_graph", "roofline"):
        assert offenders.pop(f"fastface_trt/bench/{file}.py", None) in (None, {"onnx"})
    # Graphs are rewritten when an engine is built; opening one imports nothing of it.
    for file in (
        *("onnx/attention", "onnx/functions", "onnx/graph", "onnxruntime_operator"),
        "tensorrt/plugin_function",
    ):
        assert offenders.pop(f"engines/{file}.py", None) in (None, {"onnx"})
    assert offenders == {}


def test_runtime_imports_without_torch():
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(('torch', 'diffusers', 'transformers')))\n"
        "import fastface_trt.runtime, fastface_trt.runtime.pipeline, fastface_trt.cli.main\n"
        "from fastface_trt import FastFace\n"
        "assert all(sys.modules[n] is None for n in ('torch', 'diffusers', 'transformers'))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    code = "import fastface_trt.runtime, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_dependencies_point_one_way():
    below = {
        "engines": {"runtime", "export", "cli", "pipeline"},
        "runtime": {"export", "cli", "pipeline"},
        "export": {"runtime", "cli", "pipeline"},
    }
    for folder, forbidden in below.items():
        for path in (ROOT / folder).rglob("*.py"):
            used = set(re.findall(r"from fastface_trt\.(\w+)", path.read_text()))
            assert not used & forbidden, f"{path.name} imports {used & forbidden}"


def test_readme_links_and_commands_exist():
    readme = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", readme):
        assert (ROOT / target).exists(), target
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for target in re.findall(r"`make ([a-z-]+)`", readme):
        assert target in targets, target
    from fastface_trt.cli.main import cli

    for command in re.findall(r"fastface-trt ([a-z]+)", readme):
        assert command in cli.commands, command
