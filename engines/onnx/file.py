"""What an ONNX file says about its weights and nodes, read without the onnx package.

A builder needs three things that it cannot ask a parser for: where each initialiser's bytes lie (so
that a 6 GB UNet is mapped, not copied), what they hash to (so that a refit knows what changed), and
which PyTorch module a node came from (so that an error can say so). All are a few fields of
protobuf messages, whose wire format is read at the end of this file; the onnx package, which brings
a compiler's worth of code, is not needed to run an engine.
"""

import mmap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fastface_trt.engines.dtypes import FROM_ONNX
from fastface_trt.engines.engine import Closing
from fastface_trt.engines.files import verify_files
from fastface_trt.engines.manifest import ModuleSpec, open_file
from fastface_trt.errors import ExportIncomplete

MODULE_KEY: Final = "fastface.module"
"""Node metadata that names the PyTorch module a node came from, such as unet.mid_block."""

# Field numbers of onnx.proto3.
MODEL_GRAPH, MODEL_OPSET, MODEL_FUNCTION = 7, 8, 25
GRAPH_NODE, GRAPH_INITIALIZER, GRAPH_INPUT, GRAPH_OUTPUT, GRAPH_SPARSE = 1, 5, 11, 12, 15
FUNCTION_NAME = 1
NODE_INPUT, NODE_OUTPUT, NODE_NAME, NODE_OP_TYPE, NODE_DOC, NODE_METADATA = 1, 2, 3, 4, 6, 9
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_RAW, _TENSOR_EXTERNAL = 1, 2, 8, 9, 13
_PAIR_KEY, _PAIR_VALUE = 1, 2

