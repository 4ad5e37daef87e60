"""From a face and a prompt to a picture, over the tiny checkpoint and the real engines."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from fastface_trt import FastFace
from fastface_trt.engines.files import describe_file
from fastface_trt.engines.manifest import EXPORT_MANIFEST, ExportManifest, read_manifest
from fastface_trt.errors import (
    Cancelled,
    EngineFailed,
    ExportIncomplete,
    FaceIndexOutOfRange,
    InvalidRequest,
    ManifestError,
    NoFaceFound,
    UnknownName,
)
from fastface_trt.mini import folders
from fastface_trt.mini.folders import SAMPLE_FACES
from fastface_trt.runtime.manipulation import AttentionManipulation, PartManipulation
from fastface_trt.runtime.sampling import standard_noise
from fastface_trt.runtime.timeline import Recorder
from tests.helpers import face_models


def picture(*centres):
    canvas = np.full((320, 320, 3), 30, np.uint8)
    for index, centre in enumerate(centres):
        face_models.draw(canvas, centre, 24, half=60 + 10 * index)
    return canvas


FACE = picture((160, 160))
PROMPT = "photo; person in a garden"


@pytest.fixture(scope="module")
def fastface(tiny_export):
    with FastFace.load(tiny_export[0]) as loaded:
        yield loaded


def pixels(result):
    return [np.asarray(image).astype(np.int16) for image in result.images]


def test_a_picture_of_two_people_says_who_was_taken(fastface):
    two = picture((80, 80), (220, 220))
    (warning,) = fastface(PROMPT, two, num_images_per_prompt=2).warnings
    assert "has 2 faces; the largest is used" in warning
    assert fastface(PROMPT, two, face_index=0).warnings == []
    assert fastface(PROMPT, FACE).warnings == []


def test_one_picture(fastface):
    result = fastface(PROMPT, FACE, preset="am1+dcg", seed=3)
    (image,) = result.images
    assert image.size == (32, 32)
    assert image.mode == "RGB"
    assert result.unet_samples == 10
    assert [len(b) for b in result.branches[0]] == [2, 3, 3, 2]
    assert set(result.seconds) == {"total", "face", "text", "unet", "vae"}
    assert result.parameters[0]["seed"] == 3
    assert result.warnings == []


def test_what_is_forgotten_is_encoded_again(fastface):
    def encoded(timeline):
        fastface(PROMPT, FACE, seed=3, timeline=timeline)
        return [span.name for span in timeline.spans() if "encoder" in span.name]

    fastface(PROMPT, FACE, seed=3)
    assert encoded(Recorder()) == []
    fastface.forget()
    # The face and no face, and the prompt: for an empty one this model was made to see zeros.
    assert sorted(encoded(Recorder())) == ["image_encoder"] * 2 + ["text_encoder", "text_encoder_2"]


def test_a_face_is_found_once_per_content_of_its_picture():
    pixels_of = np.asarray(Image.open(sorted(SAMPLE_FACES.glob("*.png"))[0]).convert("RGB"))
    with FastFace.load("mini") as mini:

        def detections(picture):
            timeline = Recorder()
            mini.analyze(picture, timeline=timeline)
            return sum(span.name == "face_detection" for span in timeline.spans())

        assert detections(pixels_of) == 1
        assert detections(pixels_of.copy()) == 0
        assert detections(pixels_of[:, ::-1]) == 1
        mini.forget()
        assert detections(pixels_of) == 1


def test_same_seed_same_picture_other_seed_other_picture(fastface):
    first, again, other = (pixels(fastface(PROMPT, FACE, seed=s))[0] for s in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 3


def test_a_batch_of_different_requests_equals_single_runs(fastface):
    base = fastface.request(PROMPT, seed=4)
    requests = [
        base.with_preset("am2+dcg"),
        replace(base, seed=5, ip_adapter_scale=0.2).with_preset("am1"),
        replace(base, prompt="oil painting; person", negative_prompt="fog").with_preset("dcg"),
        replace(base, height=48, width=32, steps=2),
    ]
    together = pixels(fastface.generate(requests, [FACE] * 4))
    for request, expected in zip(requests, together, strict=True):
        single = pixels(fastface.generate([request], [FACE]))[0]
        assert np.abs(single - expected).max() <= 1  # one step of 255 is rounding


def test_every_picture_is_told_before_the_next_is_decoded(fastface, monkeypatch):
    happened = []
    decode = type(fastface.stages).decode

    def decoding(self, *args, **kwargs):
        happened.append("decode")
        return decode(self, *args, **kwargs)

    monkeypatch.setattr(type(fastface.stages), "decode", decoding)
    result = fastface.generate(
        [fastface.request(PROMPT, seed=seed) for seed in (1, 2)],
        [FACE] * 2,
        on_picture=lambda *told: happened.append(told),
    )
    assert [one if one == "decode" else one[0] for one in happened] == ["decode", 0, "decode", 1]
    for index, image, parameters in happened[1::2]:
        assert image is result.images[index]
        assert parameters == result.parameters[index]


@pytest.mark.parametrize("out", [False, True])
def test_an_export_without_pixels_gives_the_same_pictures(tmp_path, out):
    """As versions before wrote it: the host rounds."""
    onnx = pytest.importorskip("onnx")
    shutil.copytree(folders.EXPORT, tmp_path / "older")
    path = tmp_path / "older" / EXPORT_MANIFEST
    manifest = read_manifest(path, ExportManifest)
    module = manifest.modules["vae_decoder"]
    model = onnx.load(path.parent / module.files[0].path)
    (pixels_,) = (value for value in model.graph.output if value.name == "pixels")
    model.graph.output.remove(pixels_)
    onnx.save(model, path.parent / module.files[0].path)
    older = module.model_copy(
        update={
            "outputs": tuple(o for o in module.outputs if o.name != "pixels"),
            "files": (describe_file(path.parent, path.parent / module.files[0].path),),
            "probe": None,
        }
    )
    modules = {**manifest.modules, "vae_decoder": older}
    path.write_text(manifest.model_copy(update={"modules": modules}).model_dump_json())
    rng = np.random.default_rng(6)
    latents = rng.standard_normal((4, 24, 32)).astype(np.float32)
    made = []
    for export in (folders.EXPORT, path.parent):
        memory = np.zeros((96, 128, 3), np.uint8) if out else None
        with FastFace.load(export) as fastface:
            made.append(fastface.stages.decode(latents, out=memory))
            assert memory is None or made[-1] is memory
            broken = np.full_like(latents, np.nan)
            with pytest.raises(EngineFailed, match="not finite"):
                fastface.stages.decode(broken, out=memory)
    np.testing.assert_array_equal(*made)
    assert made[0].dtype == np.uint8
    assert np.ptp(made[0]) > 100


def test_everything_that_should_change_a_picture_does(fastface):
    plain = pixels(fastface(PROMPT, FACE))[0]
    strong = AttentionManipulation(up=PartManipulation("scale_power", scale=6.0, power=0.5))
    for change in (
        {"ip_adapter_scale": 3.0},
        {"manipulation": strong},
        {"alpha": 3.0, "beta": 6.0},
        {"num_inference_steps": 2},
    ):
        assert np.abs(pixels(fastface(PROMPT, FACE, **change))[0] - plain).max() > 0, change
    assert np.abs(pixels(fastface("an entirely different prompt", FACE))[0] - plain).max() > 0


def test_lists_pair_up(fastface):
    result = fastface([PROMPT, "oil painting; person"], FACE, num_images_per_prompt=2)
    assert [(r.prompt == PROMPT, r.image_index) for r in result.requests] == [
        (True, 0),
        (True, 1),
        (False, 0),
        (False, 1),
    ]
    with pytest.raises(InvalidRequest, match="pair up"):
        fastface([PROMPT, PROMPT], [FACE] * 3)


def test_a_long_prompt_says_what_was_cut(fastface):
    result = fastface("x" * 224 + " and this is cut", FACE)
    assert "cut" in result.warnings[0]
    assert "this is cut" in result.warnings[0]


def test_faces(fastface):
    two = picture((80, 160), (230, 160))
    assert fastface.analyze(two).count == 2
    assert fastface.analyze(two, index=1).box[0] < fastface.analyze(two).box[0]
    with pytest.raises(FaceIndexOutOfRange):
        fastface(PROMPT, two, face_index=2)
    with pytest.raises(NoFaceFound):
        fastface(PROMPT, picture())


def test_channel_order_changes_the_tokens(fastface):
    colourful = FACE.copy()
    colourful[..., 0] = np.maximum(colourful[..., 0], 200)
    face = fastface.analyze(colourful)
    conditioner = fastface.stages._conditioner
    bgr, rgb = (conditioner.image_tokens(face, order) for order in ("bgr", "rgb"))
    assert np.abs(bgr - rgb).max() > 0


def test_branches_are_told_what_the_method_says(fastface):
    conditioner = fastface.stages._conditioner
    tokens = conditioner.image_tokens(fastface.analyze(FACE))
    no_face, text = conditioner.image_tokens(None), conditioner.text(PROMPT)
    fog = conditioner.text("fog")
    for negative, expected in (("", np.zeros_like(text.text)), ("fog", fog.text)):
        request = fastface.request(PROMPT, negative_prompt=negative)
        told = conditioner.conditions(request, tokens)
        for branch, words, face in (
            ("u", expected, no_face),
            ("t", text.text, no_face),
            ("i", expected, tokens),
            ("ti", text.text, tokens),
        ):
            np.testing.assert_array_equal(told[branch].text, words)
            np.testing.assert_array_equal(told[branch].image_tokens, face)
        np.testing.assert_array_equal(told["ti"].pooled, text.pooled)
        assert np.abs(told["u"].pooled).max() == (0 if not negative else np.abs(fog.pooled).max())
    assert np.abs(tokens - no_face).max() > 0


def test_cancelling(fastface):
    with pytest.raises(Cancelled):
        fastface(PROMPT, FACE, on_step=lambda trace: False)
    assert fastface(PROMPT, FACE).images  # and the next run is unharmed


@pytest.mark.parametrize(
    "change",
    [
        {"height": 30},
        {"steps": 5},
        {"num_inference_steps": 5},
        {"colour": "red"},
        {"num_images_per_prompt": 0},
    ],
)
def test_bad_requests(fastface, change):
    with pytest.raises(InvalidRequest):
        fastface(PROMPT, FACE, **change)


def test_unknown_preset_and_backend(fastface, tiny_export):
    with pytest.raises(UnknownName, match="am1"):
        fastface(PROMPT, FACE, preset="am11")
    with pytest.raises(UnknownName, match="onnxruntime"):
        FastFace.load(tiny_export[0], backend="onnxruntme")


def test_an_unfinished_or_damaged_export_is_refused(tiny_export, tmp_path):
    with pytest.raises(ExportIncomplete):
        FastFace.load(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(tiny_export[0], copy)
    (copy / "tokenizer" / "vocab.json").write_text("{}")
    with pytest.raises(ExportIncomplete, match=r"vocab\.json"):
        FastFace.load(copy)
    manifest = copy / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"steps"', '"stepz"'))
    with pytest.raises(ManifestError, match=r"stepz|steps"):
        FastFace.load(copy)


def test_a_swapped_onnx_file_is_refused(tiny_export, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_export[0], copy)
    shutil.copyfile(copy / "vae_decoder/model.onnx", copy / "unet/model.onnx")
    with (
        FastFace.load(copy, cache=tmp_path / "cache") as broken,
        pytest.raises(ExportIncomplete, match="unet"),
    ):
        broken.warm_up()


def test_another_checkpoints_schedule_on_an_export():
    from diffusers import EulerDiscreteScheduler

    from fastface_trt.checkpoints import find_checkpoint
    from fastface_trt.mini.folders import SAMPLE_FACES

    face, prompt = SAMPLE_FACES / "ada.png", "photo; person in space, smiling"
    traces = []
    with FastFace.load("mini", schedule_of="lightning") as fastface:
        assert fastface.manifest.checkpoint == "mini"
        made = fastface(prompt, face, seed=3, num_inference_steps=2, on_step=traces.append)
        with pytest.raises(InvalidRequest, match="does not do 3 steps"):
            fastface.request("x", steps=3)
    assert made.parameters[0]["scheduler"] == "EulerDiscreteScheduler"
    config = {k: v for k, v in find_checkpoint("lightning").scheduler.items() if k != "class"}
    euler = EulerDiscreteScheduler.from_config(config)
    euler.set_timesteps(2)
    noise = standard_noise(3, 0, 0, (4, 24, 24))
    latents = torch.from_numpy(noise) * euler.init_noise_sigma
    for t, trace in zip(euler.timesteps, traces, strict=True):
        scaled = euler.scale_model_input(latents, t)
        np.testing.assert_allclose(trace.model_input, scaled, atol=1e-5)
        latents = euler.step(torch.from_numpy(np.array(trace.guided)), t, latents).prev_sample
        np.testing.assert_allclose(trace.latents, latents, atol=1e-4)
    with pytest.raises(UnknownName, match="checkpoint 'lightening'"):
        FastFace.load("mini", schedule_of="lightening")


def test_another_sampler_leaves_what_the_network_predicts(tmp_path):
    """An export of a v-prediction base stays one under the sampler of another checkpoint."""
    import json

    from fastface_trt.checkpoints import find_checkpoint
    from fastface_trt.mini.folders import EXPORT
    from fastface_trt.runtime.export_folder import Export

    facts = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    manifest = json.loads((EXPORT / "manifest.json").read_text())
    manifest["scheduler"] |= facts
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    other = Export.open(tmp_path, schedule_of="lightning").manifest.scheduler
    assert other == find_checkpoint("lightning").scheduler | facts


def test_a_picture_of_one_value_is_an_overflow_and_no_picture():
    from fastface_trt.runtime.stages import _not_blank

    black = np.zeros((4, 6, 3), np.uint8)
    with pytest.raises(EngineFailed, match="every value of the picture is 0") as failed:
        _not_blank(black)
    assert "--vae" in failed.value.hint
    black[3, 5, 2] = 1
    assert _not_blank(black) is black
