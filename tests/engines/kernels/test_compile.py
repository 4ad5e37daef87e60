"""NVRTC compiles the kernels for every architecture, without a GPU and without spills."""

import re

import pytest

from fastface_trt.engines.kernels import compile as compiling
from fastface_trt.engines.kernels.compile import (
    ARCHITECTURES,
    OUTPUT_KERNEL,
    STATISTICS_KERNEL,
    compile_kernels,
)
from fastface_trt.errors import BuildFailed, InvalidRequest, MissingDependency


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_ptx_for_every_architecture(architecture, dtype):
    compiled = compile_kernels(architecture, 64, dtype)
    ptx = compiled.code.decode()
    assert re.search(rf"\.target {architecture}\b", ptx)
    entries = re.findall(r"\.entry (\w+)", ptx)
    assert sorted(entries) == sorted([STATISTICS_KERNEL, OUTPUT_KERNEL])
    # Arrays that are indexed at run time would be declared here.
    assert ".local" not in ptx
    loads = [line for line in ptx.splitlines() if re.search(r"ld\.global\S*\.v4", line)]
    assert len(loads) > 20  # q, k, v and the maps, all as 16-byte vectors


@pytest.mark.parametrize("heads_last", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("head_size", [8, 64])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_register_is_spilled(architecture, head_size, dtype, heads_last):
    compiled = compile_kernels(architecture, head_size, dtype, "cubin", heads_last=heads_last)
    assert compiled.code[:4] == b"\x7fELF"
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", compiled.log)
    assert spills == [("0", "0")] * 2, compiled.log
    assert re.findall(r"(\d+) bytes stack frame", compiled.log) == ["0", "0"]
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", compiled.log)]
    assert len(registers) == 2
    assert max(registers) <= 128  # 512 threads of launch 1, two blocks of 256 of launch 2 per SM


@pytest.mark.parametrize("head_size", [16, 24, 32, 80, 128])
def test_other_head_sizes_compile(head_size):
    assert OUTPUT_KERNEL in compile_kernels("sm_80", head_size).code.decode()


@pytest.mark.parametrize(
    ("architecture", "dtype"), [("sm_80", "float32"), ("sm_90", "float16"), ("sm_120", "float16")]
)
@pytest.mark.parametrize("tokens", [16, 32, 48, 64, 80])
def test_other_numbers_of_tokens_compile_without_spills(architecture, dtype, tokens):
    compiled = compile_kernels(architecture, 64, dtype, "cubin", heads_last=True, tokens=tokens)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", compiled.log)
    assert spills == [("0", "0")] * 2, compiled.log


@pytest.mark.parametrize("tokens", [-1, 0, 1, 257])
def test_numbers_of_tokens_out_of_range_are_refused(tokens):
    with pytest.raises(InvalidRequest, match=f"no variant for {tokens} image tokens"):
        compile_kernels("sm_80", tokens=tokens)


@pytest.mark.parametrize("head_size", [0, 4, 63, 136, -8])
def test_other_head_sizes_are_refused(head_size):
    with pytest.raises(InvalidRequest, match=f"heads of {head_size} elements"):
        compile_kernels("sm_80", head_size)


def test_other_dtypes_and_architectures_are_refused():
    with pytest.raises(InvalidRequest, match="bfloat16"):
        compile_kernels("sm_80", 64, "bfloat16")
    with pytest.raises(InvalidRequest, match=r"'8\.0' is not a GPU architecture"):
        compile_kernels("8.0")
    with pytest.raises(BuildFailed, match="gpu-architecture"):
        compile_kernels("sm_10")


def test_a_refused_source_comes_with_the_compilers_log(monkeypatch):
    monkeypatch.setattr(compiling, "_HEADERS", compiling._HEADERS[1:])
    with pytest.raises(BuildFailed, match=r'cannot open source file "attention_map\.cuh"'):
        compile_kernels("sm_80")


def test_without_nvrtc_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cuda.bindings", None)
    with pytest.raises(MissingDependency, match="kernels"):
        compile_kernels("sm_80")
