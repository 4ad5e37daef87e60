"""The mini model as it ships: complete, in step with its weights, and good for what it is for."""

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from fastface_trt import FastFace
from fastface_trt.cli.main import cli
from fastface_trt.engines.files import verify_files
from fastface_trt.engines.manifest import EXPORT_MANIFEST, ExportManifest, read_manifest
from fastface_trt.evaluation.mini import POPULATION, MiniNetworks
from fastface_trt.export.locations import sha256_folder
from fastface_trt.mini import folders
from fastface_trt.mini.identity import sample_identity
from fastface_trt.mini.prompts import PLACE_NAMES, STYLE_NAMES, Scene, canonical_prompt
from fastface_trt.mini.scene import draw_portrait
from fastface_trt.runtime.picture_file import read_parameters


def test_shipped_export_is_complete_and_made_of_the_shipped_weights():
    manifest = read_manifest(folders.EXPORT / EXPORT_MANIFEST, ExportManifest)
    verify_files(folders.EXPORT, manifest.files())
    sources = {source.role: source.sha256 for source in manifest.sources}
    assert sources["checkpoint"] == sha256_folder(folders.CHECKPOINT)
    assert sources["image_encoder"] == sha256_folder(folders.IMAGE_ENCODER)


def test_demo_writes_two_contact_sheets(tmp_path):
    result = CliRunner().invoke(cli, ["demo", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    for name in ("demo-prompts.png", "demo-presets.png"):
        assert Image.open(tmp_path / name).width > 1000
        assert read_parameters(tmp_path / name)["pictures"]


@pytest.fixture(scope="module")
def judged():
    """Sixteen pictures of eight unseen people, judged; and the judge's view of the people."""
    networks = MiniNetworks()
    photos = [
        np.asarray(
            draw_portrait(sample_identity(n, POPULATION), Scene("photo", "garden", "smiling"), n)[0]
        )
        for n in range(8)
    ]
    scenes = [
        Scene(STYLE_NAMES[n % 8], PLACE_NAMES[(n + n // 8) % 8], "smiling") for n in range(16)
    ]
    with FastFace.load("mini") as fastface:
        faces = [fastface.analyze(photo) for photo in photos]
        requests = [
            fastface.request(canonical_prompt(scene), seed=n) for n, scene in enumerate(scenes)
        ]
        result = fastface.generate(requests, [faces[n % 8] for n in range(16)], max_rows=16)
    pictures = [np.asarray(image) for image in result.images]
    seen = [networks.scene(picture).best for picture in pictures]
    embeddings = [networks.embedding(picture) for picture in pictures]
    return scenes, seen, embeddings, [networks.embedding(photo) for photo in photos]


def test_style_and_place_are_what_the_prompt_says(judged):
    scenes, seen, _, _ = judged
    assert np.mean([v[0] == s.style for s, v in zip(scenes, seen, strict=True)]) >= 0.75
    assert np.mean([v[1] == s.place for s, v in zip(scenes, seen, strict=True)]) >= 0.6


def test_pictures_look_more_like_their_person_than_like_others(judged):
    _, _, embeddings, people = judged
    same, other = [], []
    for index, embedding in enumerate(embeddings):
        if embedding is not None:
            similarity = np.stack(people) @ embedding
            same.append(similarity[index % 8])
            other.append(np.delete(similarity, index % 8).mean())
    assert len(same) >= 8
    assert np.mean(same) > np.mean(other) + 0.05
