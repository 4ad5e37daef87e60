"""Forms of an exported module: rewritten graphs for ONNX Runtime's CPU and CUDA providers."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

VERSION: Final = 2
"""Part of an engine's identity: another form of the same module is another engine."""

Manipulation = Literal["operator", "branches"]
"""How a CUDA form computes λ f(A) V'."""


@dataclass(frozen=True)
class Form:
    """A rewritten model, and how often each rewrite found its pattern.

    `model` is a serialised ModelProto; its external data stays in the folder of the export.
    """

    model: bytes
    counts: Mapping[str, int]


def cpu_form(path: Path, tokens: int | None) -> Form | None:
    """The module in the CPU's form, None where there is nothing to rewrite."""
    return None


def cuda_form(path: Path, tokens: int | None, manipulation: Manipulation) -> Form | None:
    """The module in the CUDA provider's form, None where there is nothing to rewrite."""
    return None
