"""`--layers`: the first tensor inside a module where a backend leaves ONNX Runtime, and why.

A copy of the ONNX with some inner tensors as further outputs is built on the backend and run on the
reference, and the search narrows down to a tensor that is beyond the tolerance while what it is
computed from is not. Then the call of a model-local function is opened and searched inside, and a
float64 evaluation of the tensor says which of the two sides is nearer to the truth.

Outputs change what a backend may fuse: each is a wall that no kernel reaches across. A difference
that disappears once a tensor is returned comes from such a fusion, and is reported as that.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastface_trt.engines.cache import EngineCache
from fastface_trt.engines.engine import EngineBuilder, Progress
from fastface_trt.engines.files import storage_errors
from fastface_trt.engines.manifest import Dimension, ExportManifest
from fastface_trt.errors import MissingDependency, install_hint
from fastface_trt.verify.difference import Difference, compare
from fastface_trt.verify.inputs import module_inputs
from fastface_trt.verify.modules import ModuleVerdict, run_backend, run_reference
from fastface_trt.verify.search import Found, Search

if TYPE_CHECKING:
    from fastface_trt.verify.marked_outputs import MarkableModule

Array = NDArray[Any]


@dataclass(frozen=True)
class Float64Verdict:
    """Relative L2 distances of both sides from float64, for the tensor that was found."""

    backend: float
    reference: float

    @property
    def nearer(self) -> str:
        """`backend`, `reference`, or `neither` where they differ less than twofold."""
        low, high = sorted((self.backend, self.reference))
        if high <= 2 * low:
            return "neither"
        return "backend" if self.backend == low else "reference"


@dataclass(frozen=True)
class LayerReport:
    """The tensor where a module parts from its reference; see `Found` for what it means.

    `scope` is the PyTorch module, `inside` names the function whose call was opened to get there,
    `opened_away` one whose difference disappeared when it was opened. `searched` tensors were
    compared in `builds` builds, out of `tensors`.
    """

    module: str
    tensor: str
    op: str
    node: str
    scope: str
    dtype: str
    shape: tuple[int, ...]
    symbolic_shape: tuple[Dimension, ...]
    tolerance: float
    difference: Difference
    producers: Mapping[str, Difference]
    vanished: tuple[str, ...]
    excused: bool
    inside: str
    opened_away: str
    tensors: int
    searched: int
    builds: int
    float64: Float64Verdict | None
    suggestion: str

    def as_json(self) -> dict[str, Any]:
        """The report for machines."""
        plain = {
            name: getattr(self, name)
            for name in self.__dataclass_fields__
            if name not in ("difference", "producers", "float64")
        }
        float64 = self.float64
        return plain | {
            "difference": self.difference.as_json(),
            "producers": {name: d.as_json() for name, d in self.producers.items()},
            "float64": float64
            and {
                "backend": float64.backend,
                "reference": float64.reference,
                "nearer": float64.nearer,
            },
        }


def find_layer(
    folder: Path,
    manifest: ExportManifest,
    verdict: ModuleVerdict,
    builder: EngineBuilder,
    *,
    marks: int = 16,
    float64: bool = True,
    seed: int = 0,
    threads: int | None = None,
    progress: Progress = lambda line: None,
) -> LayerReport | None:
    """Search the module of a `verdict` that does not agree; None when its floats do.

    `marks` tensors are compared per build: more need fewer builds, and memory for the outputs.
    `float64` evaluates the tensor that was found, from the module's inputs on, on one CPU: minutes
    for a full-size UNet. Raises `MissingDependency` without the export extra, and the errors of
    building and running an engine.
    """
    if verdict.agrees:
        return None
    markable = _markable_module()
    module = manifest.modules[verdict.module]
    inputs = module_inputs(module, manifest, folder, seed=seed)
    both = _BothSides(inputs, builder, threads, progress)
    graph = markable(module, folder)
    for name, difference in verdict.differences.items():
        if name in graph.names and difference.exceeds(verdict.tolerance):
            break
    else:  # rounding to whole numbers is all that differs
        return None
    search = Search(graph, both.measuring(graph), verdict.tolerance, marks=marks)
    found = search.run(name, difference)
    builds, searched, tensors = search.builds, len(search.known), len(graph.names)
    inside = opened_away = ""
    if graph.info(found.name).calls and not found.excused and not found.vanished:
        call = graph.info(found.name).op
        opened = markable(module, folder, inline=True)
        search = Search(
            opened, both.measuring(opened), verdict.tolerance, marks=marks, known=found.producers
        )
        deeper = search.run(found.name, found.difference)
        builds, searched = builds + search.builds, searched + len(search.known)
        tensors += len(opened.names)
        if deeper.vanished or deeper.excused:
            opened_away = call
        else:
            found, inside, graph = deeper, call, opened
    ours, reference = both.values(graph, found.name)
    judged = None
    if float64 and not found.vanished:
        progress(f"Computing {found.name} of {verdict.module} in float64")
        judged = _judge(markable(module, folder, inline=True), found.name, inputs, ours, reference)
    info = graph.info(found.name)
    return LayerReport(
        module=verdict.module,
        tensor=found.name,
        op=info.op,
        node=info.node,
        scope=info.scope,
        dtype=info.dtype,
        shape=reference.shape,
        symbolic_shape=info.shape,
        tolerance=verdict.tolerance,
        difference=found.difference,
        producers=found.producers,
        vanished=found.vanished,
        excused=found.excused,
        inside=inside,
        opened_away=opened_away,
        tensors=tensors,
        searched=searched,
        builds=builds,
        float64=judged,
        suggestion=_suggestion(found, judged, info.scope or info.node, info.op, opened_away),
    )


class _BothSides:
    """Builds and runs marked copies of a module on the backend and on the reference."""

    def __init__(
        self,
        inputs: Mapping[str, Array],
        builder: EngineBuilder,
        threads: int | None,
        progress: Progress,
    ) -> None:
        self._inputs = inputs
        self._builder = builder
        self._threads = threads
        self._progress = progress
        self._last: dict[str, tuple[Array, Array]] = {}

    def measuring(
        self, graph: "MarkableModule"
    ) -> Callable[[Sequence[str]], Mapping[str, Difference]]:
        """What `Search` calls; operands of sums are computed on the reference only."""

        def measure(names: Sequence[str]) -> Mapping[str, Difference]:
            self._progress(f"Comparing {len(names)} tensors of {graph.module.name}")
            ours = self._run(graph, names, on_reference=False)
            operands = {name: graph.cancelling(name) for name in names}
            more = [operand for some in operands.values() for operand in some]
            reference = self._run(graph, [*dict.fromkeys([*names, *more])], on_reference=True)
            self._last = {name: (ours[name], reference[name]) for name in names}
            return {
                name: compare(ours[name], reference[name], [reference[o] for o in operands[name]])
                for name in names
            }

        return measure

    def values(self, graph: "MarkableModule", name: str) -> tuple[Array, Array]:
        """One tensor on the backend and on the reference; built again unless just measured."""
        if name not in self._last:
            self.measuring(graph)([name])
        return self._last[name]

    def _run(
        self, graph: "MarkableModule", names: Sequence[str], *, on_reference: bool
    ) -> dict[str, Array]:
        with TemporaryDirectory(prefix="fastface-verify-") as temporary:
            root = Path(temporary)
            with storage_errors(root):
                module = graph.write(names, root / "onnx")
            if on_reference:
                values = run_reference(module, root / "onnx", self._inputs, threads=self._threads)
            else:
                cache = EngineCache(root / "engines")  # of no use to anybody afterwards
                values = run_backend(
                    module, root / "onnx", self._inputs, self._builder, cache, lambda line: None
                )
        return {name: values[graph.output_name(name)] for name in names}


def _judge(
    graph: "MarkableModule",
    name: str,
    inputs: Mapping[str, Array],
    ours: Array,
    reference: Array,
) -> Float64Verdict:
    from fastface_trt.verify.marked_outputs import evaluate_float64

    truth = evaluate_float64(graph, name, inputs)
    return Float64Verdict(
        compare(ours, np.asarray(truth)).relative_l2,
        compare(reference, np.asarray(truth)).relative_l2,
    )


def _suggestion(
    found: Found, judged: Float64Verdict | None, where: str, op: str, opened_away: str
) -> str:
    if found.vanished:
        return (
            f"The difference disappears when {', '.join(found.vanished)} is returned, too: the "
            "backend fuses across it. Build with a lower optimisation level, or report the fusion."
        )
    if found.excused:
        return (
            "No operator is at fault: sums whose operands nearly cancel make rounding errors "
            "large. Compute the modules around them in fp32, or accept a higher --tolerance."
        )
    if opened_away:
        return (
            f"The difference disappears when the body of {opened_away} is spelled out: the "
            f"backend's own implementation of {opened_away} in {where} is at fault."
        )
    if judged is None:
        return f"Keep {where} in fp32, or report {op} to the backend's makers."
    if judged.nearer == "backend":
        return (
            f"The backend is nearer to float64 than ONNX Runtime: {op} in {where} loses precision "
            "as exported. Export in a wider precision to compare with."
        )
    if judged.nearer == "neither":
        return (
            f"Both sides are about as far from float64: {op} in {where} loses precision as "
            "exported. Keep it in fp32."
        )
    return f"The backend is wrong in {op} of {where}: keep it in fp32, or report it."


def _markable_module() -> "type[MarkableModule]":
    try:
        from fastface_trt.verify.marked_outputs import MarkableModule
    except ImportError as error:
        raise MissingDependency(
            f"verify --layers needs {error.name}.",
            f"Install it with: {install_hint('export')}",
        ) from None
    return MarkableModule
