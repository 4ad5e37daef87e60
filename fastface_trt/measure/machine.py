"""What a result was measured on: machine, software, and what else went on meanwhile.

What the GPU does meanwhile is asked of NVIDIA's management library (NVML, package nvidia-ml-py).
"""

import os
import platform
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final, TypeVar

from fastface_trt.engines.hardware import cuda_driver, cuda_hardware
from fastface_trt.engines.manifest import Strict
from fastface_trt.engines.ort.threads import usable_cores
from fastface_trt.measure.memory import GB

Value = TypeVar("Value")

BUSY: Final = 0.5
"""Load average before a comparison above which its results say that they were disturbed."""

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


class GpuState(Strict):
    """What NVML reports of the GPU at one moment; None where it does not."""

    name: str
    driver: str
    sm_megahertz: int | None
    memory_megahertz: int | None
    celsius: int | None
    watts: float | None
    throttled: tuple[str, ...] = ()


class MachineState(Strict):
    """What changes from minute to minute; None where the system does not tell."""

    load_average: float | None
    cpu_megahertz: float | None
    gpu: GpuState | None


class Environment(Strict):
    """What the numbers were taken on and with; `start` and `end` are states around the runs."""

    machine: dict[str, str | int | float]
    backend: str
    threads: int
    versions: dict[str, str]
    engine_keys: tuple[str, ...]
    start: MachineState
    end: MachineState


def describe_machine() -> dict[str, str | int | float]:
    """Processor, cores, memory in GB (2³⁰ bytes), system, and the GPU with its driver if any."""
    machine: dict[str, str | int | float] = {
        "processor": _processor(),
        "cores": usable_cores(),
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
        threads=usable_cores() if threads is None else threads,
        versions=versions,
        engine_keys=tuple(engines),
        start=start,
        end=end,
    )


def machine_state() -> MachineState:
    """What changes from minute to minute: load, clocks, power, throttling."""
    return MachineState(load_average=load_average(), cpu_megahertz=_megahertz(), gpu=gpu_state())


def load_average() -> float | None:
    """Processes that wanted a core over the last minute; None on Windows, which does not count.

    More than this process's own means a busy machine, on which ratios of programs that synchronise
    threads differently mean nothing.
    """
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


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


_REASONS: Final = {
    "nvmlClocksEventReasonSwPowerCap": "power limit",
    "nvmlClocksEventReasonHwSlowdown": "hardware slowdown",
    "nvmlClocksEventReasonHwThermalSlowdown": "heat (hardware)",
    "nvmlClocksEventReasonSwThermalSlowdown": "heat (driver)",
    "nvmlClocksEventReasonHwPowerBrakeSlowdown": "power brake",
}
"""Reasons why clocks are lower than they could be; an idle GPU is no such reason."""


def gpu_state() -> GpuState | None:
    """Clocks, power and throttling of the first visible GPU; None without NVML or a GPU.

    What a GPU does not report is None.
    """
    with _device() as (nvml, device):
        if device is None:
            return None

        def ask(question: Callable[[], Value]) -> Value | None:
            with suppress(nvml.NVMLError):
                return question()
            return None

        milliwatts = ask(lambda: nvml.nvmlDeviceGetPowerUsage(device))
        reasons = ask(lambda: nvml.nvmlDeviceGetCurrentClocksEventReasons(device)) or 0
        clock = nvml.nvmlDeviceGetClockInfo
        return GpuState(
            name=_text(nvml.nvmlDeviceGetName(device)),
            driver=_text(nvml.nvmlSystemGetDriverVersion()),
            sm_megahertz=ask(lambda: clock(device, nvml.NVML_CLOCK_SM)),
            memory_megahertz=ask(lambda: clock(device, nvml.NVML_CLOCK_MEM)),
            celsius=ask(lambda: nvml.nvmlDeviceGetTemperature(device, nvml.NVML_TEMPERATURE_GPU)),
            watts=None if milliwatts is None else milliwatts / 1000,
            throttled=tuple(
                words for name, words in _REASONS.items() if reasons & getattr(nvml, name)
            ),
        )


def gpu_bytes() -> int | None:
    """Device memory that this process holds; None where nobody knows.

    The runtime's pool keeps what it once took, so after the last run this is the most there was.
    """
    with _device() as (nvml, device):
        if device is not None:
            with suppress(nvml.NVMLError):
                for process in nvml.nvmlDeviceGetComputeRunningProcesses(device):
                    if process.pid == os.getpid() and process.usedGpuMemory:
                        return int(process.usedGpuMemory)
    return None


@contextmanager
def _device() -> Iterator[tuple[Any, Any]]:
    """NVML and the GPU that CUDA counts as its first, or None for the GPU."""
    try:
        import pynvml as nvml

        nvml.nvmlInit()
    except Exception:  # no package, no library, no driver: each has errors of its own
        yield None, None
        return
    try:
        yield nvml, _first_visible(nvml)
    finally:
        nvml.nvmlShutdown()


def _first_visible(nvml: Any) -> Any:
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    with suppress(nvml.NVMLError):
        if first.isdigit():
            return nvml.nvmlDeviceGetHandleByIndex(int(first))
        return nvml.nvmlDeviceGetHandleByUUID(first)
    return None


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
