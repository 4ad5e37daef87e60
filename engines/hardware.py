"""What of this machine changes an engine, read from light sources: no compiler, no subprocess.

What of an ONNX graph stays the same when only its weights change.

A built engine can take the weights of another module exactly when everything else agrees: nodes,
how they are wired, attributes, functions, shapes, and every constant that is no weight. A topology
is a list of parts, each with a label that a person understands and a digest, so that two topologies
are compared part by part and the first difference has a name.

How much memory this process takes at most, and keeping mapped files from counting in it.
"""

import hashlib
import importlib
import platform
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import TracebackType

from typing_extensions import Self

from fastface_trt.engines.onnx.file import Initializer, OnnxFile

_CPUINFO = Path("/proc/cpuinfo")
_TENSOR_FLAG = re.compile(r"(avx|amx|fma|f16c|asimd|bf16|i8mm|sve|sme)\w*")
"""Flags that ONNX Runtime's kernels and layouts depend on; others come with kernel versions."""


@lru_cache
def cpu_hardware() -> dict[str, str]:
    """`machine` (such as x86_64) and `isa`, its instruction sets for tensors, sorted."""
    flags: set[str] = set()
    with suppress(OSError):
        for line in _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("flags", "Features"):  # x86, ARM
                flags = set(value.split())
                break
    isa = sorted(filter(_TENSOR_FLAG.fullmatch, flags))
    # Elsewhere (macOS, Windows) the processor's name says nearly as much.
    return {"machine": platform.machine(), "isa": " ".join(isa) or platform.processor()}


@lru_cache
def cuda_hardware() -> dict[str, str]:
    """`gpu`, the name of CUDA device 0, and its `compute_capability`; "unknown" without a driver.

    Reads them through `cuda-python`, which comes with the extra `gpu`.
    """
    unknown = {"gpu": "unknown", "compute_capability": "unknown"}
    try:
        driver = importlib.import_module("cuda.bindings.driver")
    except (ImportError, OSError):
        return unknown
    attribute = driver.CUdevice_attribute
    with suppress(RuntimeError):  # cuda-python's own way to say that there is no libcuda
        (error,) = driver.cuInit(0)
        if int(error) != 0:
            return unknown
        error, device = driver.cuDeviceGet(0)
        if int(error) != 0:
            return unknown
        _, name = driver.cuDeviceGetName(128, device)
        version = [
            driver.cuDeviceGetAttribute(which, device)[1]
            for which in (
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )
        ]
        gpu = name.split(b"\0")[0].decode()
        return {"gpu": gpu, "compute_capability": ".".join(map(str, version))}
    return unknown


@lru_cache
def cuda_device_count() -> int:
    """How many CUDA devices this process sees, opening none; 0 without a driver."""
    with suppress(ImportError, OSError, RuntimeError):
        driver = importlib.import_module("cuda.bindings.driver")
        if int(driver.cuInit(0)[0]) == 0:
            error, count = driver.cuDeviceGetCount()
            if int(error) == 0:
                return int(count)
    return 0


@lru_cache
def cuda_driver() -> dict[str, str]:
    """`driver`, the CUDA version that the installed driver offers, such as 13.0; {} without one."""
    with suppress(ImportError, OSError, RuntimeError):
        driver = importlib.import_module("cuda.bindings.driver")
        error, version = driver.cuDriverGetVersion()
        if int(error) == 0:
            return {"driver": f"{version // 1000}.{version % 1000 // 10}"}
    return {}


Capability = tuple[int, int]
"""A compute capability, such as (9, 0)."""


@dataclass(frozen=True)
class Capabilities:
    """Compute capabilities that a library takes: each of `listed`, and everything from `since`."""

    since: Capability
    listed: frozenset[Capability] = frozenset()

    def __contains__(self, capability: object) -> bool:
        return isinstance(capability, tuple) and (
            capability >= self.since or capability in self.listed
        )

    def __str__(self) -> str:
        names = [f"{major}.{minor}" for major, minor in sorted(self.listed)]
        since = f"{self.since[0]}.{self.since[1]} or later"
        return f"{', '.join(names)} and {since}" if names else since


FROM_TURING = Capabilities((7, 5))
"""What CUDA 13 and TensorRT 11 compile for."""

RTX = Capabilities((12, 0), frozenset({(7, 5), (8, 0), (8, 6), (8, 9)}))
"""TensorRT-RTX 1.7: neither Hopper (9.0: refused when a plan is opened) nor the Blackwell of data
centres (10.x)."""


def why_no_gpu() -> tuple[str, str]:
    """Why `cuda_hardware` knows no GPU, as the end of a sentence, and the mend."""
    try:
        importlib.import_module("cuda.bindings.driver")
    except (ImportError, OSError) as error:
        return (
            f"cuda-python, which finds the GPU, cannot be imported ({error})",
            "pip install 'fastface-trt[gpu]' (it brings cuda-python).",
        )
    if not cuda_driver():
        return (
            "there is no NVIDIA driver, and so no GPU, here",
            "Install NVIDIA's driver (nvidia-smi shows it), or use the backend onnxruntime.",
        )
    return (
        "the driver finds no NVIDIA GPU here",
        "See what nvidia-smi and CUDA_VISIBLE_DEVICES say; a container needs the GPU passed in.",
    )


