"""Polygraphy's linter on every exported ONNX, and on files that deserve its complaints."""

import numpy as np
import onnx
import pytest
from onnx import helper

from fastface_trt.engines.files import describe_file
from fastface_trt.engines.manifest import (
    EXPORT_MANIFEST,
    MODULE_NAMES,
    ExportManifest,
    read_manifest,
)
from fastface_trt.export.exporter import run_export
from fastface_trt.export.options import ExportOptions
from fastface_trt.mini.folders import EXPORT
from fastface_trt.verify.inputs import module_inputs
from fastface_trt.verify.lint import lint
from tests.engines.tiny_models import WIDTH, write_module

FALSE_POSITIVES = {
    # 1/√D is a constant where D is: ONNX Runtime's optimiser folds constants with CPU kernels, has
    # none for a float16 Sqrt, and computes it while running instead.
    "Could not find a CPU kernel and hence can't constant fold Sqrt node ''",
}


def quiet(line):
    pass


def complaints(folder, manifest):
    """What the linter says about an export beyond the known, module by module."""
    found = {}
    for name, module in manifest.modules.items():
        entries = lint(module, folder, module_inputs(module, manifest, folder))
        found[name] = [e for e in entries if e.is_error or e.message not in FALSE_POSITIVES]
    return found


def test_the_tiny_export_in_fp32_is_clean(tiny_export):
    found = complaints(*tiny_export)
    assert set(found) >= {"unet", "vae_decoder", "text_encoder"}
    assert not any(found.values()), found


@pytest.mark.engines
def test_the_tiny_export_in_fp16_is_clean(tiny_entry, tmp_path):
    manifest = run_export(ExportOptions(tiny_entry, precision="fp16"), tmp_path / "fp16", quiet)
    found = complaints(tmp_path / "fp16", manifest)
    assert not any(found.values()), found


def test_the_mini_model_as_it_ships_is_clean():
    manifest = read_manifest(EXPORT / EXPORT_MANIFEST, ExportManifest)
    assert set(manifest.modules) <= set(MODULE_NAMES)
    found = complaints(EXPORT, manifest)
    assert not any(found.values()), found


def spoiled(tmp_path, change):
    module = write_module(tmp_path)
    path = tmp_path / module.files[0].path
    model = onnx.load(path)
    change(model)
    onnx.save(model, path)
    module = module.model_copy(update={"files": (describe_file(tmp_path, path),)})
    return lint(module, tmp_path, {"x": np.ones((2, WIDTH), np.float32)})


def test_a_good_module_is_clean(tmp_path):
    assert spoiled(tmp_path, lambda model: None) == []


def twice_the_name(model):
    model.graph.node[0].name = "one"
    model.graph.node.insert(0, helper.make_node("Identity", ["x"], ["unused"], name="one"))


def wrong_type_in_the_function(model):
    """The trap of SDXL's time embedding: two types meet where ONNX wants one."""
    body = model.functions[0].node
    body.append(helper.make_node("Add", ["wide", "b"], ["y"]))
    body[1].output[0] = "narrow"
    body.insert(2, helper.make_node("Cast", ["narrow"], ["wide"], to=onnx.TensorProto.FLOAT16))


@pytest.mark.parametrize(
    ("change", "says"),
    [(twice_the_name, "Duplicate node name"), (wrong_type_in_the_function, "Add")],
)
def test_a_bad_module_is_reported(tmp_path, change, says):
    entries = spoiled(tmp_path, change)
    assert any(entry.is_error and says in entry.message for entry in entries), entries


def test_what_serves_nothing_is_a_warning(tmp_path):
    def idle(model):
        model.graph.node.append(helper.make_node("Identity", ["x"], ["unused"], name="idle"))

    (entry,) = spoiled(tmp_path, idle)
    assert (entry.level, entry.nodes) == ("warning", ("idle",))
