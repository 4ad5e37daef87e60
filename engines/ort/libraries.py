"""CUDA libraries that came as Python packages: opened before ONNX Runtime looks for them.

A GPU provider is a shared library that is opened with the first session, and finds what it links to
only where the system's loader looks, or among what the process has open already. NVIDIA's packages
(nvidia-cublas, nvidia-cudnn-cu13, …) lie in neither; so they are opened here by their paths, and no
LD_LIBRARY_PATH is needed. The CPU's provider needs none of this and pays nothing.
"""

import contextlib
import ctypes
import importlib.util
import io
import sys
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

_TENSORRT = ("libnvinfer.so.10", "libnvonnxparser.so.10")
"""What the provider `tensorrt` of ONNX Runtime 1.20 to 1.31 links to besides: TensorRT 10."""


def cuda_version(onnxruntime: Any) -> tuple[int, ...]:
    """The CUDA version that this ONNX Runtime was built with, such as (13, 0); () for a CPU one."""
    text = str(getattr(onnxruntime, "cuda_version", "") or "")
    return tuple(int(part) for part in text.split(".") if part.isdigit())


def library_names(provider: str, cuda_major: int) -> tuple[str, ...]:
    """The libraries of CUDA, cuDNN and TensorRT that a provider opens, in order of dependence."""
    names = (
        f"libcudart.so.{cuda_major}",
        f"libnvrtc.so.{cuda_major}",
        f"libcublasLt.so.{cuda_major}",
        f"libcublas.so.{cuda_major}",
        "libcurand.so.10",
        f"libcufft.so.{cuda_major - 1}",
        "libcudnn.so.9",
    )
    return names + (_TENSORRT if provider == "tensorrt" else ())


@lru_cache
def open_libraries(onnxruntime: Any, provider: str) -> None:
    """Open the libraries of a GPU provider wherever they came as packages; raises nothing.

    ONNX Runtime's own way is tried first (it has one from 1.21 on, and prints what it does not
    find); what that leaves is looked for in the packages' folders. Once per process.
    """
    version = cuda_version(onnxruntime)
    if provider == "cpu" or not version:
        return
    with contextlib.suppress(Exception), contextlib.redirect_stdout(io.StringIO()):
        onnxruntime.preload_dlls()
    left = missing_libraries(provider, version[0])
    while left:
        after = [name for name in left if not _open(name)]
        if len(after) == len(left):
            return
        left = after  # one that needed another may open now


def missing_libraries(provider: str, cuda_major: int) -> list[str]:
    """Which of a provider's libraries neither are open nor lie where the loader looks."""
    if sys.platform != "linux":
        return []
    return [name for name in library_names(provider, cuda_major) if not _opens((name,))]


def _open(name: str) -> bool:
    return _opens([str(folder / name) for folder in _folders() if (folder / name).is_file()])


def _opens(candidates: Sequence[str]) -> bool:
    for candidate in candidates:
        with contextlib.suppress(OSError):
            # Global, because a provider refers to symbols of libraries that it does not name.
            ctypes.CDLL(candidate, mode=ctypes.RTLD_GLOBAL)
            return True
    return False


def _folders() -> Iterator[Path]:
    """Where packages keep shared libraries: nvidia/*/lib, and TensorRT's own."""
    for package, pattern in (("nvidia", "*/lib"), ("tensorrt_libs", ".")):
        spec = importlib.util.find_spec(package)
        for root in (spec and spec.submodule_search_locations) or ():
            yield from sorted(Path(root).glob(pattern)) if pattern != "." else (Path(root),)
