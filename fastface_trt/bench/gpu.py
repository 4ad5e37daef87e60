"""What NVIDIA's management library (NVML, package nvidia-ml-py) says about the GPU in use."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final, TypeVar

from fastface_trt.bench.report import GpuState

Value = TypeVar("Value")

_REASONS: Final = {
    "nvmlClocksEventReasonSwPowerCap": "power limit",
    "nvmlClocksEventReasonHwSlowdown": "hardware slowdown",
    "nvmlClocksEventReasonHwThermalSlowdown": "heat (hardware)",
    "nvmlClocksEventReasonSwThermalSlowdown": "heat (driver)",
    "nvmlClocksEventReasonHwPowerBrakeSlowdown": "power brake",
}
"""Reasons why clocks are lower than they could be; an idle GPU is no such reason."""


def state() -> GpuState | None:
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


def held_bytes() -> int | None:
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
