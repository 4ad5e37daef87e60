"""`FastFace` called from Python: lists, diffusers' arguments, mistakes, and saving."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastface_trt import FastFace
from fastface_trt.errors import Cancelled, FastFaceError, InvalidRequest, Unavailable
from fastface_trt.mini.folders import SAMPLE_FACES
from fastface_trt.runtime.picture_file import read_parameters

PROMPT, FACE = "photo; person in a garden", SAMPLE_FACES / "ada.png"
OTHER = SAMPLE_FACES / "bruno.png"


@pytest.fixture(scope="module")
def fastface():
    with FastFace.load() as loaded:
        yield loaded


@pytest.fixture
def asked(fastface, monkeypatch):
    """Calls `fastface`; returns (prompt, face, seed, index, negative prompt) of each picture."""
    given = []

    def generate(self, requests, faces, **options):
        given.extend(zip(requests, faces, strict=True))
        raise Cancelled("Nothing is run.")

    monkeypatch.setattr(FastFace, "generate", generate)

    def call(*arguments, **options):
        given.clear()
        with pytest.raises(Cancelled):
            fastface(*arguments, **options)
        return [(r.prompt, f, r.seed, r.image_index, r.negative_prompt) for r, f in given]

    return call


def pixels(images):
    return np.stack([np.asarray(image) for image in images])


@pytest.mark.parametrize("seeds", [[3, 4], (3, 4), range(3, 5), np.array([3, 4])])
def test_a_list_of_seeds_has_one_per_picture(asked, seeds):
    assert asked(PROMPT, FACE, seed=seeds) == [(PROMPT, FACE, s, 0, "") for s in (3, 4)]
    assert asked(["a", "b"], FACE, seed=seeds) == [("a", FACE, 3, 0, ""), ("b", FACE, 4, 0, "")]
    assert asked("a", FACE, seed=seeds, num_images_per_prompt=2) == [
        ("a", FACE, 3, 0, ""),
        ("a", FACE, 4, 0, ""),
    ]


def test_negative_prompts_pair_up_with_prompts_and_faces(asked):
    assert asked("a", [FACE, OTHER], negative_prompt=["x", "y"], seed=9) == [
        ("a", FACE, 9, 0, "x"),
        ("a", OTHER, 9, 0, "y"),
    ]
    assert asked("a", FACE, negative_prompt=["x", "y"], num_images_per_prompt=2) == [
        ("a", FACE, 0, index, negative) for negative in "xy" for index in (0, 1)
    ]
    assert asked("a", FACE, negative_prompt=None) == [("a", FACE, 0, 0, "")]


@pytest.mark.parametrize(
    ("generator", "seeds"),
    [
        (7, [7]),
        (np.int64(7), [7]),
        (None, [0]),
        (torch.Generator().manual_seed(7), [7]),
        (torch.Generator().manual_seed(-1), [2**64 - 1]),
        ([torch.Generator().manual_seed(s) for s in (7, 8)], [7, 8]),
    ],
)
def test_a_generator_is_its_seed(asked, generator, seeds):
    assert [seed for _, _, seed, *_ in asked(PROMPT, FACE, generator=generator)] == seeds


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"prompt": 3}, "prompt is not text"),
        ({"prompt": None}, "no prompt"),
        ({"prompt": ["a", 3]}, "prompt is not text"),
        ({"prompt": []}, "do not pair up"),
        ({"face": None}, "no face"),
        ({"face": []}, "do not pair up"),
        ({"face": 5}, r"cannot be read from 5 \(int\)"),
        ({"face": [FACE, None], "seed": [1, 2]}, r"None \(NoneType\)"),
        ({"guidence": 2}, "'guidence'. Did you mean 'guidance_rescale'"),
        ({"num_image_per_prompt": 2}, "Did you mean 'num_images_per_prompt'"),
        ({"outputtype": "np"}, "Did you mean 'output_type'"),
        ({"guidance_scale": 5}, "alpha and beta"),
        ({"face": None, "ip_adapter_image": FACE}, "as face"),
        ({"callback_on_step_end_tensor_inputs": ["latents"]}, "is given the latents"),
        ({"num_images_per_prompt": "2"}, "num_images_per_prompt is '2'"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
        ({"num_images_per_prompt": True}, "num_images_per_prompt is True"),
        ({"seed": "x"}, "seed is 'x'"),
        ({"seed": None}, "seed is None"),
        ({"seed": [1, None]}, "seed is None"),
        ({"seed": [1, 2, 3], "num_images_per_prompt": 2}, "not one for each of 2 pictures"),
        ({"seed": [1, 2, 3], "prompt": ["a", "b"]}, "do not pair up"),
        ({"negative_prompt": 3}, "negative_prompt is not text"),
        ({"generator": "x"}, "generator is 'x'"),
        ({"generator": 1, "seed": 1}, "one field"),
        ({"image_index": None}, "image_index is None"),
        ({"steps": "four"}, "four"),
        ({"preset": None}, "Unknown preset"),
        ({"preset": 3}, "Unknown preset"),
        ({"output_type": "pt"}, "Unknown output type 'pt'"),
        ({"output_type": ["np"]}, "Unknown output type"),
        ({"face_index": "1"}, "face_index is '1'"),
        ({"max_rows": 0}, "max_rows is 0"),
        ({"channel_order": "rbg"}, "Did you mean 'rgb'"),
        ({"on_step": 3}, "on_step is 3"),
        ({"callback_on_step_end": 3}, "callback_on_step_end is 3"),
        ({"on_step": print, "callback_on_step_end": print}, "both given"),
    ],
)
def test_mistakes_are_one_sentence(fastface, given, says):
    with pytest.raises(FastFaceError, match=says) as caught:
        fastface(**({"prompt": PROMPT, "face": FACE} | given))
    assert len(str(caught.value)) < 500


def test_requests_and_faces_have_to_pair_up(fastface):
    with pytest.raises(InvalidRequest, match="2 requests and 1 faces"):
        fastface.generate([fastface.request(PROMPT)] * 2, [FACE])


def test_a_call_without_anything_is_a_sentence_too(fastface):
    with pytest.raises(InvalidRequest, match="no face"):
        fastface(PROMPT)
    with pytest.raises(InvalidRequest, match="Did you mean 'prompt'"):
        fastface(face=FACE, promt=PROMPT)


def test_output_types_are_those_of_diffusers(fastface):
    from diffusers.image_processor import VaeImageProcessor

    given = {"seed": [1, 2], "steps": 2}
    pil = pixels(fastface(PROMPT, FACE, **given).images)
    numbers = fastface(PROMPT, FACE, output_type="np", **given).images
    assert (numbers.dtype, numbers.shape) == (np.float32, (2, 96, 96, 3))
    np.testing.assert_array_equal(pixels(VaeImageProcessor.numpy_to_pil(numbers)), pil)
    result = fastface(PROMPT, FACE, output_type="latent", **given)
    assert (result.images.dtype, result.images.shape) == (np.float32, (2, 4, 24, 24))
    np.testing.assert_array_equal([fastface.stages.decode(one) for one in result.images], pil)
    with pytest.raises(InvalidRequest, match="Latents are no pictures"):
        result.save("never")
    sizes = [fastface.request(PROMPT, size=size) for size in ("96x96", "128x96")]
    with pytest.raises(InvalidRequest, match="several sizes"):
        fastface.generate(sizes, [FACE] * 2, output_type="np")


def test_a_callback_is_called_once_per_step_of_all_pictures(fastface):
    from diffusers import DDIMScheduler

    told, traces = [], []
    given = {"seed": [1, 2], "steps": 4, "preset": "am1+dcg", "max_rows": 4}
    fastface(PROMPT, FACE, callback_on_step_end=lambda *one: told.append(one), **given)
    fastface(PROMPT, FACE, on_step=traces.append, **given)
    assert {pipe for pipe, *_ in told} == {fastface}
    assert [step for _, step, *_ in told] == [0, 1, 2, 3]
    config = {k: v for k, v in fastface.manifest.scheduler.items() if k != "class"}
    scheduler = DDIMScheduler.from_config(config)
    scheduler.set_timesteps(4)
    assert [timestep for _, _, timestep, _ in told] == scheduler.timesteps.tolist()
    for _, step, _, arguments in told:
        expected = {t.index: t.latents for t in traces if t.step == step}
        np.testing.assert_array_equal(arguments["latents"], [expected[0], expected[1]])
        with pytest.raises(ValueError, match="read-only"):
            arguments["latents"] *= 2


def test_a_callback_cancels_and_changes_nothing(fastface):
    steps = []

    def stop(pipe, step, timestep, arguments):
        steps.append(step)
        return step < 1

    with pytest.raises(Cancelled):
        fastface(PROMPT, FACE, callback_on_step_end=stop)
    assert steps == [0, 1]
    back = fastface(PROMPT, FACE, steps=2, callback_on_step_end=lambda *told: told[-1])
    np.testing.assert_array_equal(
        pixels(back.images), pixels(fastface(PROMPT, FACE, steps=2).images)
    )
    with pytest.raises(InvalidRequest, match="cannot be changed"):
        fastface(
            PROMPT, FACE, callback_on_step_end=lambda *told: {"latents": told[-1]["latents"] * 2}
        )


@pytest.mark.parametrize("output_type", ["pil", "np"])
def test_a_saved_picture_has_its_parameters_and_mark(fastface, tmp_path, output_type):
    shown = pixels(fastface(PROMPT, FACE, steps=2, seed=4).images)
    result = fastface(PROMPT, FACE, steps=2, seed=4, output_type=output_type)
    for file in (tmp_path / "new" / "a.png", tmp_path / "new" / "a.png"):  # a file is replaced
        assert result.save(file) == [file]
    assert read_parameters(file) == result.parameters[0]
    with Image.open(file) as image:
        assert "trainedAlgorithmicMedia" in image.info["XML:com.adobe.xmp"]
        np.testing.assert_array_equal(pixels([image]), shown)
    (other,) = result.save(tmp_path, name="{face}-{seed}", format="jpeg", ai_generated=False)
    assert other == tmp_path / "ada-4.jpg"
    assert b"trainedAlgorithmicMedia" not in other.read_bytes()
    for wrong in ({"name": "{x}"}, {"name": 3}, {"format": "gif"}, {"quality": 50}):
        with pytest.raises(FastFaceError):
            result.save(tmp_path / "none", **wrong)


def test_names_of_requests_say_their_preset_and_the_name_of_the_face(fastface):
    base = fastface.request(PROMPT, steps=2)
    requests = [base, base.with_preset("am2+dcg"), base.with_preset("am1", alpha=3)]
    names = fastface.generate(requests, [FACE, FACE.read_bytes(), fastface.analyze(FACE)]).names
    assert [name["preset"] for name in names] == ["plain", "am2+dcg", "custom"]
    assert [name["face"] for name in names] == ["ada", "face", "face"]
    assert len({name["hash"] for name in names}) == 3


def test_a_closed_one_makes_nothing():
    with FastFace.load() as fastface:
        face = fastface.analyze(FACE)
        request = fastface.request(PROMPT)
    for use in (
        lambda: fastface(PROMPT, FACE),
        lambda: fastface.generate([request], [face]),
        lambda: fastface.analyze(FACE),
        fastface.warm_up,
    ):
        with pytest.raises(Unavailable, match="was closed"):
            use()
    fastface.close()


def test_what_is_shown_of_a_face_is_not_who_it_is(fastface):
    shown = repr(fastface.analyze(FACE))
    assert "array" not in shown
    assert "index=0, count=1" in shown
    assert len(shown) < 300