_HELD: Final[Mapping[str, Mapping[int, str]]] = {
    "model": {MODEL_GRAPH: "graph", 20: "training", MODEL_FUNCTION: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {GRAPH_NODE: "node", GRAPH_INITIALIZER: "tensor", GRAPH_SPARSE: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute", NODE_OP_TYPE: "operator"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {_TENSOR_EXTERNAL: "reference"},
}
"""Messages of onnx.proto3 by field number, as far as a tensor may lie inside of them."""

Fields = Iterator[tuple[int, int | memoryview]]


@dataclass(frozen=True)
class Initializer:
    """One weight of the graph: its bytes are a view into the mapped file, valid while it is open.

    `dtype` is a name of `engines.dtypes`, or `type N` for others. `external` says that the bytes
    lie in a data file beside the graph.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: memoryview
    external: bool

    @property
    def address(self) -> int:
        """Where the bytes lie in this process's memory."""
        array: NDArray[np.uint8] = np.frombuffer(self.data, np.uint8)
        return array.ctypes.data if len(array) else 0


@dataclass(frozen=True)
class Node:
    """A node of the main graph and the dotted name of the PyTorch module that it came from."""

    name: str
    op_type: str
    scope: str
    outputs: tuple[str, ...]
    inputs: tuple[str, ...] = ()


class OnnxFile(Closing):
    """An ONNX model file with its external data, mapped and not copied.

    Raises `ExportIncomplete` when the file is missing, cut, or not an ONNX model. Weights that are
    stored element by element instead of as raw bytes are left out: no exporter of today writes
    large ones that way.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._maps: dict[Path, mmap.mmap] = {}
        self._graph = memoryview(b"")
        for field, value in self.fields(self._map(path)):
            if field == MODEL_GRAPH and isinstance(value, memoryview):
                if self._graph:  # others would take both for one
                    raise self._broken("it holds two graphs")
                self._graph = value
        if not self._graph:
            raise self._broken("it holds no graph")

    @cached_property
    def initializers(self) -> dict[str, Initializer]:
        """The graph's weights by name, in the file's order."""
        read = (self.read_initializer(value) for value in self._messages(GRAPH_INITIALIZER))
        return {one.name: one for one in read if one is not None}

    @cached_property
    def nodes(self) -> list[Node]:
        """The main graph's nodes in order; nodes inside functions are not among them."""
        return [self.read_node(value) for value in self._messages(GRAPH_NODE)]

    @property
    def model(self) -> memoryview:
        """The bytes of the model file itself, external data not included."""
        return self._map(self.path)

    @property
    def graph(self) -> memoryview:
        """The GraphProto message, for `fields`."""
        return self._graph

    def references(self) -> set[str]:
        """Every file that some tensor of the model says its bytes lie in, as it is spelled.

        That is of all graphs, branches, functions and attributes, and of every copy of a field that
        may stand only once: which copy counts is for each reader to decide. Raises
        `ExportIncomplete` for a node that is a compiled graph, which has files of its own.
        """
        found = set()
        waiting = [("model", self.model)]
        while waiting:
            kind, message = waiting.pop()
            held = _HELD[kind]
            for field, value in self.fields(message):
                inner = held.get(field)
                if inner is None or not isinstance(value, memoryview):
                    continue
                if inner == "operator":
                    if _read_text(value) == "EPContext":
                        raise self._broken("it holds a graph that was compiled for one machine")
                elif inner != "reference":
                    waiting.append((inner, value))
                else:
                    key, text = self._pair(value)
                    if key == "location":
                        found.add(text)
        # What is not UTF-8 was replaced, and could be the name of another file then.
        if any("\ufffd" in one for one in found):
            raise self._broken("the name of a data file is not UTF-8")
        return found

    def place(self, weight: Initializer) -> tuple[Path, int]:
        """The file that holds the bytes of `weight`, and where they begin in it."""
        for path in self._maps:
            whole: NDArray[np.uint8] = np.frombuffer(self._map(path), np.uint8)
            offset = weight.address - whole.ctypes.data
            if 0 <= offset < len(whole):
                return path, offset
        raise self._broken(f"{weight.name} has no bytes")

    def drop_pages(self) -> None:
        """Take the mapped pages out of memory; a later access reads them from the disk again."""
        for mapped in list(self._maps.values()):
            if hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
                mapped.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Let go of the mappings; views into them keep theirs alive."""
        self._maps.clear()

    def _map(self, path: Path) -> memoryview:
        if path not in self._maps:
            try:
                with open_file(path) as file:
                    self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except FileNotFoundError:
                raise ExportIncomplete(f"{path} is missing.", "Export it again.") from None
            except (OSError, ValueError) as error:  # ValueError: an empty file
                raise ExportIncomplete(
                    f"{path} cannot be read: {error}.", "Export it again."
                ) from None
        return memoryview(self._maps[path])

    def _messages(self, wanted: int) -> Iterator[memoryview]:
        for field, value in self.fields(self._graph):
            if field == wanted and isinstance(value, memoryview):
                yield value

    def read_node(self, message: memoryview) -> Node:
        """A NodeProto message as a `Node`."""
        name = op_type = scope = ""
        inputs: list[str] = []
        outputs: list[str] = []
        for field, value in self.fields(message):
            if not isinstance(value, memoryview):
                continue
            if field == NODE_INPUT:
                inputs.append(_read_text(value))
            elif field == NODE_OUTPUT:
                outputs.append(_read_text(value))
            elif field == NODE_NAME:
                name = _read_text(value)
            elif field == NODE_OP_TYPE:
                op_type = _read_text(value)
            elif field == NODE_METADATA:
                key, text = self._pair(value)
                if key == MODULE_KEY:
                    scope = text
        return Node(name, op_type, scope, tuple(outputs), tuple(inputs))

    def read_initializer(self, message: memoryview) -> Initializer | None:
        """A TensorProto message as an `Initializer`, None when it holds no raw bytes."""
        name, dtype = "", 0
        shape: list[int] = []
        raw: memoryview | None = None
        external: dict[str, str] = {}
        for field, value in self.fields(message):
            if isinstance(value, int):
                if field == _TENSOR_DIMS:
                    shape.append(value)
                elif field == _TENSOR_TYPE:
                    dtype = value
            elif field == _TENSOR_DIMS:  # packed
                shape += _varints(value)
            elif field == _TENSOR_NAME:
                name = _read_text(value)
            elif field == _TENSOR_RAW:
                raw = value
            elif field == _TENSOR_EXTERNAL:
                key, text = self._pair(value)
                external[key] = text
        if external:
            raw = self._external(name, external)
        if raw is None:
            return None
        kind = FROM_ONNX.get(dtype, f"type {dtype}")
        return Initializer(name, kind, tuple(shape), raw, bool(external))

    def _external(self, name: str, entry: dict[str, str]) -> memoryview:
        location = entry.get("location", "")
        if not location or ".." in Path(location).parts or Path(location).is_absolute():
            raise self._broken(f"the data of {name} lies outside its folder")
        whole = self._map(self.path.parent / location)
        try:
            start = int(entry.get("offset", 0))
            length = int(entry.get("length", len(whole) - start))
        except ValueError:
            raise self._broken(f"the place of {name} in {location} is no number") from None
        if start < 0 or length < 0 or start + length > len(whole):
            raise self._broken(f"the data of {name} ends beyond {location}")
        return whole[start : start + length]

    def _pair(self, message: memoryview) -> tuple[str, str]:
        pair = {f: _read_text(v) for f, v in self.fields(message) if isinstance(v, memoryview)}
        return pair.get(_PAIR_KEY, ""), pair.get(_PAIR_VALUE, "")

    def fields(self, message: memoryview) -> Fields:
        """(field number, integer or bytes) of a message of this file.

        Raises `ExportIncomplete` when it is cut.
        """
        try:
            yield from _fields(message)
        except ValueError as error:
            raise self._broken(str(error)) from None

    def _broken(self, why: str) -> ExportIncomplete:
        return ExportIncomplete(f"{self.path} is not an ONNX model: {why}.", "Export it again.")


def check_references(folder: Path, graph: str, named: Iterable[str]) -> None:
    """Refuse the graph in file `graph` of `folder` unless all that it reads is among `named`.

    Both are paths relative to `folder`, as its manifest spells them. A name that is absolute,
    leaves the folder or is spelled in a roundabout way is none of those. Raises `ExportIncomplete`;
    only the graph itself is opened.
    """
    named = set(named)
    with OnnxFile(folder / graph) as onnx:
        for location in sorted(onnx.references()):
            if str(PurePosixPath(graph).parent / location) not in named:
                raise ExportIncomplete(
                    f"{folder / graph} reads {location!r:.200}, which no manifest names.",
                    "Export it again: all that a graph reads has to be in its folder, by hash.",
                )


def verify_module(folder: Path, module: ModuleSpec, *, hashes: bool = True) -> Path:
    """The graph of `module` in export `folder`, after a look at all that it will read.

    Raises `ExportIncomplete` as `verify_files` and `check_references` do.
    """
    verify_files(folder, module.files, hashes=hashes)
    graph, *data = (file.path for file in module.files)
    check_references(folder, graph, data)
    return folder / graph


# Wire types of protocol buffers.
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def _fields(message: memoryview) -> Fields:
    """The fields of a serialised message in order; raises `ValueError` when it is cut.

    A value is an int for a number, a view for bytes, text or a message; fixed-width numbers come as
    their bytes.
    """
    at, end = 0, len(message)
    while at < end:
        tag, at = _read_varint(message, at)
        if tag >> 32:  # other readers drop the bits that are too many, and see another field
            raise ValueError("a field number of more than 32 bits")
        kind = tag & 7
        if kind == _VARINT:
            number, at = _read_varint(message, at)
            yield tag >> 3, number
            continue
        if kind == _BYTES:
            size, at = _read_varint(message, at)
        elif kind in (_FIXED64, _FIXED32):
            size = 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"unknown wire type {kind}")
        if at + size > end:
            raise ValueError("it is cut")
        yield tag >> 3, message[at : at + size]
        at += size


def _read_varint(message: memoryview, at: int) -> tuple[int, int]:
    """The number that starts at byte `at`, and where the next one starts; `ValueError` if cut."""
    number = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            raise ValueError("it is cut")
        byte = message[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, at
    raise ValueError("a number of more than 64 bits")


def _varints(message: memoryview) -> list[int]:
    """The numbers of a packed field."""
    numbers, at = [], 0
    while at < len(message):
        number, at = _read_varint(message, at)
        numbers.append(number)
    return numbers


def _read_text(message: memoryview) -> str:
    """A field's bytes as text; what is not UTF-8 is replaced."""
    return bytes(message).decode("utf-8", errors="replace")
