"""An export folder of a few files, with everything but sense in them."""

import random
import shutil

from fastface_trt.engines.files import describe_file
from fastface_trt.engines.manifest import EXPORT_MANIFEST, ExportManifest, ModuleSpec, TensorSpec
from fastface_trt.serving.storage.release import to_json


def write_small_export(folder, *, seed=0, size=3_000_000, shared=None):
    """Write it; only `unet/model.onnx` differs from the export `shared`. Returns the folder."""
    if shared is not None:
        shutil.copytree(shared, folder)
    (folder / "unet").mkdir(parents=True, exist_ok=True)
    (folder / "unet" / "model.onnx").write_bytes(random.Random(seed).randbytes(size))
    if shared is None:
        (folder / "tokenizer").mkdir()
        (folder / "tokenizer" / "vocab.json").write_text(f'{{"seed": {seed}}}')
        (folder / "empty").write_bytes(b"")
    tensor = TensorSpec(name="x", dtype="float32", shape=(1,))
    model = describe_file(folder, "unet/model.onnx")
    module = ModuleSpec(name="unet", inputs=(tensor,), outputs=(tensor,), files=(model,))
    manifest = ExportManifest(
        checkpoint="small",
        adapter="none",
        precision="fp32",
        weight_storage="fp32",
        modules={"unet": module},
        extra_files=tuple(describe_file(folder, n) for n in ("tokenizer/vocab.json", "empty")),
        scheduler={"class": "DDIM"},
        steps=4,
        allowed_steps=(4,),
        height=96,
        width=96,
        vae_scale_factor=8,
        latent_channels=4,
        image_token_count=4,
        face_model="none",
    )
    (folder / EXPORT_MANIFEST).write_bytes(to_json(manifest))
    return folder
