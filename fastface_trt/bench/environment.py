"""What a result was measured on: machine, software, and what else went on meanwhile."""

import os
import platform
import sys
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from fastface_trt.bench import gpu
from fastface_trt.bench.report import Environment, MachineState
from fastface_trt.engines.hardware import cuda_driver, cuda_hardware

GB = 2**30
PACKAGES: Final = (
    "fastface-trt",
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx-cu13",
    "cuda-python",
    "insightface",
    "pillow",
    "tokenizers",
)
"""What the runtime computes with; those that are not installed are left out."""


def describe_machine() -> dict[str, str | int | float]:
    """Processor, cores, memory in GB (2³⁰ bytes), system, and the GPU with its driver if any."""
    machine: dict[str, str | int | float] = {
        "processor": _processor(),
        "cores": cores(),
        "memory_gb": round(_memory_bytes() / GB, 1),
        "system": platform.platform(),
    }
    hardware = cuda_hardware()
    if hardware["gpu"] != "unknown":
        machine |= hardware | cuda_driver()
    return machine


def describe_environment(
    *,
    backend: str,
    threads: int | None,
    engines: Iterable[str],
    start: MachineState,
    end: MachineState,
) -> Environment:
    """The stamp of a report; `engines` are keys of the engine cache."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return Environment(
        machine=describe_machine(),
        backend=backend,
        threads=cores() if threads is None else threads,
        versions=versions,
        engine_keys=tuple(engines),
        start=start,
        end=end,
    )


def machine_state() -> MachineState:
    """What changes from minute to minute: load, clocks, power, throttling."""
    load = None
    with suppress(AttributeError, OSError):  # Windows has none
        load = os.getloadavg()[0]
    return MachineState(load_average=load, cpu_megahertz=_megahertz(), gpu=gpu.state())


def peak_host_bytes() -> int:
    """The most resident memory that this process had so far; 0 where the system does not tell."""
    if sys.platform == "win32":
        with suppress(ImportError):
            import psutil

            return int(psutil.Process().memory_info().peak_wset)
        return 0
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _megahertz() -> float | None:
    with suppress(ImportError, OSError, NotImplementedError):
        import psutil

        frequency = psutil.cpu_freq()
        if frequency is not None and frequency.current:
            return round(float(frequency.current), 1)
    return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _memory_bytes() -> int:
    if not hasattr(os, "sysconf"):
        return 0
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
