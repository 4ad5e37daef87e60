"""Fixtures that several folders share; what is slow to make is made once per run."""

import gc
import json
import os
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
GOLDEN = TESTS / "golden"
# What tests start imports as they do: from the clone.
os.environ["PYTHONPATH"] = str(TESTS.parent)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Nothing that tests build lands in the user's engine cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTFACE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def quick_collections():
    """The garbage collector passes over what other tests hold: millions of PyTorch's objects."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def golden():
    """Cases and tensors of a golden set by name."""
    from safetensors.numpy import load_file

    def load(name):
        folder = GOLDEN / name
        return json.loads((folder / "cases.json").read_text()), load_file(
            folder / "tensors.safetensors"
        )

    return load


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """Folder `name`, filled by `make(folder)` in whichever process of the run asks for it first."""
    from filelock import FileLock

    in_processes = "PYTEST_XDIST_WORKER" in os.environ
    root = tmp_path_factory.getbasetemp()
    root = root.parent if in_processes else root

    def made_once(name, make):
        with FileLock(root / f"{name}.lock"):
            if not (root / name).exists():
                make(root / f"{name}.part")
                (root / f"{name}.part").rename(root / name)
        return root / name

    return made_once


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folder of the tiny SDXL checkpoint: checkpoint/, image_encoder/, adapter.safetensors."""
    from tests.helpers.tiny_sdxl import write_tiny_sdxl

    return write_tiny_sdxl(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_entry(tiny, tmp_path_factory):
    """A registry entry for the tiny checkpoint, with a face model that finds drawn squares."""
    from dataclasses import replace

    from fastface_trt.checkpoints import HubItem, find_checkpoint
    from tests.helpers import face_models

    faces = tmp_path_factory.mktemp("faces") / "model"
    face_models.write(faces)
    return replace(
        find_checkpoint("mini"),
        name="tiny",
        base=HubItem(str(tiny / "checkpoint")),
        adapter=HubItem(str(tiny / "adapter.safetensors")),
        image_encoder=HubItem(str(tiny / "image_encoder")),
        face_model=str(faces),
        size=32,
    )


@pytest.fixture(scope="session")
def tiny_export(tiny_entry, made_once):
    """The tiny checkpoint exported: folder and manifest."""
    from fastface_trt.engines.manifest import EXPORT_MANIFEST, ExportManifest, read_manifest
    from fastface_trt.export.exporter import run_export
    from fastface_trt.export.options import ExportOptions

    def make(folder):
        run_export(ExportOptions(tiny_entry), folder, lambda line: None)

    folder = made_once("tiny-export", make)
    return folder, read_manifest(folder / EXPORT_MANIFEST, ExportManifest)


@pytest.fixture(scope="session")
def export_with_shared_modules(tiny_export):
    """`run_export` that copies the modules named from `source`, where they are the same there."""
    import shutil

    from fastface_trt.export import exporter

    names = ("text_encoder", "text_encoder_2", "vae_decoder", "unet")

    def run(options, out, shared=names, source=tiny_export):
        write = exporter._write
        folder, manifest = source

        def write_or_copy(name, make, target, *rest):
            if name not in shared:
                return write(name, make, target, *rest)
            if name != "unet":
                make()  # what the manifest says comes from making a module
            shutil.copytree(folder / name, target / name)
            return manifest.modules[name]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(exporter, "_write", write_or_copy)
            return exporter.run_export(options, out, lambda line: None)

    return run


@pytest.fixture(scope="session")
def half_scale_export(tiny_entry, tiny_export, made_once):
    """The tiny export with its LoRA at half scale: folder and manifest.

    Only its UNet is exported again, since the LoRA changes nothing else.
    """
    import shutil

    from fastface_trt.engines.manifest import EXPORT_MANIFEST, ExportManifest, read_manifest
    from fastface_trt.export.modules import unet_export
    from fastface_trt.export.onnx_writer import write_module
    from fastface_trt.export.options import ExportOptions
    from fastface_trt.export.probe import write_probe
    from fastface_trt.export.weights import CheckpointWeights

    whole, manifest = tiny_export

    def make(folder):
        shutil.copytree(whole, folder)
        shutil.rmtree(folder / "unet")
        options = ExportOptions(tiny_entry, faceid_lora_scale=0.5)
        unet = CheckpointWeights(options).unet()
        size = options.latent_size(manifest.vae_scale_factor, 3)
        export = unet_export(
            unet, tokens=manifest.image_token_count, latent_size=size, fixed_size=False
        )
        spec = write_module(export, folder)
        spec = spec.model_copy(update={"probe": write_probe(export, folder, "fp32")})
        modules = manifest.modules | {"unet": spec}
        changed = manifest.model_copy(update={"modules": modules})
        (folder / EXPORT_MANIFEST).write_text(changed.model_dump_json())

    folder = made_once("half-scale-export", make)
    return folder, read_manifest(folder / EXPORT_MANIFEST, ExportManifest)


@pytest.fixture(scope="session")
def tiny_fp16_unet(tiny, made_once):
    """The tiny UNet exported in fp16, folder and spec, for what looks at its graph."""
    from fastface_trt.engines.manifest import ModuleSpec
    from fastface_trt.export.adapters import attach_adapter, read_adapter
    from fastface_trt.export.modules import unet_export
    from fastface_trt.export.onnx_writer import write_module
    from tests.helpers.tiny_sdxl import tiny_unet

    def make(folder):
        folder.mkdir()
        unet = tiny_unet()
        attach_adapter(unet, read_adapter(tiny / "adapter.safetensors"), lora_scale=1.0)
        export = unet_export(unet.half(), tokens=4, latent_size=(16, 16), fixed_size=False)
        spec = write_module(export, folder)
        (folder / "spec.json").write_text(spec.model_dump_json())

    folder = made_once("tiny-fp16-unet", make)
    return folder, ModuleSpec.model_validate_json((folder / "spec.json").read_text())


@pytest.fixture
def cuda():
    """The driver of a simulated GPU, which must get all of its memory back."""
    from tests.engines.gpu_double import simulated_gpu

    with simulated_gpu() as (driver, _):
        yield driver
        gc.collect()
        assert driver.leaks() == []


@pytest.fixture
def device(cuda):
    """A device on the simulated GPU."""
    from fastface_trt.engines.cuda.device import CudaDevice

    opened = CudaDevice()
    yield opened
    gc.collect()  # the test's own tensors go before the device
    opened.close()
