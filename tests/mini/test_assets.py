"""The shipped assets: complete, small, and understood by the libraries they are made for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from fastface_trt.mini import folders

ASSETS = folders.MINI
ROOT = Path(__file__).parents[2]
DETECTOR_SIZES = (640, 576, 512, 448, 384, 320)


def test_checkpoint_is_complete() -> None:
    checkpoint = ASSETS / "checkpoint"
    index = json.loads((checkpoint / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionXLPipeline"
    assert index["force_zeros_for_empty_prompt"] is True
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        assert (checkpoint / name / "config.json").exists()
        assert list((checkpoint / name).glob("*.safetensors"))
    for name in ("tokenizer", "tokenizer_2"):
        files = ("vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json")
        assert all((checkpoint / name / file).exists() for file in files)
        assert len(json.loads((checkpoint / name / "vocab.json").read_text())) > 514


def test_adapter_has_the_original_layout() -> None:
    file = ASSETS / "ip-adapter-faceid-plusv2_mini.safetensors"
    unet = json.loads((ASSETS / "checkpoint" / "unet" / "config.json").read_text())
    with safe_open(file, "np") as tensors:
        keys = set(tensors.keys())
        width = tensors.get_slice("ip_adapter.1.to_k_ip.weight").get_shape()[1]
        assert tensors.get_slice("image_proj.proj.0.weight").get_shape()[1] == 512
    assert width == unet["cross_attention_dim"]
    assert "image_proj.perceiver_resampler.layers.3.1.3.weight" in keys
    assert "ip_adapter.0.to_q_lora.down.weight" in keys
    assert "ip_adapter.0.to_k_ip.weight" not in keys, "self-attention has no image branch"


@pytest.fixture(scope="module")
def analysis() -> Any:
    from insightface.app import FaceAnalysis

    return FaceAnalysis(name=str(folders.FACE_MODEL), providers=["CPUExecutionProvider"])


def _faces(analysis: Any, path: Path, size: int = 640) -> list[Any]:
    analysis.prepare(ctx_id=-1, det_size=(size, size))
    bgr = np.asarray(Image.open(path).convert("RGB"))[:, :, ::-1]
    return list(analysis.get(np.ascontiguousarray(bgr)))


@pytest.mark.parametrize("size", DETECTOR_SIZES)
def test_insightface_finds_one_face_per_sample(analysis: Any, size: int) -> None:
    names = [path for path in sorted((ASSETS / "faces").glob("*.png")) if "two" not in path.stem]
    assert len(names) >= 6
    for path in names:
        assert len(_faces(analysis, path, size)) == 1, path.name


def test_insightface_finds_two_people(analysis: Any) -> None:
    assert len(_faces(analysis, ASSETS / "faces" / "two_people.png")) == 2


def test_nobody_in_an_empty_picture(analysis: Any) -> None:
    from fastface_trt.mini.prompts import PLACE_NAMES, Scene
    from fastface_trt.mini.scene import draw_people

    analysis.prepare(ctx_id=-1, det_size=(640, 640))
    for place in PLACE_NAMES:
        image, _ = draw_people([], Scene("photo", place, "smiling"), np.random.default_rng(1))
        assert not analysis.get(np.ascontiguousarray(np.asarray(image)[:, :, ::-1])), place


def test_key_points_and_identity_of_people_nobody_trained_on(analysis: Any) -> None:
    from fastface_trt.mini.identity import sample_identity
    from fastface_trt.mini.prompts import Scene
    from fastface_trt.mini.scene import draw_portrait

    analysis.prepare(ctx_id=-1, det_size=(640, 640))
    embeddings = []
    for number in range(6):
        row = []
        for style, place in (("photo", "forest"), ("watercolor", "city"), ("comic", "beach")):
            scene = Scene(style, place, "smiling")
            image, truth = draw_portrait(sample_identity(number, "unseen"), scene, number)
            found = analysis.get(np.ascontiguousarray(np.asarray(image)[:, :, ::-1]))
            assert len(found) == 1
            assert np.abs(found[0].kps - truth.key_points).mean() < 2
            row.append(found[0].normed_embedding)
        embeddings.append(row)
    units = np.array(embeddings)
    same = np.mean([units[n, 0] @ units[n, k] for n in range(6) for k in (1, 2)])
    other = np.mean([units[n, 0] @ units[m, 1] for n in range(6) for m in range(6) if n != m])
    assert same > 0.6
    assert other < 0.25


def test_judges_read_drawn_pictures() -> None:
    import onnxruntime

    from fastface_trt.mini.identity import sample_identity
    from fastface_trt.mini.prompts import PLACE_NAMES, STYLE_NAMES, Scene
    from fastface_trt.mini.scene import draw_portrait

    labels = json.loads((ASSETS / "judges" / "labels.json").read_text())
    assert labels["style"] == list(STYLE_NAMES)
    assert labels["place"] == list(PLACE_NAMES)
    judge = onnxruntime.InferenceSession(
        str(ASSETS / "judges" / "scene.onnx"), providers=["CPUExecutionProvider"]
    )
    right = 0
    for index in range(16):
        scene = Scene(STYLE_NAMES[index % 8], PLACE_NAMES[(index * 3 + index // 8) % 8], "waving")
        image, _ = draw_portrait(sample_identity(index, "unseen"), scene, index)
        values = (np.asarray(image, dtype=np.float32) - 127.5) / 127.5
        style, place = judge.run(
            None, {judge.get_inputs()[0].name: values.transpose(2, 0, 1)[None]}
        )
        right += STYLE_NAMES[style.argmax()] == scene.style
        right += PLACE_NAMES[place.argmax()] == scene.place
    assert right >= 29


def test_assets_are_small() -> None:
    weights = [
        path for path in ASSETS.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")
    ]
    assert sum(path.stat().st_size for path in weights) < 30e6


@pytest.mark.parametrize("program", ["train", "preview"])
def test_the_programs_that_make_and_judge_them_start(program: str) -> None:
    command = [sys.executable, "-m", f"tools.mini_model.{program}", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout
