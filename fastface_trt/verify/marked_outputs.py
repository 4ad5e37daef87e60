"""Tensors inside an ONNX module: returned by a copy of it, or computed in float64 by onnx itself.

Two backends are compared by running copies that also return what is inside, and where they disagree
float64 judges.

Polygraphy marks outputs, too (`polygraphy.backend.onnx.ModifyOutputs`), on a model whose weights
are in memory and not inside functions. Here weights stay where they are (the copy refers to a hard
link of the data file), and calls of model-local functions can be opened first, so that a search
gets inside `DecoupledAttention`.

ONNX Runtime has no float64 kernels for convolution and instance normalisation, so in float64 nodes
run in onnx's own reference implementation (numpy), convolutions in PyTorch. One node at a time: a
weight is converted when its node runs and dropped afterwards, an intermediate tensor after its last
use.
"""

import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from onnx_ir.passes.common import InlinePass, ShapeInferencePass

from fastface_trt.engines.files import describe_file
from fastface_trt.engines.manifest import Dimension, DType, ModuleSpec, TensorSpec
from fastface_trt.engines.onnx.file import MODULE_KEY, verify_module

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
        self.model = ir.load(verify_module(folder, module))
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
        yield from reversed(chosen)

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


Array = NDArray[Any]

_FLOAT32_INPUTS: Final = {"Resize": (1, 2), "QuantizeLinear": (0, 1), "DequantizeLinear": (1,)}
"""Inputs that ONNX does not define for float64: sizes of Resize, and what 8 bits mean."""


class Conv(OpRun):  # type: ignore[misc]
    """ONNX Conv in float64 by PyTorch; the reference implementation's needs minutes and gigabytes.

    Explicit pads only, equal at both ends of an axis, which is what the exporter writes.
    """

    op_domain = ""

    def _run(
        self,
        x: Array,
        weight: Array,
        bias: Array | None = None,
        auto_pad: Any = None,
        dilations: Any = None,
        group: int | None = None,
        kernel_shape: Any = None,
        pads: Any = None,
        strides: Any = None,
    ) -> tuple[Array]:
        axes = x.ndim - 2
        begin, end = (list(pads or [0] * (2 * axes))[at : at + axes] for at in (0, axes))
        if begin != end or (auto_pad or "NOTSET") not in ("NOTSET", "VALID"):
            raise ValueError(f"Conv with pads {pads} and auto_pad {auto_pad}")
        result = torch.convolution(
            torch.from_numpy(np.ascontiguousarray(x)),
            torch.from_numpy(np.ascontiguousarray(weight)),
            None if bias is None else torch.from_numpy(np.ascontiguousarray(bias)),
            strides or [1] * axes,
            begin,
            dilations or [1] * axes,
            False,
            [0] * axes,
            group or 1,
        )
        return (result.numpy(),)


def evaluate_float64(marked: MarkableModule, name: str, inputs: Mapping[str, Array]) -> Array:
    """Tensor `name` of a module that was read with `inline=True`, computed in float64.

    `inputs` are the module's by name, in its own types; floating-point ones are widened. Raises
    `ValueError` for a module whose calls were not opened.
    """
    if marked.model.functions:
        raise ValueError("read the module with inline=True")
    nodes = list(marked.nodes_above(name))
    uses = Counter(v.name for node in nodes for v in node.inputs if v is not None)
    uses[name] += 1
    opsets = [helper.make_opsetid(d, v) for d, v in marked.model.opset_imports.items()]
    known: dict[str, Array] = {key: _wide(np.asarray(array)) for key, array in inputs.items()}
    with torch.inference_mode():
        for node in nodes:
            feeds = [_feed(value, known) for value in node.inputs]
            results = _run(node, feeds, opsets)
            for value, result in zip(node.outputs, results, strict=True):
                if uses[value.name]:
                    known[value.name or ""] = result
            for value in node.inputs:
                if value is None:
                    continue
                uses[value.name] -= 1
                if not uses[value.name]:
                    known.pop(value.name or "", None)
    return known[name]


def _feed(value: ir.Value | None, known: Mapping[str, Array]) -> Array | None:
    if value is None:
        return None
    if value.name in known:
        return known[value.name]
    assert value.const_value is not None  # an input, a weight, or the result of an earlier node
    return _wide(value.const_value.numpy())


def _run(node: ir.Node, feeds: list[Array | None], opsets: list[Any]) -> list[Array]:
    """One node on arrays, float64 in and out."""
    narrow = _FLOAT32_INPUTS.get(node.op_type, ())
    ready = {
        f"x{at}": array.astype(np.float32) if at in narrow and array.dtype.kind == "f" else array
        for at, array in enumerate(feeds)
        if array is not None
    }
    proto = helper.make_node(
        node.op_type,
        ["" if array is None else f"x{at}" for at, array in enumerate(feeds)],
        [f"y{at}" for at in range(len(node.outputs))],
        domain=node.domain,
    )
    proto.attribute.extend(_wide_attribute(ir.to_proto(a)) for a in node.attributes.values())
    graph = helper.make_graph(
        [proto],
        "node",
        [
            helper.make_tensor_value_info(key, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
            for key, a in ready.items()
        ],
        [helper.make_empty_tensor_value_info(output) for output in proto.output],
    )
    model = helper.make_model(graph, opset_imports=opsets)
    results = ReferenceEvaluator(model, new_ops=[Conv]).run(None, ready)
    return [_wide(np.asarray(result)) for result in results]


def _wide_attribute(attribute: Any) -> Any:
    """The attribute with every float type and float tensor turned into float64."""
    if attribute.name in ("to", "dtype", "output_dtype"):
        if attribute.i in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16):
            attribute.i = TensorProto.DOUBLE
    elif attribute.name in ("value_float", "value_floats"):
        values = np.float64(attribute.f if attribute.name == "value_float" else attribute.floats)
        return helper.make_attribute("value", numpy_helper.from_array(np.asarray(values)))
    elif attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type in _FLOATS:
        wide = numpy_helper.to_array(attribute.t).astype(np.float64)
        attribute.t.CopyFrom(numpy_helper.from_array(wide, attribute.t.name))
    return attribute


def _wide(array: Array) -> Array:
    is_float = array.dtype.kind == "f" or array.dtype.name == "bfloat16"
    return array.astype(np.float64) if is_float else array
