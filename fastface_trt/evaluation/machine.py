"""What a result was measured on."""

import os
import platform
from pathlib import Path

from fastface_trt.engines.hardware import cuda_driver, cuda_hardware

GB = 2**30


def describe_machine() -> dict[str, str | int | float]:
    """Processor, cores, memory in GB (2³⁰ bytes), system, and the GPU with its driver if any."""
    machine: dict[str, str | int | float] = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0,
        "memory_gb": round(_memory_bytes() / GB, 1),
        "system": platform.platform(),
    }
    gpu = cuda_hardware()
    if gpu["gpu"] != "unknown":
        machine |= gpu | cuda_driver()
    return machine


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
