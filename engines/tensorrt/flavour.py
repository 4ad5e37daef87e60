"""The two flavours of TensorRT: which packages they are, and what only one of them can do.

Everything else in this package is written against the API that both bindings share. A capability is
named here once, and code asks for it by name; nothing is probed with hasattr, since a missing flag
would then silently build something else.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from fastface_trt.engines.hardware import FROM_TURING, RTX, Capabilities, refused_gpu
from fastface_trt.errors import BackendUnavailable, InvalidRequest, UnknownName, install_hint

FlavourName = Literal["tensorrt", "tensorrt-rtx"]

CAPABILITIES: Mapping[str, str] = MappingProxyType(
    {
        "build_routes": "build routes",
        "builds_without_gpu": "building an engine on a machine without a GPU",
        "compute_capabilities": "choosing the GPU generations that an engine is built for",
        "cuda_graph_strategy": "capturing CUDA graphs inside the execution context",
        "hardware_compatibility": "engines that run on other GPU generations",
        "kernel_specialization": "choosing when kernels are compiled for a shape",
        "plugins": "plugins",
        "runtime_cache": "keeping kernels that were compiled at run time",
        "timing_cache": "a timing cache",
        "version_compatibility": "engines that newer versions can run",
    }
)


@dataclass(frozen=True)
class Flavour:
    """One flavour: its import name, the oldest major version it is written for, what it can do.

    `gpus` says in words which GPUs it runs on, for messages and tables, `takes` by their compute
    capabilities.
    """

    name: FlavourName
    module_name: str
    label: str
    oldest: tuple[int, int]
    supports: frozenset[str]
    gpus: str
    takes: Capabilities

    def module(self) -> Any:
        """The imported binding; raises `BackendUnavailable` when it is missing or too old."""
        try:
            binding = importlib.import_module(self.module_name)
            version = str(binding.__version__)
            binding.Logger  # noqa: B018 - a stub package imports and holds nothing
        except Exception as error:  # a stub or a missing library may throw anything
            raise BackendUnavailable(
                f"{self.label} cannot be imported: {error}.", self._hint
            ) from None
        if tuple(int(part) for part in version.split(".")[:2]) < self.oldest:
            raise BackendUnavailable(
                f"{self.label} {version} is older than {'.'.join(map(str, self.oldest))}, "
                "which this program is written for.",
                self._hint,
            )
        return binding

    def version(self) -> str:
        """The binding's version; raises `BackendUnavailable` without one."""
        return str(self.module().__version__)

    def check_gpu(self, gpu: Mapping[str, str]) -> None:
        """Raise `BackendUnavailable` if `gpu`, known to `cuda_hardware`, is none that it takes."""
        refused = refused_gpu(self.takes, gpu)
        if refused is not None:
            elsewhere = (
                "; `fastface-trt build --target` builds for others"
                if "compute_capabilities" in self.supports
                else ""
            )
            raise BackendUnavailable(
                f"{self.label} {self.version()} does not take {refused}; it takes {self.takes}.",
                f"Use the backend onnxruntime-cuda on this GPU{elsewhere}.",
            )

    def require(self, capability: str) -> None:
        """Raise `InvalidRequest` unless this flavour has `capability`."""
        if capability not in self.supports:
            others = [f.label for f in FLAVOURS.values() if capability in f.supports]
            raise InvalidRequest(
                f"{self.label} does not offer {CAPABILITIES[capability]}.",
                f"Leave the option out, or use {' or '.join(others)}.",
            )

    @property
    def _hint(self) -> str:
        package = "tensorrt-cu13" if self.name == "tensorrt" else "tensorrt-rtx-cu13"
        return f"{install_hint(self.name)} (it brings {package})."


FLAVOURS: Mapping[str, Flavour] = MappingProxyType(
    {
        flavour.name: flavour
        for flavour in (
            Flavour(
                "tensorrt",
                "tensorrt",
                "TensorRT",
                (11, 0),
                frozenset(
                    (
                        "build_routes",
                        "hardware_compatibility",
                        "plugins",
                        "timing_cache",
                        "version_compatibility",
                    )
                ),
                "data-centre and workstation GPUs from Turing on, and Jetson",
                FROM_TURING,
            ),
            Flavour(
                "tensorrt-rtx",
                "tensorrt_rtx",
                "TensorRT-RTX",
                (1, 5),
                frozenset(
                    (
                        "builds_without_gpu",
                        "compute_capabilities",
                        "cuda_graph_strategy",
                        "kernel_specialization",
                        "runtime_cache",
                    )
                ),
                "RTX GPUs: Turing, Ampere, Ada and Blackwell",
                RTX,
            ),
        )
    }
)


def find_flavour(name: str) -> Flavour:
    """The flavour called `name`; raises `UnknownName`."""
    if name not in FLAVOURS:
        raise UnknownName("TensorRT flavour", name, FLAVOURS)
    return FLAVOURS[name]
