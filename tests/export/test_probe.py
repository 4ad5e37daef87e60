"""The probe that comes with every module: what is in it, and what an engine may differ by."""

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from fastface_trt.engines import contract
from fastface_trt.engines.device import HostDevice
from fastface_trt.engines.manifest import FileEntry, ModuleSpec, TensorSpec
from fastface_trt.engines.probe import check_probe, read_probe, relative_errors
from fastface_trt.errors import EngineMismatch, ExportIncomplete
from fastface_trt.export.modules import ModuleExport
from fastface_trt.export.probe import TOLERANCES, write_probe


def test_every_module_of_an_export_has_one_that_its_onnx_fulfils(tiny_export):
    folder, manifest = tiny_export
    listed = {file.path for file in manifest.files()}
    for name, module in manifest.modules.items():
        if name == "guidance_step":  # no weights, so nothing that a refit could get wrong
            assert module.probe is None
            continue
        assert f"{name}/probe.safetensors" in listed
        inputs, expected = read_probe(module, folder)
        rows = {len(tensor) for tensor in (*inputs.values(), *expected.values())}
        assert rows == ({2} if name == "unet" else {1})
        # As readable as the other files: an export is often made by another user than it serves.
        assert (folder / module.probe.file.path).stat().st_mode & 0o044 == (
            folder / module.files[0].path
        ).stat().st_mode & 0o044
        session = onnxruntime.InferenceSession(
            folder / module.files[0].path, providers=["CPUExecutionProvider"]
        )
        names = [output.name for output in session.get_outputs()]
        actual = dict(zip(names, session.run(names, inputs), strict=True))
        for error in relative_errors(actual, expected).values():
            assert error < TOLERANCES["fp32"]


def test_the_unets_probe_mixes_every_kind_of_manipulation(tiny_export):
    folder, manifest = tiny_export
    inputs, _ = read_probe(manifest.modules["unet"], folder)
    kinds = inputs[contract.MANIPULATION][..., contract.MANIPULATION_COLUMNS.index("kind")]
    assert kinds.shape == (2, len(contract.PARTS))
    assert set(kinds.ravel()) == set(range(len(contract.KINDS)))
    assert (kinds[0] != kinds[1]).all()
    assert inputs[contract.SAMPLE].shape == (2, 4, 8, 8)
    assert len(np.unique(inputs[contract.IP_ADAPTER_SCALE])) == kinds.size


def small(latents):
    return ModuleExport(
        "small",
        nn.Conv2d(4, 3, 1).half(),
        {"input": torch.zeros(2, 4, *latents, dtype=torch.float16)},
        ("y",),
        {"input": ("batch", 4, *latents), "latents": ("batch", 4, *latents)},
    )


def test_a_large_fixed_size_has_none(tmp_path):
    (tmp_path / "small").mkdir()
    assert write_probe(small((64, 64)), tmp_path, "fp16") is None
    assert list((tmp_path / "small").iterdir()) == []
    assert write_probe(small((32, 32)), tmp_path, "fp16").tolerance == TOLERANCES["fp16"]


class Engine:
    device = HostDevice()

    def __init__(self, value):
        self.value = value

    def __call__(self, **inputs):
        return {"y": self.value}


def test_errors_beyond_the_tolerance_and_not_finite_ones_are_refused(tmp_path):
    (tmp_path / "small").mkdir()
    probe = write_probe(small((8, 8)), tmp_path, "fp16")
    module = ModuleSpec(
        name="small",
        inputs=(TensorSpec(name="input", dtype="float16", shape=("batch", 4, 8, 8)),),
        outputs=(TensorSpec(name="y", dtype="float16", shape=("batch", 3, 8, 8)),),
        files=(FileEntry(path="small/model.onnx", bytes=1, sha256="0" * 64),),
        probe=probe,
    )
    _, expected = read_probe(module, tmp_path)
    exact = expected["y"].astype(np.float64)
    error = check_probe(Engine(exact * 1.009), module, tmp_path)["y"]
    assert error == pytest.approx(0.009)
    with pytest.raises(EngineMismatch, match=r"y is off by 0\.011"):
        check_probe(Engine(exact * 1.011), module, tmp_path)
    with pytest.raises(EngineMismatch, match="off by nan"):
        check_probe(Engine(np.where(exact > 1, np.nan, exact)), module, tmp_path)
    (tmp_path / probe.file.path).write_bytes(b"")
    with pytest.raises(ExportIncomplete, match="truncated"):
        check_probe(Engine(exact), module, tmp_path)
    with pytest.raises(ExportIncomplete, match="no probe"):
        check_probe(Engine(exact), module.model_copy(update={"probe": None}), tmp_path)
