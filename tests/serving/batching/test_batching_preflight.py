"""Engines are not opened where not even their weights fit into memory."""

from types import SimpleNamespace

import pytest

from fastface_trt.errors import OutOfMemory
from fastface_trt.mini.folders import EXPORT
from fastface_trt.serving.batching import opening
from fastface_trt.serving.settings import WorkerSettings

WEIGHTS = sum(path.stat().st_size for path in EXPORT.glob("*/*.onnx*"))


@pytest.mark.parametrize(("free", "fits"), [(WEIGHTS // 2, False), (2 * WEIGHTS, True)])
def test_weights_against_free_memory(monkeypatch, free, fits):
    memory = SimpleNamespace(available=free)
    monkeypatch.setattr(opening.psutil, "virtual_memory", lambda: memory)
    if fits:
        opening.check_memory(WorkerSettings())
    else:
        with pytest.raises(OutOfMemory):
            opening.check_memory(WorkerSettings())
    opening.check_memory(WorkerSettings(backend="tensorrt"))  # its engines look themselves
