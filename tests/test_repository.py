"""Rules of the house that no linter knows: who imports whom and torch, how many files, README."""

import ast
import subprocess
import sys
from collections import defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "fastface_trt"
FOLDERS = ("fastface_trt", "engines", "export", "runtime")
MOST_FILES = 250

FOUNDATION = {"errors", "checkpoints", "engines", "mini"}
"""Beside "fastface_trt" itself, which is the version and the lazily imported interface."""
MAY_IMPORT = {
    "errors": set(),
    "mini": set(),
    "engines": {"errors"},
    "checkpoints": {"errors", "engines", "mini"},
    "runtime": FOUNDATION | {PACKAGE},
    PACKAGE: {"errors", "runtime"},
    "export": FOUNDATION | {PACKAGE, "runtime", "measure"},
    "measure": {"errors", "engines", PACKAGE},
    "embedding": FOUNDATION | {PACKAGE, "runtime"},
    "serving": FOUNDATION | {PACKAGE, "runtime", "measure"},
    # These reach for PyTorch through the export, when they are asked to.
    "verify": FOUNDATION | {PACKAGE, "runtime", "export", "measure"},
    "bench": FOUNDATION | {PACKAGE, "runtime", "export", "measure"},
    "evaluation": FOUNDATION | {PACKAGE, "runtime", "export", "measure", "verify"},
}
"""Parts of the package, and the parts that each may import; the command line imports all."""

HEAVY = {
    "accelerate",
    "diffusers",
    "ml_dtypes",
    "modelopt",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "peft",
    "torch",
    "transformers",
}
MAY_IMPORT_HEAVY = {
    # PyTorch, asked for by name: the projection of a replayed recording, judges of pictures, and
    # the UNet whose marked outputs are compared.
    "verify.replay": {"torch"},
    "verify.marked_outputs": {"torch", "onnx", "onnx_ir"},
    "evaluation.judges": {"torch", "transformers"},
    # Operations are counted in the graph, and small graphs made, when a benchmark wants them.
    "bench.flops": {"onnx"},
    "bench.roofline": {"onnx"},
    # Graphs are rewritten when an engine is built; opening one imports nothing of it.
    "engines.onnx.attention": {"onnx"},
    "engines.onnx.functions": {"onnx"},
    "engines.onnx.graph": {"onnx"},
    "engines.ort.operator": {"onnx"},
    "engines.tensorrt.plugin": {"onnx"},
}


def module_name(path):
    """Of a file of the package, as it is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == PACKAGE else (PACKAGE, *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def python_files(folder):
    """The files of a folder, and none of them a second time through a link."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        if not any(parent.is_symlink() for parent in path.parents):
            yield path


MODULES = {module_name(path): path for folder in FOLDERS for path in python_files(folder)}


def part(module):
    """The part of the package that a module belongs to."""
    return module.split(".")[1] if "." in module else module


def is_for_types(node):
    """Whether a statement is what only a type checker sees."""
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(tree, when="any"):
    """Full names that a file imports; with `when="loaded"` only those that its import imports."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield (
                    name if name in MODULES or not node.module.startswith(PACKAGE) else node.module
                )
        later = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or is_for_types(node)
        if when == "any" or not later:
            yield from imports(node, when)


TREES = {name: ast.parse(path.read_text("utf-8")) for name, path in MODULES.items()}


def test_parts_import_what_they_may():
    offenders = defaultdict(set)
    for module, tree in TREES.items():
        allowed = MAY_IMPORT.get(part(module))
        for name in imports(tree):
            if name.startswith(PACKAGE) and part(name) != part(module):
                assert part(name) != "cli", f"{module} imports the command line"
                if allowed is not None and part(name) not in allowed:
                    offenders[module].add(name)
    assert offenders == {}


def test_every_part_has_its_rule():
    assert {part(module) for module in MODULES} == {*MAY_IMPORT, "cli"}


def test_no_module_imports_itself_by_a_circle():
    """Nothing that is imported when a module is; what functions import is done by then."""
    graph = {
        module: {name for name in imports(tree, "loaded") if name in MODULES} - {module}
        for module, tree in TREES.items()
    }
    TopologicalSorter(graph).prepare()


def test_only_export_imports_torch():
    offenders = {}
    for module, tree in TREES.items():
        heavy = HEAVY & {name.split(".")[0] for name in imports(tree)}
        short = module.removeprefix(f"{PACKAGE}.")
        if part(module) != "export" and heavy - MAY_IMPORT_HEAVY.get(short, set()):
            offenders[short] = heavy
    assert offenders == {}
    assert {f"{PACKAGE}.{name}" for name in MAY_IMPORT_HEAVY} <= MODULES.keys()


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


def test_the_package_stays_small_and_its_root_empty():
    assert len(MODULES) <= MOST_FILES
    root = {path.name for path in (ROOT / PACKAGE).iterdir() if path.is_file()}
    assert root == {"__init__.py", "checkpoints.py", "errors.py", "py.typed"}


def test_links_make_a_clone_the_package():
    for folder in FOLDERS[1:]:
        link = ROOT / PACKAGE / folder
        if link.is_file():
            pytest.skip("this checkout holds files in place of links")
        assert link.readlink() == Path("..") / folder
