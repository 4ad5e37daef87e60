"""FastFace-TRT: identity-preserving few-step SDXL generation from exported engines.

The package is torch-free: only `fastface_trt.export` imports torch. Public names are loaded on
first use, so that importing a sub-package costs no more than that sub-package.
"""

import os
from typing import TYPE_CHECKING, Any

# ONNX Runtime reads it when it is imported, and would send events about sessions and their models.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"

__all__ = ["FastFace", "FastFaceError", "GenerationRequest", "GenerationResult", "__version__"]

if TYPE_CHECKING:
    from fastface_trt.errors import FastFaceError
    from fastface_trt.runtime.pipeline import FastFace, GenerationResult
    from fastface_trt.runtime.request import GenerationRequest

_HOMES = {
    "FastFace": "fastface_trt.runtime.pipeline",
    "FastFaceError": "fastface_trt.errors",
    "GenerationRequest": "fastface_trt.runtime.request",
    "GenerationResult": "fastface_trt.runtime.pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
