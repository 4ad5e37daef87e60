"""The preview of latents, against what the mini model's VAE makes of the same latents."""

import numpy as np
import pytest

from fastface_trt import FastFace
from fastface_trt.mini.folders import SAMPLE_FACES
from fastface_trt.runtime.preview import LatentPreview, smooth_latents

PICTURES = (
    ("ada", "photo; person in a garden, smiling"),
    ("bruno", "oil painting; person on a beach, smiling"),
    ("chika", "photo; person in space, laughing"),
)
# A blurred picture in about the right colours. The best linear map there is, fitted to such
# pictures themselves, reaches 0.9 (what a latent pixel says beyond a colour is lost to any of
# them); a preview with red and blue exchanged, which a user would call wrong, stays below 0.5.
LIKE = 0.8


@pytest.fixture(scope="module")
def fastface():
    with FastFace.load("mini") as loaded:
        yield loaded


@pytest.fixture(scope="module")
def preview(fastface):
    return LatentPreview.fit(fastface.stages, fastface.manifest)


@pytest.fixture(scope="module")
def finished(fastface):
    """Final latents [C,h,w] of real requests, each with its decoded picture."""
    stages, found = fastface.stages, []
    for seed, (name, prompt) in enumerate(PICTURES):
        face = fastface.analyze(SAMPLE_FACES / f"{name}.png")
        request = fastface.request(prompt, preset="am1+dcg", seed=seed)
        request = request.for_adapter(fastface.manifest.adapter_kind)
        sample = stages.sample(request, stages.image_tokens(face))
        while not sample.finished:
            stages.step([sample])
        found.append(
            (np.array(stages.device.download(sample.latents)), stages.decode(sample.latents))
        )
    return found


def small(picture, factor):
    """The picture scaled down by a whole factor, each pixel the mean of a block."""
    return np.stack(
        [
            picture[row : row + factor, column : column + factor].mean((0, 1))
            for row in range(0, picture.shape[0], factor)
            for column in range(0, picture.shape[1], factor)
        ]
    )


def likeness(one, other):
    return np.corrcoef(one.reshape(-1).astype(float), other.reshape(-1).astype(float))[0, 1]


def test_final_latents_look_like_their_picture(fastface, preview, finished):
    factor = fastface.manifest.vae_scale_factor
    pairs = [(preview.rgb(latents), small(picture, factor)) for latents, picture in finished]
    for rgb, picture in pairs:
        assert rgb.dtype == np.uint8
        assert likeness(rgb, picture) > LIKE
        assert abs(rgb.mean() - picture.mean()) < 32  # an eighth of the range
    exchanged = [likeness(rgb[..., ::-1], picture) for rgb, picture in pairs]
    assert np.mean(exchanged) < LIKE  # or the bound would say nothing about colours


def test_any_size_gives_one_pixel_per_latent_pixel(preview):
    latents = smooth_latents((4, 6, 10), 0)
    rgb = preview.rgb(latents)
    assert rgb.shape == (6, 10, 3)
    # A map without neighbours: a part of the latents is that part of the preview.
    assert np.array_equal(preview.rgb(latents[:, 2:5, 1:4])[0, 0], rgb[2, 1])


def test_broken_and_noisy_latents_are_shown_too(preview):
    latents = 20 * smooth_latents((4, 12, 12), 1)
    noisy = preview.rgb(latents)
    assert np.isin(noisy, (0, 255)).mean() < 0.5
    latents[:, 0, 0] = np.nan, np.inf, -np.inf, 0
    assert preview.rgb(latents).shape == (12, 12, 3)


def test_examples_have_the_spread_of_final_latents():
    latents = smooth_latents((4, 24, 16), 0)
    assert np.allclose(latents.mean((1, 2)), 0, atol=1e-5)
    assert np.allclose(latents.std((1, 2)), 1, atol=1e-4)
    neighbours = [np.corrcoef(c[1:].ravel(), c[:-1].ravel())[0, 1] for c in latents]
    assert min(neighbours) > 0.5
    assert not np.array_equal(latents, smooth_latents((4, 24, 16), 1))
