"""Copies of an ONNX module that also return tensors from their inside, for comparing backends.

Polygraphy marks outputs, too (`polygraphy.backend.onnx.ModifyOutputs`), on a model whose weights
are in memory and not inside functions. Here weights stay where they are (the copy refers to a hard
link of the data file), and calls of model-local functions can be opened first, so that a search
gets inside `DecoupledAttention`.
"""

import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, ShapeInferencePass

from fastface_trt.engines.files import describe_file
from fastface_trt.engines.manifest import Dimension, DType, ModuleSpec, TensorSpec
from fastface_trt.engines.onnx_file import MODULE_KEY

_FLOATS: Final[dict[ir.DataType, DType]] = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "float32",  # returned through a Cast: numpy has no bfloat16
}
_ROUNDING = ("Ceil", "Floor", "Round", "Sign")
_KEEPS_COUNTS = (
    "Cast",
    "Expand",
    "Identity",
    "Mul",
    "ReduceSum",
    "Reshape",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
)


@dataclass(frozen=True)
class TensorInfo:
    """A tensor inside a module: what computes it, from which PyTorch module, and its ONNX shape.

    `scope` is the dotted module name, empty where the exporter recorded none. `calls` says that the
    operator is a call of a model-local function.
    """

    name: str
    op: str
    node: str
    scope: str
    dtype: str
    shape: tuple[Dimension, ...]
    calls: bool


