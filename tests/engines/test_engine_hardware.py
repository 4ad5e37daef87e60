"""What of the machine goes into an engine's identity."""

import pytest

from fastface_trt.engines import hardware
from fastface_trt.errors import install_hint

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
    why, hint = hardware.why_no_gpu()
    assert "cuda-python" in why
    assert install_hint("gpu") in hint


@pytest.mark.parametrize(
    ("takes", "inside", "outside"),
    [
        (hardware.RTX, "7.5 8.0 8.6 8.9 12.0 12.1 13.0", "7.0 8.7 9.0 10.0 10.3 11.0 unknown"),
        (hardware.FROM_TURING, "7.5 8.0 9.0 10.0 12.0", "6.1 7.0 7.2 unknown"),
    ],
)
def test_which_gpus_a_library_takes(takes, inside, outside):
    for texts, expected in ((inside, True), (outside, False)):
        for text in texts.split():
            gpu = {"gpu": "Some GPU", "compute_capability": text}
            assert (hardware.refused_gpu(takes, gpu) is None) is expected, text
    assert hardware.refused_gpu(takes, gpu) == "Some GPU (compute capability unknown)"


def test_why_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(hardware, "cuda_driver", lambda: {})
    assert "no NVIDIA driver" in hardware.why_no_gpu()[0]
    monkeypatch.setattr(hardware, "cuda_driver", lambda: {"driver": "13.0"})
    assert "finds no NVIDIA GPU" in hardware.why_no_gpu()[0]
