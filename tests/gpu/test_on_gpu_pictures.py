"""The mini model's pictures on the GPU: as on the CPU, alone or in company, in any memory."""

import gc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from fastface_trt import FastFace
from fastface_trt.embedding.session import Session
from fastface_trt.measure.machine import gpu_bytes
from fastface_trt.mini.folders import SAMPLE_FACES
from fastface_trt.runtime.presets import PRESETS
from fastface_trt.verify.difference import compare
from fastface_trt.verify.self_test import PICTURE_TOLERANCE, SelfTest
from tests.conftest import GOLDEN

pytestmark = pytest.mark.gpu

PROMPT, SEED = "photo; person in a garden, smiling", 5
MEGABYTE = 2**20


def levels(result):
    """Pixels of all pictures as signed numbers, so that they can be subtracted."""
    return np.stack([np.asarray(image) for image in result.images]).astype(np.int16)


@pytest.mark.parametrize("preset", PRESETS)
def test_pictures_are_those_of_the_cpu(cpu, tested, face, record, preset):
    ours, theirs = (
        levels(one(PROMPT, face, preset=preset, seed=SEED)).astype(np.float32) / 255
        for one in (tested, cpu)
    )
    assert theirs.std() > 0.1, "a flat picture would prove nothing"
    error = compare(ours, theirs).relative_l2
    record(relative_l2=error)
    assert error <= PICTURE_TOLERANCE


def test_recorded_cases(backend, store, record):
    pytest.importorskip("torch", reason="Recorded cases are exported first, which needs torch.")
    test = SelfTest((backend,), store, recording=GOLDEN / "pipeline")
    (check,) = (one for one in test.run() if one.name == "recorded cases")
    record(**check.numbers)
    assert check.passed, check.detail


def test_a_batch_is_what_each_would_be_alone(tested, face, record):
    requests = [
        tested.request(PROMPT, preset=preset, seed=seed)
        for seed, preset in enumerate(("plain", "am1+dcg", "am2+dcg", "dcg"))
    ]
    together = levels(tested.generate(requests, [face] * len(requests)))
    alone = np.concatenate([levels(tested.generate([one], [face])) for one in requests])
    record(grey_levels=int(np.abs(together - alone).max()))
    assert np.abs(together - alone).max() <= 1
    assert np.abs(alone[0] - alone[1]).max() > 10, "requests that make one picture prove nothing"


def test_four_threads_make_what_one_makes(tested, face, record):
    requests = [
        tested.request(PROMPT, preset=preset, seed=seed)
        for seed in range(4)
        for preset in ("am1+dcg", "am2", "plain")
    ]
    alone = [levels(tested.generate([one], [face])) for one in requests]
    with ThreadPoolExecutor(4) as pool:
        threaded = list(pool.map(lambda one: levels(tested.generate([one], [face])), requests))
    worst = max(int(np.abs(a - b).max()) for a, b in zip(alone, threaded, strict=True))
    record(grey_levels=worst)
    assert worst <= 1


def test_a_picture_into_a_tensor_of_torch_on_a_stream_of_torch(backend, tested, face):
    torch = pytest.importorskip("torch")
    session = Session(tested)
    request = tested.request(PROMPT, preset="am1+dcg", seed=3)
    expected = session.generate(request, face).pixels
    if backend == "onnxruntime":
        out = torch.zeros(expected.shape, dtype=torch.uint8)
        session.generate(request, face, out=out)
    else:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            out = torch.zeros(expected.shape, dtype=torch.uint8, device="cuda")
            session.generate(request, face, out=out, stream=stream)
            out = out.clone()  # by torch, on its stream, which waits for the picture
        stream.synchronize()
    np.testing.assert_array_equal(out.cpu().numpy(), expected)


@pytest.mark.parametrize("library", ["torch", "cupy"])
def test_latents_by_dlpack(backend, tested, face, library):
    other = pytest.importorskip(library)
    if library == "cupy" and backend == "onnxruntime":
        pytest.skip("CuPy takes tensors of a GPU only.")
    session = Session(tested)
    latents = session.generate(tested.request(PROMPT, seed=3), face, decode=False).latents
    taken = other.from_dlpack(latents)
    session.device.synchronize()
    values = taken.cpu().numpy() if library == "torch" else other.asnumpy(taken)
    np.testing.assert_array_equal(values, session.device.download(latents))
    assert values.std() > 0.1


def test_loads_and_unloads_keep_no_memory(backend, store, record):
    """20 on a GPU; on a CPU only that each loads and works."""
    held, pictures = [], []
    for _ in range(2 if backend == "onnxruntime" else 20):
        with FastFace.load("mini", backend=backend, cache=store.root, build=False) as loaded:
            face = loaded.analyze(SAMPLE_FACES / "ada.png")
            pictures.append(levels(loaded(PROMPT, face, preset="am1+dcg", seed=SEED)))
        gc.collect()
        held.append(gpu_bytes())
    assert all(np.abs(one - pictures[0]).max() <= 1 for one in pictures)
    if None in held:
        record(held_megabytes=None)  # no NVML, or a driver that does not tell
        return
    record(held_megabytes=[round(one / MEGABYTE) for one in held])
    assert held[-1] <= held[4] + 64 * MEGABYTE