class MarkableModule:
    """The tensors of one ONNX module that can be compared, in topological order, and copies.

    A tensor counts when it is floating point and depends on an input. Whole numbers made by
    comparing or rounding do not: there an error of 1e-7 upstream is rightly a step of 1. With
    `inline` every call of a model-local function is replaced by the function's body; names of the
    main graph's tensors stay, and the new nodes carry the scope of the call.
    """

    def __init__(self, module: ModuleSpec, folder: Path, *, inline: bool = False) -> None:
        self.module = module
        self.inlined = inline
        self._folder = folder
        self.model = ir.load(folder / module.files[0].path)
        if inline and self.model.functions:
            InlinePass()(self.model)
            ShapeInferencePass()(self.model)
        self._values: dict[str, ir.Value] = {}
        self._inputs_of: dict[str, tuple[str, ...]] = {}
        self._read()

    @property
    def names(self) -> tuple[str, ...]:
        """The comparable tensors, in topological order."""
        return tuple(self._values)

    def producers(self, name: str) -> frozenset[str]:
        """The nearest comparable tensors that `name` is computed from; empty for module inputs."""
        found: set[str] = set()
        seen: set[str] = set()
        waiting = list(self._inputs_of[name])
        while waiting:
            above = waiting.pop()
            if above in seen:
                continue
            seen.add(above)
            if above in self._values:
                found.add(above)
            else:
                waiting += self._inputs_of.get(above, ())
        return frozenset(found)

    def ancestors(self, name: str) -> frozenset[str]:
        """All comparable tensors that `name` is computed from, itself not among them."""
        seen: set[str] = set()
        waiting = list(self._inputs_of[name])
        while waiting:
            above = waiting.pop()
            if above not in seen:
                seen.add(above)
                waiting += self._inputs_of.get(above, ())
        return frozenset(seen & self._values.keys())

    def cancelling(self, name: str) -> tuple[str, ...]:
        """The comparable operands of `name` where it is a sum or difference, which can cancel."""
        node = self._values[name].producer()
        if node is None or node.op_type not in ("Add", "Sub"):
            return ()
        return tuple(operand for operand in self._inputs_of[name] if operand in self._values)

    def info(self, name: str) -> TensorInfo:
        """What is known about tensor `name`."""
        value = self._values[name]
        node = value.producer()
        assert node is not None  # inputs and weights are not among the values
        return TensorInfo(
            name=name,
            op=node.op_type,
            node=node.name or "",
            scope=node.metadata_props.get(MODULE_KEY, ""),
            dtype=value.dtype.name.lower() if value.dtype is not None else "unknown",
            shape=_dimensions(value),
            calls=bool(node.domain),
        )

    def nodes_above(self, name: str) -> Iterator[ir.Node]:
        """The nodes that tensor `name` depends on, its own last, in topological order."""
        needed = {name}
        order = list(self.model.graph)
        chosen = []
        for node in reversed(order):
            if any(output.name in needed for output in node.outputs):
                chosen.append(node)
                needed.update(v.name for v in node.inputs if v is not None and v.name)
        return reversed(chosen)

    def write(self, names: Iterable[str], target: Path) -> ModuleSpec:
        """Write a copy whose outputs are the module's and tensors `names` into folder `target`.

        Returns the copy's module entry; its files lie in `target`/NAME. Weights beside the graph
        are linked, or copied where the disks differ. Raises `OSError` for a full disk.
        """
        graph = self.model.graph
        outputs = {value.name for value in graph.outputs}
        marked = [self._values[name] for name in names if name not in outputs]
        casts = [
            ir.node("Cast", [value], {"to": ir.DataType.FLOAT}, num_outputs=1)
            for value in marked
            if self._is_cast(value)
        ]
        specs = list(self.module.outputs)
        before = list(graph.outputs)
        try:
            for cast in casts:
                cast.outputs[0].name = self.output_name(cast.inputs[0].name)
                cast.outputs[0].dtype = ir.DataType.FLOAT
                cast.outputs[0].shape = cast.inputs[0].shape
                graph.append(cast)
            renamed = {cast.inputs[0].name: cast.outputs[0] for cast in casts}
            for value in marked:
                output = renamed.get(value.name, value)
                graph.outputs.append(output)
                specs.append(
                    TensorSpec(
                        name=output.name, dtype=_FLOATS[value.dtype], shape=_dimensions(value)
                    )
                )
            return self._save(target, tuple(specs))
        finally:
            graph.outputs[:] = before
            graph.remove(casts, safe=True)

    def output_name(self, name: str) -> str:
        """What tensor `name` is called among the outputs of a copy."""
        return f"{name}.float32" if self._is_cast(self._values[name]) else name

    def _is_cast(self, value: ir.Value) -> bool:
        own = value.name in {tensor.name for tensor in self.module.outputs}
        return value.dtype == ir.DataType.BFLOAT16 and not own

    def _save(self, target: Path, outputs: tuple[TensorSpec, ...]) -> ModuleSpec:
        folder = target / self.module.name
        folder.mkdir(parents=True)
        source, *data = self.module.files
        graph = folder / Path(source.path).name
        ir.save(self.model, graph)
        files = [describe_file(target, graph)]
        for entry in data:
            place = folder / os.path.relpath(entry.path, Path(source.path).parent)
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(self._folder / entry.path, place)
            except OSError:
                shutil.copyfile(self._folder / entry.path, place)
            files.append(entry.model_copy(update={"path": place.relative_to(target).as_posix()}))
        # The probe is of the module, and stays with it.
        changed = {"outputs": outputs, "files": tuple(files), "probe": None}
        return self.module.model_copy(update=changed)

    def _read(self) -> None:
        graph = self.model.graph
        alive = {value.name for value in graph.inputs}  # depends on an input
        counts: set[str] = set()  # whole numbers that came from comparing or rounding
        for node in graph:
            inputs = tuple(v.name for v in node.inputs if v is not None and v.name)
            depends = any(name in alive for name in inputs)
            counting = depends and _counts(node, alive, counts)
            for value in node.outputs:
                if not value.name:
                    continue
                self._inputs_of[value.name] = inputs
                if not depends:
                    continue
                alive.add(value.name)
                if counting:
                    counts.add(value.name)
                elif value.dtype in _FLOATS:
                    self._values[value.name] = value


def _counts(node: ir.Node, alive: set[str], counts: set[str]) -> bool:
    """Whether the node's result is a whole number made by comparing or rounding."""
    live = [value for value in node.inputs if value is not None and value.name in alive]
    if node.op_type in _ROUNDING:
        return True
    if node.op_type == "Cast" and live[0].dtype == ir.DataType.BOOL:
        return True
    return node.op_type in _KEEPS_COUNTS and all(value.name in counts for value in live)


def _dimensions(value: ir.Value) -> tuple[Dimension, ...]:
    if value.shape is None:
        return ()
    return tuple(size if isinstance(size, int) else str(size) for size in value.shape)
