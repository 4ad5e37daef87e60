"""An export with another LoRA scale: what a whole export would be, made once, by content."""

import pytest

from fastface_trt.engines.files import verify_files
from fastface_trt.engines.manifest import EXPORT_MANIFEST, ExportManifest, read_manifest
from fastface_trt.evaluation.runner import export_with_lora_scale

pytestmark = pytest.mark.engines


def quietly(line):
    pass


def test_another_scale_is_the_unet_exported_with_it(
    tiny_entry, tiny_export, half_scale_export, tmp_path, monkeypatch
):
    monkeypatch.setattr("fastface_trt.checkpoints.find_checkpoint", lambda name: tiny_entry)
    folder, manifest = tiny_export
    cache = tmp_path / "cache" / "engines"
    assert export_with_lora_scale(folder, 1.0, cache, quietly) == folder
    made = export_with_lora_scale(folder, 0.5, cache, quietly)
    found = read_manifest(made / EXPORT_MANIFEST, ExportManifest)
    verify_files(made, found.files())
    assert [lora.scale for lora in found.loras] == [0.5]
    expected = half_scale_export[1].modules["unet"]
    assert [f.sha256 for f in found.modules["unet"].files] == [f.sha256 for f in expected.files]
    assert found.modules["unet"] != manifest.modules["unet"]
    rest = {name: spec for name, spec in found.modules.items() if name != "unet"}
    assert rest == {name: spec for name, spec in manifest.modules.items() if name != "unet"}

    made_again = []
    monkeypatch.setattr(
        "fastface_trt.evaluation.runner._export", lambda *arguments: made_again.append(arguments)
    )
    assert export_with_lora_scale(folder, 0.5, cache, quietly) == made
    assert made_again == []
    (made / found.modules["unet"].files[0].path).write_bytes(b"damaged")
    export_with_lora_scale(folder, 0.5, cache, quietly)
    assert len(made_again) == 1
