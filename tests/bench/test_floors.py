"""Floors of stages are those of the modules that ran in them."""

from types import SimpleNamespace

import pytest

from fastface_trt.bench.flops import count_module
from fastface_trt.bench.roofline import MachineRates, floor, stage_floors
from fastface_trt.engines.manifest import EXPORT_MANIFEST, ExportManifest, read_manifest
from fastface_trt.mini import folders
from fastface_trt.runtime.export_folder import Export

RATES = MachineRates("onnxruntime", "float32", 1e11, 1e10, "", {})


def stage(name, label=None, calls=1, rows=None, branches=None):
    return SimpleNamespace(
        name=name, label=label or name, calls=calls, rows=rows, branches=branches
    )


@pytest.fixture(scope="module")
def floors():
    manifest = read_manifest(folders.EXPORT / EXPORT_MANIFEST, ExportManifest)
    stages = [
        stage("tokenise"),
        stage("text_encoder", calls=2),
        stage("unet", "unet 1", rows=2, branches=2),
        stage("unet", "unet 2", calls=2, rows=12, branches=3),
        stage("vae_decoder"),
    ]
    return stage_floors(stages, Export(folders.EXPORT, manifest), RATES, height=96, width=64)


def counted(module, **sizes):
    return count_module(
        folders.EXPORT / module / "model.onnx", {"height": 24, "width": 16, "text": 77} | sizes
    )


def test_only_modules_have_a_floor(floors):
    assert floors.keys() == {"text_encoder", "unet 1", "unet 2", "vae_decoder"}
    assert floors["vae_decoder"] == floor(counted("vae_decoder", batch=1), RATES)


def test_rows_and_calls_are_counted(floors):
    one_step = counted("unet", batch=2, requests=1)
    assert floors["unet 1"] == floor(one_step, RATES)
    two_requests = counted("unet", batch=6, requests=2)
    assert floors["unet 2"].flops == 2 * two_requests.flops == 6 * one_step.flops
    assert floors["unet 2"].bytes == 2 * two_requests.bytes
    assert floors["text_encoder"].flops == 2 * counted("text_encoder", batch=1).flops
