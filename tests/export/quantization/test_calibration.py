"""Calibration inputs: what is read, and that a UNet meets every branch, step and manipulation."""

import numpy as np
import pytest

from fastface_trt.engines import contract
from fastface_trt.engines.device import HostDevice
from fastface_trt.engines.manifest import EXPORT_MANIFEST, ExportManifest, read_manifest
from fastface_trt.errors import InvalidRequest
from fastface_trt.export.quantization.calibration import (
    PRESETS,
    PipelineCalibration,
    default_faces,
    default_prompts,
    find_faces,
    read_prompts,
)
from fastface_trt.mini import folders


class RecordingUNet:
    """Takes what a UNet takes, predicts nothing, and remembers its inputs."""

    spec = None
    request_counts = None

    def __init__(self):
        self.calls = []
        self.device = HostDevice()

    def __call__(self, **inputs):
        self.calls.append({name: np.array(array) for name, array in inputs.items()})
        return {contract.NOISE_PREDICTION: np.zeros_like(inputs[contract.SAMPLE])}

    def close(self):
        pass


def quiet(line):
    pass


@pytest.fixture(scope="module")
def calibrated():
    """The inputs of six pictures, made with the mini model's other modules.

    As in an export, whose UNet is written when it was calibrated.
    """
    unet = RecordingUNet()
    whole = read_manifest(folders.EXPORT / EXPORT_MANIFEST, ExportManifest)
    there = {n: m for n, m in whole.modules.items() if n not in ("unet", "guidance_step")}
    manifest = whole.model_copy(update={"modules": there})
    run = PipelineCalibration(default_prompts(), default_faces()[:2], pictures=6)
    return unet.calls, run.run(unet, manifest, folders.EXPORT, quiet), manifest, run


def test_every_branch_step_and_manipulation_is_run(calibrated):
    calls, rows, manifest, run = calibrated
    assert rows == sum(len(call[contract.SAMPLE]) for call in calls)
    assert [latents.shape for latents in run.latents] == [(4, 24, 24)] * 6
    assert rows == 2 * (4 + 10 + 12)  # each preset twice, README's table
    assert len({float(call[contract.TIMESTEP][0]) for call in calls}) == manifest.steps
    assert {len(call[contract.SAMPLE]) for call in calls} == {1, 2, 3}
    kinds = {float(kind) for call in calls for kind in call[contract.MANIPULATION][..., 0].flat}
    assert kinds == {0.0, 1.0, 2.0}
    texts = {call[contract.TEXT][-1].tobytes() for call in calls}
    assert len(texts) == 6
    tokens = {call[contract.IMAGE_TOKENS][-1].tobytes() for call in calls}
    assert len(tokens) == 2
    assert all(name in run.description for name in PRESETS)


def test_prompts_are_one_a_line(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("photo; person in a garden\n\n  sketch; person on a beach \n", encoding="utf-8")
    assert read_prompts(file) == ["photo; person in a garden", "sketch; person on a beach"]
    file.write_text("\n")
    with pytest.raises(InvalidRequest, match="no prompts"):
        read_prompts(file)
    with pytest.raises(InvalidRequest, match="absent"):
        read_prompts(tmp_path / "absent.txt")


def test_faces_are_the_pictures_of_a_folder(tmp_path):
    with pytest.raises(InvalidRequest, match="no calibration pictures"):
        find_faces(tmp_path)
    for name in ("b.PNG", "a.jpg", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in find_faces(tmp_path)] == ["a.jpg", "b.PNG"]


def test_a_picture_without_a_face_is_named(tmp_path):
    from PIL import Image

    Image.new("RGB", (200, 200), "grey").save(tmp_path / "wall.png")
    manifest = read_manifest(folders.EXPORT / EXPORT_MANIFEST, ExportManifest)
    run = PipelineCalibration(["photo; person"], find_faces(tmp_path), pictures=1)
    with pytest.raises(InvalidRequest, match=r"wall\.png"):
        run.run(RecordingUNet(), manifest, folders.EXPORT, quiet)


def test_default_prompts_mix_styles_and_places():
    prompts = default_prompts()
    assert len(set(prompts)) == 64
    assert len({prompt.split(";")[0] for prompt in prompts[:8]}) == 8