def refused_gpu(takes: Capabilities, gpu: Mapping[str, str]) -> str | None:
    """`gpu` (what `cuda_hardware` gives) in words if `takes` does not hold it, None if it does."""
    if capability_of(gpu["compute_capability"]) in takes:
        return None
    return f"{gpu['gpu']} (compute capability {gpu['compute_capability']})"


def capability_of(text: str) -> Capability | None:
    """A compute capability from its text, such as "9.0"; None for "unknown"."""
    major, _, minor = text.partition(".")
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else None


Topology = tuple[str, ...]
"""`LABEL DIGEST` of every part: opsets and functions, inputs and outputs, constants, nodes."""

_MODEL_OPSET, _MODEL_FUNCTION = 8, 25
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_INPUT, _GRAPH_OUTPUT, _GRAPH_SPARSE = 1, 5, 11, 12, 15
_FUNCTION_NAME = 1
_NODE_WORDS = frozenset((3, 6, 9))
"""Fields of a node that say nothing about what it computes: name, documentation, metadata."""

_FRACTIONAL = ("float16", "bfloat16", "float32", "float64", "float8_e4m3fn")
_QUANTISED = ("int8", "uint8")


def is_weight(one: Initializer) -> bool:
    """Whether an initialiser may differ between two modules of one topology.

    Everything with more than one element that training or a LoRA changes; single numbers and
    integers (axes, shapes, bounds) are part of the graph, and builders fold them by value.
    """
    return one.dtype in (*_FRACTIONAL, *_QUANTISED) and _elements(one) > 1


def topology(onnx: OnnxFile) -> Topology:
    """The topology of a model file; raises `ExportIncomplete` for a file that is cut."""
    return tuple(f"{label} {digest}" for label, digest in _parts(onnx))


def first_difference(ours: Sequence[str], theirs: Sequence[str]) -> str | None:
    """The label that the first differing part has in `ours`, None when they are equal."""
    for mine, other in zip(ours, theirs, strict=False):
        if mine != other:
            return mine.rpartition(" ")[0]
    if len(ours) != len(theirs):
        longer = max(ours, theirs, key=len)
        return longer[min(len(ours), len(theirs))].rpartition(" ")[0]
    return None


def _parts(onnx: OnnxFile) -> Iterator[tuple[str, str]]:
    for field, value in onnx.fields(onnx.model):
        if not isinstance(value, memoryview):
            continue
        if field == _MODEL_OPSET:
            yield "the operator sets", _digest(value)
        elif field == _MODEL_FUNCTION:
            fields = (v for f, v in onnx.fields(value) if f == _FUNCTION_NAME)
            name = bytes(next(fields, b"")).decode(errors="replace")
            yield f"function {name}", _digest(value)
    for field, value in onnx.fields(onnx.graph):
        if not isinstance(value, memoryview):
            continue
        if field in (_GRAPH_INPUT, _GRAPH_OUTPUT):
            yield "the inputs" if field == _GRAPH_INPUT else "the outputs", _digest(value)
        elif field == _GRAPH_SPARSE:
            yield "a sparse weight", _digest(value)
        elif field == _GRAPH_INITIALIZER:
            yield _initializer(onnx, value)
        elif field == _GRAPH_NODE:
            yield _node(onnx, value)


def _initializer(onnx: OnnxFile, message: memoryview) -> tuple[str, str]:
    one = onnx.read_initializer(message)
    if one is None:  # its elements are stored one by one, which no large weight is
        return "a constant", _digest(message)
    shape = f"{one.dtype} {one.shape}".encode()
    return f"initialiser {one.name}", _digest(shape if is_weight(one) else shape + bytes(one.data))


def _node(onnx: OnnxFile, message: memoryview) -> tuple[str, str]:
    node = onnx.read_node(message)
    digest = hashlib.sha256()
    for field, value in onnx.fields(message):
        if field not in _NODE_WORDS:
            content = bytes(value) if isinstance(value, memoryview) else str(value).encode()
            digest.update(f"{field} {len(content)} ".encode() + content)
    where = f" of {node.scope}" if node.scope else ""
    return f"node {node.op_type}{where}", digest.hexdigest()[:16]


def _elements(one: Initializer) -> int:
    count = 1
    for size in one.shape:
        count *= size
    return count


def _digest(content: memoryview | bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


_STATUS = Path("/proc/self/status")
_SECONDS_BETWEEN = 0.5
_DROP_ABOVE_BYTES = 2**30


class MemoryPeak:
    """Samples this process's memory while its block runs: `anonymous` and `resident` bytes.

    Anonymous memory is what the process allocated; resident memory counts mapped files as well,
    which the system can drop and read again. `drop_pages` is called when more than 1 GB (2³⁰ bytes)
    of those are resident. Both stay 0 where /proc does not exist.
    """

    def __init__(self, drop_pages: Callable[[], None] = lambda: None) -> None:
        self.anonymous = 0
        self.resident = 0
        self._drop_pages = drop_pages
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory peak", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while _STATUS.exists():
            sizes = _sizes()
            self.anonymous = max(self.anonymous, sizes["RssAnon"])
            self.resident = max(self.resident, sizes["VmRSS"])
            if sizes["RssFile"] > _DROP_ABOVE_BYTES:
                self._drop_pages()
            if self._stop.wait(_SECONDS_BETWEEN):
                return


def _sizes() -> dict[str, int]:
    sizes = dict.fromkeys(("VmRSS", "RssAnon", "RssFile"), 0)
    for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name in sizes:
            sizes[name] = int(value.split()[0]) * 1024
    return sizes
