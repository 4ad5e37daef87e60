"""What of this machine changes an engine, read from light sources: no compiler, no subprocess."""

import importlib
import platform
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from fastface_trt.errors import install_hint

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
    """Why `cuda_hardware` knows no GPU, as the end of a sentence, and the hint."""
    try:
        importlib.import_module("cuda.bindings.driver")
    except (ImportError, OSError) as error:
        return (
            f"cuda-python, which finds the GPU, cannot be imported ({error})",
            f"{install_hint('gpu')} (it brings cuda-python).",
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
