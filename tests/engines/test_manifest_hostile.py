"""Manifests from storage that others write to: each was found by fuzzing, or is its neighbour."""

import copy
import json
import os

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


TWICE = GOOD["extra_files"][0]
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
        changed(*FILE, value="C:/Windows/win.ini"),
        changed(*FILE, value="unet/model.ort"),
        changed(*FILE, value="unet/model.onnx.data"),
        changed("modules", "unet", "name", value="vae_decoder"),
        changed("face_model", value="/etc"),
        changed("face_model", value="../face"),
        changed("face_model", value="face/../../face"),
        changed("face_model", value="C:face"),
        changed("face_model", value=""),
        changed("face_parser", value="/etc/passwd"),
        changed("face_parser", value="face_parser/model.onnx"),  # which no entry names
        changed("extra_files", value=[*GOOD["extra_files"], dict(TWICE, sha256="0" * 64)]),
    ],
)
def test_is_refused_in_one_sentence(tmp_path, text):
    path = tmp_path / EXPORT_MANIFEST
    path.write_text(text)
    with pytest.raises(ManifestError) as caught:
        read_manifest(path, ExportManifest)
    assert len(str(caught.value)) < 400 + len(str(path))


def fifo(path):
    os.mkfifo(path)


def device(path):
    path.symlink_to("/dev/zero")


def folder(path):
    path.mkdir()


def huge(path):
    with path.open("wb") as file:
        file.truncate(1 << 40)


@pytest.mark.parametrize("strange", [fifo, device, folder, huge])
def test_what_is_no_file_of_a_manifests_size_is_refused_and_not_waited_for(tmp_path, strange):
    path = tmp_path / EXPORT_MANIFEST
    strange(path)
    with pytest.raises(ManifestError, match=r"ordinary|larger"):
        read_manifest(path, ExportManifest)


def test_the_good_one_is_read(tmp_path):
    path = tmp_path / EXPORT_MANIFEST
    path.write_text(json.dumps(GOOD))
    assert read_manifest(path, ExportManifest).checkpoint == GOOD["checkpoint"]
