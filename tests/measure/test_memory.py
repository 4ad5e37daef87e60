"""Memory in bytes on every system, and what export says without torch."""

import resource
import subprocess
import sys
from types import SimpleNamespace

import pytest

from fastface_trt.errors import install_hint
from fastface_trt.measure import memory


@pytest.mark.parametrize(("system", "unit"), [("linux", 1024), ("darwin", 1)])
def test_peak_memory_is_bytes_whatever_the_system_counts_in(monkeypatch, system, unit):
    monkeypatch.setattr(memory.sys, "platform", system)
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=3000))
    assert memory.peak_bytes() == 3000 * unit


def test_the_peak_is_no_less_than_what_is_resident():
    assert 0 < memory.resident_bytes() <= 1.05 * memory.peak_bytes()


def test_export_imports_without_the_module_resource():
    code = "import sys; sys.modules['resource'] = None; import fastface_trt.export.exporter"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("module", ["adapters", "options", "quantization.calibration"])
def test_export_without_torch_says_so_in_one_sentence(module):
    code = f"import sys; sys.modules['torch'] = None; import fastface_trt.export.{module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "fastface_trt.export.TorchMissing: Exporting needs torch. "
        f"Install it with: {install_hint('export')}"
    )
