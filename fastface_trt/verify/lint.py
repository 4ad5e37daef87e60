"""Polygraphy's linter on an exported module, with inputs that the module takes.

Left to itself the linter makes up one row for every dynamic size, and a UNet whose rows are not
requests × branches of sizes that it can halve fails in its own Reshapes. A model that fails as a
whole is run node by node, which names the node: minutes on a UNet.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastface_trt.engines.manifest import ModuleSpec
from fastface_trt.engines.onnx.file import verify_module
from fastface_trt.errors import MissingDependency

Array = NDArray[Any]


@dataclass(frozen=True)
class LintEntry:
    """What the linter says about a module or about some of its nodes.

    level: exception (the model is invalid), warning or info. source: onnx_checker, onnxruntime,
    onnx_loader or onnx_graphsurgeon.
    """

    level: str
    source: str
    message: str
    nodes: tuple[str, ...] = ()

    @property
    def is_error(self) -> bool:
        """Whether the model is invalid because of it."""
        return self.level == "exception"


def lint(module: ModuleSpec, folder: Path, inputs: Mapping[str, Array]) -> list[LintEntry]:
    """Lint one module of an export in `folder` with `inputs` by name; an empty list is clean.

    Checks names and ONNX's specification, function bodies included, and runs the model on ONNX
    Runtime; lists nodes and inputs that nothing depends on. Raises `MissingDependency` without
    polygraphy or onnx-graphsurgeon.
    """
    try:
        import onnx_graphsurgeon  # noqa: F401
        from polygraphy.json import save_json
        from polygraphy.logger import G_LOGGER
        from polygraphy.tools.check.subtool.lint import Lint
    except ImportError as error:
        raise MissingDependency(
            f"Linting needs {error.name}.",
            "Install it with: pip install polygraphy onnx-graphsurgeon.",
        ) from None
    with TemporaryDirectory(prefix="fastface-lint-") as temporary:
        feed, report = Path(temporary) / "inputs.json", Path(temporary) / "report.json"
        save_json([{name: np.asarray(array) for name, array in inputs.items()}], str(feed))
        tool = Lint()
        graph = str(verify_module(folder, module))
        arguments = tool.setup_parser().parse_args(
            [graph, "--load-inputs", str(feed), "--output", str(report)]
        )
        with _quiet(G_LOGGER):
            tool.parse(arguments)
            tool.run(arguments)
        entries = json.loads(report.read_text(encoding="utf-8"))["lint_entries"]
    return [
        LintEntry(e["level"], e["source"], e["message"], tuple(e.get("nodes", ()))) for e in entries
    ]


@contextmanager
def _quiet(logger: Any) -> Iterator[None]:
    """Polygraphy's own log off, and the process's real streams in place.

    It catches what ONNX Runtime writes on the streams' descriptors, which a Python object that
    stands in for them does not have.
    """
    out, err = sys.__stdout__ or sys.stdout, sys.__stderr__ or sys.stderr
    with logger.verbosity(logger.CRITICAL), redirect_stdout(out), redirect_stderr(err):
        yield
