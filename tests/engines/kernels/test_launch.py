"""Launching the kernels: what reaches cuda.core, and what is refused before anything does."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from fastface_trt.engines.kernels import decoupled_attention as launching
from fastface_trt.engines.kernels.compile import OUTPUT_KERNEL, STATISTICS_KERNEL
from fastface_trt.engines.kernels.decoupled_attention import AttentionKernel, workspace_bytes
from fastface_trt.errors import InvalidRequest, MissingDependency

SOURCES = Path(launching.__file__).parent


@dataclass(frozen=True)
class Memory:
    address: int
    shape: tuple[int, ...]
    dtype: str


def call(rows=6, heads=10, positions=1025, requests=2, size=64):
    """The tensors of a valid call, by name."""
    shapes = {
        "q": (rows, heads, positions, size),
        "k": (rows, heads, 4, size),
        "v": (rows, heads, 4, size),
        "manipulation": (requests, 8),
        "ip_scale": (requests,),
        "out": (rows, heads, positions, size),
        "workspace": (workspace_bytes(rows, heads, positions),),
    }
    kinds = {"manipulation": "float32", "ip_scale": "float32", "workspace": "uint8"}
    return {
        name: Memory(4096 * (1 + index), shape, kinds.get(name, "float16"))
        for index, (name, shape) in enumerate(shapes.items())
    }


@pytest.fixture(scope="module")
def kernel():
    return AttentionKernel("sm_90")


@pytest.fixture
def launches(monkeypatch, kernel):
    """What was launched: kernel, grid, block, stream and arguments."""
    core = pytest.importorskip("cuda.core", reason="cuda-python is not installed")
    recorded = []

    def launch(stream, config, function, *arguments):
        recorded.append((function, config, stream.__cuda_stream__(), arguments))

    class ObjectCode:
        @staticmethod
        def from_cubin(image):
            assert image[:4] == b"\x7fELF"
            return SimpleNamespace(get_kernel=lambda name: name)

    monkeypatch.setattr(core, "launch", launch)
    monkeypatch.setattr(core, "ObjectCode", ObjectCode)
    kernel.__dict__.pop("_loaded", None)
    yield recorded
    kernel.__dict__.pop("_loaded", None)


def test_two_launches_with_the_arguments_that_the_kernels_declare(kernel, launches):
    tensors = call()
    kernel(77, *tensors.values())
    (first, first_config, stream, first_arguments), (second, config, _, arguments) = launches
    assert (first, second, stream) == (STATISTICS_KERNEL, OUTPUT_KERNEL, (0, 77))
    assert tuple(first_config.grid)[:1] == (60,)
    assert tuple(first_config.block)[:1] == (512,)
    assert tuple(config.grid)[:2] == (3, 60)  # 1025 positions in blocks of 512
    assert tuple(config.block)[:1] == (256,)
    where = {name: tensor.address for name, tensor in tensors.items()}
    statistics = where["workspace"] + 60 * 1025 * 16
    for name, given in (("statistics", first_arguments), ("output", arguments)):
        names, kinds = parameters(name)
        values = dict(zip(names, given, strict=True))
        counts = {"requests": 2, "rows": 6, "heads": 10, "positions": 1025}
        scratch = {"maps": where["workspace"], "statistics": statistics}
        expected = {**where, **counts, **scratch}
        assert values == {one: expected[one] for one in names}
        # cuda.core passes int as a pointer and numpy's int32 as a C int.
        assert [type(x) for x in given] == [int if "*" in k else np.int32 for k in kinds]


def parameters(launch):
    """Parameter names and types of a kernel, from its source."""
    file, kernel = {
        "statistics": ("row_statistics.cuh", STATISTICS_KERNEL),
        "output": ("manipulated_output.cuh", OUTPUT_KERNEL),
    }[launch]
    found = re.search(rf"\b{kernel}\((.*?)\)\s*{{", (SOURCES / file).read_text(), re.S)
    inside = found.group(1).removesuffix(" ADDEND")  # a parameter of the other layout
    declared = [" ".join(one.split()) for one in inside.split(",")]
    return [one.split()[-1] for one in declared], declared


def test_without_softmask_there_is_one_launch(kernel, launches):
    kernel(0, *call().values(), softmask=False)
    assert [function for function, *_ in launches] == [OUTPUT_KERNEL]


def test_any_object_with_a_cuda_array_interface(kernel, launches):
    def offer(memory, strides=None):
        described = {
            "data": (memory.address, False),
            "shape": memory.shape,
            "typestr": np.dtype(memory.dtype).str,
            "strides": strides,
        }
        return SimpleNamespace(__cuda_array_interface__=described)

    tensors = call()
    kernel(0, *(offer(memory) for memory in tensors.values()))
    kernel(0, *tensors.values())
    assert launches[0][3] == launches[2][3]
    with pytest.raises(InvalidRequest, match="not dense"):
        kernel(0, offer(tensors["q"], (2, 4, 6, 8)), *list(tensors.values())[1:])


def test_constants_are_those_of_the_sources():
    text = "".join(path.read_text() for path in sorted(SOURCES.glob("*.cuh")))
    for name in ("STATISTICS_THREADS", "OUTPUT_THREADS", "OUTPUT_POSITIONS"):
        assert f"constexpr int {name} = {getattr(launching, name)};" in text
    assert f"#define TOKENS {launching.TOKENS}\n" in text
    from fastface_trt.engines.contract import KINDS, MANIPULATION_COLUMNS

    for index, column in enumerate(MANIPULATION_COLUMNS):
        assert re.search(rf"\b{column.upper()} = {index}[,;]", text), column
    for kind in ("scale_power", "softmask"):
        assert f"{kind.upper()}_KIND = {KINDS.index(kind)}.0f" in text


BAD = [
    ("q", {"shape": (6, 10, 1025, 32)}, r"q is \[6, 10, 1025, 32\]"),
    ("q", {"shape": (6, 1025, 640)}, r"takes \[B, H, N, 64\]"),
    ("q", {"shape": (6, 10, 0, 64)}, "q is"),
    ("q", {"dtype": "float32"}, "has to be float16"),
    ("k", {"shape": (6, 10, 5, 64)}, r"k is float16 \[6, 10, 5, 64\] and has to be"),
    ("v", {"shape": (3, 10, 4, 64)}, "v is"),
    ("manipulation", {"shape": (2, 7)}, "manipulation is"),
    ("manipulation", {"dtype": "float16"}, "has to be float32"),
    ("ip_scale", {"shape": (4,)}, "do not divide into 4 requests"),
    ("ip_scale", {"shape": (3,)}, r"manipulation is float32 \[2, 8\] and has to be"),
    ("ip_scale", {"shape": ()}, "into 0 requests"),
    ("out", {"shape": (6, 10, 1024, 64)}, "the output is"),
    ("out", {"address": 4104}, "no multiple of 16"),
    ("workspace", {"shape": (1000,)}, "holds 1000 bytes and 986880 are needed"),
    ("workspace", {"address": 0}, "the workspace lies at address 0x0"),
]


@pytest.mark.parametrize(("name", "change", "message"), BAD)
def test_what_does_not_fit_is_refused_before_the_first_launch(
    kernel, launches, name, change, message
):
    tensors = call()
    tensors[name] = replace(tensors[name], **change)
    with pytest.raises(InvalidRequest, match=message):
        kernel(0, *tensors.values())
    assert launches == []


def test_workspace_holds_the_maps_and_three_rows_per_head():
    assert workspace_bytes(3, 10, 4096) == 3 * 10 * (4096 * 4 + 3 * 4) * 4


def test_without_cuda_python_the_error_says_what_to_install(monkeypatch, kernel):
    kernel.__dict__.pop("_loaded", None)
    monkeypatch.setitem(__import__("sys").modules, "cuda.core", None)
    with pytest.raises(MissingDependency, match="kernels"):
        kernel(0, *call().values())
