"""Writing files so that an interrupted run never leaves a half-written one behind."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch


def save_array(path: Path, array: npt.NDArray[Any]) -> None:
    """Write a .npy file under a temporary name, then rename it."""
    partial = path.with_suffix(".partial.npy")
    np.save(partial, array)
    os.replace(partial, path)


def save_state(path: Path, state: Any) -> None:
    """Write a torch checkpoint under a temporary name, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def load_state(path: Path) -> Any:
    """Read a torch checkpoint, or return None where there is none."""
    return torch.load(path, weights_only=True) if path.exists() else None
