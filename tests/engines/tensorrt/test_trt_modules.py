"""Every module of the mini model and of the golden model becomes a TensorRT-RTX engine here.

No GPU is needed. float16 graphs matter most: what PyTorch promotes silently (a Concat of fp16 and
fp32 in SDXL's added embedding), TensorRT's parser refuses.
"""

import json

import pytest

from fastface_trt.engines.cache import EngineCache
from fastface_trt.engines.files import describe_file
from fastface_trt.engines.manifest import EXPORT_MANIFEST, ExportManifest, read_manifest
from fastface_trt.engines.onnx.file import MODULE_KEY
from fastface_trt.engines.tensorrt.builder import TensorRTBuilder
from fastface_trt.engines.tensorrt.options import TensorRTOptions
from fastface_trt.errors import BuildFailed
from tests.conftest import GOLDEN

pytest.importorskip("tensorrt_rtx")
pytestmark = pytest.mark.engines

BRANCHES = (1, 2, 3)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return EngineCache(tmp_path_factory.mktemp("engines"))


def quiet(line):
    pass


def build(store, module, folder, latent_size, windows=1):
    options = TensorRTOptions(
        branches=BRANCHES, latent_sizes=(latent_size,), prompt_windows=windows
    )
    return store.get(module, folder, TensorRTBuilder("tensorrt-rtx", options))


def check_every_module(store, folder, manifest, windows=1):
    factor = manifest.vae_scale_factor
    size = (manifest.height // factor, manifest.width // factor)
    for name, module in manifest.modules.items():
        engine, place = build(store, module, folder, size, windows)
        profiles = engine.options["profiles"]
        per_request = any("requests" in tensor.shape for tensor in module.inputs)
        rows = [profile["best"][module.inputs[0].name][0] for profile in profiles]
        expected = [*BRANCHES] if per_request else [1]
        # One more for all longer prompts.
        long_prompts = [max(expected)] if windows > 1 and name == "unet" else []
        assert rows == expected + long_prompts, name
        assert engine.report.layers > 0
        assert (place / "engine.plan").stat().st_size > 0


@pytest.fixture(scope="module")
def mini_fp16(tmp_path_factory):
    from fastface_trt.checkpoints import MINI
    from fastface_trt.export.exporter import run_export
    from fastface_trt.export.options import ExportOptions

    folder = tmp_path_factory.mktemp("fp16") / "mini"
    return folder, run_export(ExportOptions(MINI, precision="fp16"), folder, quiet)


def test_the_mini_model_in_fp32(store):
    from fastface_trt.mini.folders import EXPORT

    manifest = read_manifest(EXPORT / EXPORT_MANIFEST, ExportManifest)
    check_every_module(store, EXPORT, manifest, windows=3)


def test_the_mini_model_in_fp16(store, mini_fp16):
    folder, manifest = mini_fp16
    unet = manifest.modules["unet"]
    assert unet.dtype_of("encoder_hidden_states") == "float16"
    check_every_module(store, folder, manifest)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_golden_unet(store, tmp_path, precision):
    import torch

    from fastface_trt.export.adapters import attach_adapter, read_adapter
    from fastface_trt.export.modules import unet_export
    from fastface_trt.export.onnx_writer import write_module
    from fastface_trt.export.sources import load_unet_folder

    model = GOLDEN / "pipeline" / "model"
    adapter = read_adapter(next(model.glob("*.safetensors")))
    unet = load_unet_folder(model / "unet")
    attach_adapter(unet, adapter, lora_scale=1.0)
    unet = unet.to(torch.float16 if precision == "fp16" else torch.float32)
    size = json.loads((model / "unet" / "config.json").read_text())["sample_size"]
    export = unet_export(unet, tokens=adapter.tokens, latent_size=(size, size), fixed_size=False)
    module = write_module(export, tmp_path)
    engine, _ = build(store, module, tmp_path, (size, size))
    assert len(engine.options["profiles"]) == 3


def test_a_concat_of_two_types_is_refused_with_its_module(store, mini_fp16, tmp_path):
    """What the exporter would write without its cast: the test above could not fail otherwise."""
    import onnx

    folder, manifest = mini_fp16
    module = manifest.modules["unet"]
    model = onnx.load(folder / module.files[0].path)
    cast = next(
        node
        for node in model.graph.node
        if node.op_type == "Cast"
        and [(p.key, p.value) for p in node.metadata_props] == [(MODULE_KEY, "unet.add_time_proj")]
    )
    cast.attribute[0].i = onnx.TensorProto.FLOAT
    (tmp_path / "unet").mkdir()
    path = tmp_path / module.files[0].path
    onnx.save(model, path)
    broken = module.model_copy(update={"files": (describe_file(tmp_path, path),)})
    with pytest.raises(BuildFailed, match="same type") as caught:
        build(store, broken, tmp_path, (24, 24))
    assert "(Concat)" in caught.value.message
