"""What of the machine goes into an engine's identity."""

import pytest

from fastface_trt.engines import hardware

X86 = "processor\t: 0\nflags\t\t: fpu sse2 avx avx2 fma avx512f amx_tile hypervisor\nflags\t\t: x\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd evtstrm asimddp sve\n"


@pytest.mark.parametrize(
    ("text", "isa"),
    [(X86, "amx_tile avx avx2 avx512f fma"), (ARM, "asimd asimddp sve")],
)
def test_instruction_sets_that_matter(tmp_path, monkeypatch, text, isa):
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(hardware, "_CPUINFO", tmp_path / "cpuinfo")
    assert hardware.cpu_hardware.__wrapped__()["isa"] == isa


def test_a_machine_without_cpuinfo_has_an_identity_too(tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "_CPUINFO", tmp_path / "none")
    assert hardware.cpu_hardware.__wrapped__()["machine"]


def test_cuda_without_cuda_python_is_unknown(monkeypatch):
    def refuse(name):
        raise ImportError(name)

    monkeypatch.setattr(hardware.importlib, "import_module", refuse)
    assert hardware.cuda_hardware.__wrapped__() == {
        "gpu": "unknown",
        "compute_capability": "unknown",
    }
