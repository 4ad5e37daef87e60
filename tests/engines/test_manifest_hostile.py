"""Manifests from storage that others write to: each was found by fuzzing, or is its neighbour."""

import copy
import json

import pytest

from fastface_trt.engines.manifest import EXPORT_MANIFEST, ExportManifest, read_manifest
from fastface_trt.errors import ManifestError
from fastface_trt.mini import folders

GOOD = json.loads((folders.EXPORT / EXPORT_MANIFEST).read_text())


def changed(*path, value):
    tree = copy.deepcopy(GOOD)
    place = tree
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return json.dumps(tree)


FILE = ("modules", "unet", "files", 0, "path")


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000 + "]" * 100_000,
        json.dumps(GOOD)[:-1] + ',"x":' + '{"a":' * 5000 + "1" + "}" * 5000 + "}",
        '{"schema_version":' + "1" * 5000 + "}",
        changed("schema_version", value="1" * 5000),
        changed("steps", value=0),
        changed("allowed_steps", value=[4, -1]),
        changed("vae_scale_factor", value=0),
        changed("height", value=-96),
        changed("latent_channels", value=0),
        changed("image_token_count", value=0),
        changed("image_encoder_size", value=0),
        changed("loras", value=[{"role": "faceid", "scale": float("nan")}]),
        changed(*FILE, value="unet\0.onnx"),
        changed(*FILE, value="unet\n.onnx"),
        changed(*FILE, value="."),
        changed(*FILE, value="./."),
        changed(*FILE, value=""),
        changed(*FILE, value="/etc/passwd"),
        changed(*FILE, value="a/../../b"),
        changed(*FILE, value="a\\b"),
        changed(*FILE, value="\ud800"),
    ],
)
def test_is_refused_in_one_sentence(tmp_path, text):
    path = tmp_path / EXPORT_MANIFEST
    path.write_text(text)
    with pytest.raises(ManifestError) as caught:
        read_manifest(path, ExportManifest)
    assert len(str(caught.value)) < 400 + len(str(path))


def test_the_good_one_is_read(tmp_path):
    path = tmp_path / EXPORT_MANIFEST
    path.write_text(json.dumps(GOOD))
    assert read_manifest(path, ExportManifest).checkpoint == GOOD["checkpoint"]
