"""Sessions on the host: the caller's memory in and out, threads, and what is refused at once."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from fastface_trt import FastFace
from fastface_trt.embedding.session import Session
from fastface_trt.errors import Cancelled, InvalidRequest
from fastface_trt.mini import folders
from fastface_trt.runtime.face import Face
from fastface_trt.runtime.sampling import INITIAL_LATENTS, standard_noise

PROMPT = "photo; person in a garden"
BYTES = 96 * 96 * 3


@pytest.fixture(scope="module")
def fastface():
    with FastFace.load() as loaded:
        yield loaded


@pytest.fixture(scope="module")
def session(fastface):
    return Session(fastface)


@pytest.fixture(scope="module")
def face(fastface):
    return fastface.analyze(folders.SAMPLE_FACES / "ada.png")


@pytest.fixture(scope="module")
def request_(fastface):
    return fastface.request(PROMPT, preset="am1+dcg", seed=3)


@pytest.fixture(scope="module")
def expected(fastface, face, request_):
    """The picture by `FastFace.generate`."""
    return np.asarray(fastface.generate([request_], [face]).images[0])


def test_the_picture_lies_in_the_callers_buffer(session, face, request_, expected):
    out = bytearray(BYTES)
    output = session.generate(request_, face, out=out)
    np.testing.assert_array_equal(np.frombuffer(out, np.uint8).reshape(96, 96, 3), expected)
    assert output.pixels.ctypes.data == np.frombuffer(out, np.uint8).ctypes.data
    assert output.parameters["seed"] == 3


def test_a_face_that_was_one_of_several_is_told(session, face, request_):
    largest = replace(face, count=2, by_index=False)
    (warning,) = session.generate(request_, largest, decode=False).warnings
    assert "has 2 faces; the largest is used" in warning
    assert session.generate(request_, session.tokens(largest), decode=False).warnings == ()


def test_without_a_buffer_the_picture_is_the_callers_own(session, face, request_, expected):
    first = session.generate(request_, face)
    first.pixels[:] = 0
    np.testing.assert_array_equal(session.generate(request_, face).pixels, expected)


def test_tokens_are_a_copy_and_serve_as_a_face(session, face, request_, expected):
    tokens = session.tokens(face)
    assert tokens.shape == session.token_shape
    as_list = [tokens.copy(), memoryview(tokens.copy())]
    tokens[:] = 0  # not what is kept for the face
    for given in (face, *as_list):
        np.testing.assert_array_equal(session.generate(request_, given).pixels, expected)


def test_a_face_from_the_callers_own_analysis(session, face, request_, expected):
    again = session.face(face.embedding * np.float32(8), face.crop_bgr)
    assert isinstance(again, Face)
    assert again.embedding_norm == pytest.approx(8, rel=1e-5)
    np.testing.assert_array_equal(session.generate(request_, again).pixels, expected)


def test_latents_in_and_out(session, face, request_, expected):
    shape = session.latent_shape(request_)
    noise = standard_noise(3, 0, INITIAL_LATENTS, shape)
    other = fresh = session.generate(request_, face, latents=noise + 1, decode=False)
    assert fresh.pixels is None
    given = session.generate(request_, face, latents=noise, decode=False)
    assert given.latents.shape == shape
    assert not np.array_equal(given.latents, other.latents)
    out = np.zeros(BYTES, np.uint8)
    session.decode(given.latents, out=out)
    np.testing.assert_array_equal(out.reshape(96, 96, 3), expected)


def test_steps_are_told_and_cancelled(session, face, request_):
    told = []
    session.generate(request_, face, on_progress=lambda *step: told.append(step))
    assert told == [(step, 4) for step in (1, 2, 3, 4)]
    out = bytearray(BYTES)
    with pytest.raises(Cancelled, match="after step 2"):
        session.generate(request_, face, out=out, on_progress=lambda step, steps: step < 2)
    assert out == bytes(BYTES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out": bytearray(BYTES - 1)}, "Pass exactly 27648 bytes"),
        ({"out": bytes(BYTES)}, "read-only"),
        ({"out": bytearray(BYTES), "decode": False}, "no picture asked for"),
        ({"latents": np.zeros((4, 24, 23), np.float32)}, "The initial latents"),
        ({"tokens": np.zeros((3, 96), np.float32)}, "The image tokens"),
        ({"tokens": np.zeros((4, 96), np.int64)}, "is int64"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(session, face, request_, change, message):
    told = []
    given = {"tokens": face, "on_progress": lambda *step: told.append(step), **change}
    with pytest.raises(InvalidRequest, match=message):
        session.generate(request_, **given)
    assert told == []


def test_faces_that_do_not_fit_are_refused(session, face):
    for embedding, crop, message in (
        (face.embedding, None, "needs crop_bgr"),
        (face.embedding * 0, face.crop_bgr, "all zero"),
        (face.embedding[:7], face.crop_bgr, "The face embedding has shape"),
        (face.embedding, face.crop_bgr[:100], "The aligned face has shape"),
        (face.embedding, face.crop_bgr.astype(np.float32), "is float32, not uint8"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            session.face(embedding, crop)
    with pytest.raises(InvalidRequest, match=r"not \[4, h, w\]"):
        session.decode(np.zeros((3, 24, 24), np.float32))


def test_threads_make_what_single_runs_make(session, fastface, face):
    others = fastface.analyze(folders.SAMPLE_FACES / "bruno.png")
    requests = [
        fastface.request(PROMPT, preset=preset, seed=seed)
        for seed, preset in enumerate(["plain", "dcg", "am1", "am2+dcg", "plain", "am1+dcg"])
    ]
    faces = [face, others] * 3
    single = [session.generate(r, f).pixels for r, f in zip(requests, faces, strict=True)]
    buffers = [bytearray(BYTES) for _ in requests]
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda n: session.generate(requests[n], faces[n], out=buffers[n]), range(6)))
    for buffer, alone in zip(buffers, single, strict=True):
        np.testing.assert_array_equal(np.frombuffer(buffer, np.uint8), alone.reshape(-1))
