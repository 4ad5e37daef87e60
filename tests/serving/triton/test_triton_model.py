"""model.py itself, loaded from an exported repository, with the mini model's engines."""

import json
import sys

import numpy as np
import pytest
from click.testing import CliRunner

from fastface_trt.errors import BackendUnavailable, EngineFailed, InvalidRequest, Unavailable
from fastface_trt.mini.folders import SAMPLE_FACES
from fastface_trt.runtime.images import load_picture
from fastface_trt.runtime.pipeline import FastFace
from fastface_trt.serving.settings import WorkerSettings
from fastface_trt.serving.triton import client
from fastface_trt.serving.triton.client import TritonClient
from fastface_trt.serving.triton.opening import VISIBLE, keep_to_gpu
from fastface_trt.serving.triton.repository import RepositoryOptions, write_repository
from tests.serving.triton.kserve_server import serve
from tests.serving.triton.triton_server import Instance, Refused, text

ADA = SAMPLE_FACES / "ada.png"
PROMPT = "photo; person in a garden, smiling"
MIX = (
    {"preset": "plain"},
    {"preset": "am1+dcg", "steps": 3},
    {"preset": "am2+dcg", "ip_adapter_scale": 0.5, "channel_order": "rgb"},
    {"preset": "dcg", "plan": "full"},
)


@pytest.fixture(scope="module")
def fastface(tmp_path_factory):
    with FastFace.load("mini", cache=tmp_path_factory.mktemp("engines")) as fastface:
        fastface.warm_up()
        yield fastface


@pytest.fixture(scope="module")
def repository(fastface, tmp_path_factory):
    out = tmp_path_factory.mktemp("triton") / "repository"
    worker = WorkerSettings(cache=fastface._modules._cache.root)
    write_repository(out, worker, RepositoryOptions(max_batch=4))
    return out


@pytest.fixture(scope="module")
def instance(repository):
    with Instance(repository) as instance:
        yield instance


def single(fastface, seed=7, *, preset="plain", steps=None, channel_order="bgr", **fields):
    """The picture of a run of its own."""
    request = fastface.request(PROMPT, preset=preset, steps=steps, seed=seed, **fields)
    result = fastface.generate([request], [ADA], channel_order=channel_order)
    return np.asarray(result.images[0]).astype(int), result.parameters[0]


def same(pixels, expected):
    """Within 1e-4 of the range before rounding: one apart at most, near the edge between two."""
    difference = np.abs(pixels.astype(int) - expected)
    assert difference.max() <= 1
    assert difference.mean() <= 2 * 1e-4 * 255


def test_batched_requests_with_settings_of_their_own_equal_single_runs(instance, fastface):
    face = load_picture(ADA)[None]
    batch = [
        {"PROMPT": text(PROMPT), "FACE": face, "SEED": np.array([[seed]], np.uint64)}
        | {"PARAMETERS": text(json.dumps(settings))}
        for seed, settings in enumerate(MIX)
    ]
    wrong = batch[0] | {"PARAMETERS": text('{"preset": "am9"}')}
    sent = instance.execute(*batch[:3], wrong) + instance.execute(batch[3])
    with pytest.raises(Refused, match="am9"):
        sent.pop(3).wait()
    for seed, (one, settings) in enumerate(zip(sent, MIX, strict=True)):
        outputs = one.wait()
        expected, parameters = single(fastface, seed, **settings)
        same(outputs["IMAGE"][0], expected)
        facts = json.loads(outputs["IMAGE_PARAMETERS"][0, 0])
        assert facts["parameters"] == json.loads(json.dumps(dict(parameters)))


def test_a_decoupled_model_shows_what_the_picture_becomes(fastface, tmp_path):
    worker = WorkerSettings(cache=fastface._modules._cache.root)
    write_repository(tmp_path / "out", worker, RepositoryOptions(decoupled=True))
    asked = {"PROMPT": text(PROMPT), "FACE": load_picture(ADA)[None]}
    with Instance(tmp_path / "out") as instance:
        (sent,) = instance.execute(asked | {"PARAMETERS": text('{"previews": true}')})
        picture = sent.wait()["IMAGE"][0]
        shown = [arrays["PREVIEW"][0] for arrays, _ in sent.responses[:-1]]
    assert [preview.shape for preview in shown] == [(24, 24, 3)] * 4
    small = picture.reshape(24, 4, 24, 4, 3).mean((1, 3))
    assert np.corrcoef(shown[-1].ravel(), small.ravel())[0, 1] > 0.8


def test_every_way_to_give_a_face_gives_the_same_picture(instance, fastface):
    expected, _ = single(fastface)
    face = fastface.analyze(ADA)
    ways = (
        {"FACE_FILE": text(ADA.read_bytes())},
        {"FACE": load_picture(ADA)[None]},
        {
            "FACE_EMBEDDING": (face.embedding * np.float32(face.embedding_norm))[None],
            "FACE_CROP_BGR": face.crop_bgr[None],
        },
    )
    base = {"PROMPT": text(PROMPT), "SEED": np.array([[7]], np.uint64)}
    for sent in instance.execute(*(base | way for way in ways)):
        same(sent.wait()["IMAGE"][0], expected)


def test_a_decoupled_model_answers_after_every_step(repository, fastface):
    config = repository / "fastface" / "config.pbtxt"
    coupled = config.read_text("utf-8")
    worker = WorkerSettings(cache=fastface._modules._cache.root)
    decoupled = repository.with_name("decoupled")
    write_repository(decoupled, worker, RepositoryOptions(decoupled=True))
    assert "decoupled" not in coupled
    with Instance(decoupled) as instance:
        (sent,) = instance.execute({"PROMPT": text(PROMPT), "FACE_FILE": text(ADA.read_bytes())})
        sent.wait()
    steps = [arrays["STEP"].tolist() for arrays, _ in sent.responses if "STEP" in arrays]
    assert steps == [[[step, 4]] for step in (1, 2, 3, 4)]


def test_the_client_gets_its_picture_over_the_wire(instance, fastface, tmp_path):
    expected, parameters = single(fastface, preset="am1+dcg")
    out = tmp_path / "out.png"
    with serve(instance) as url, TritonClient(url) as triton:
        assert triton.ready()
        assert not triton.ready("another")
        for face in (ADA, load_picture(ADA), fastface.analyze(ADA)):
            pixels, facts = triton.generate(PROMPT, face, seed=7, preset="am1+dcg")
            same(pixels, expected)
            assert facts["parameters"] == json.loads(json.dumps(dict(parameters)))
        with pytest.raises(InvalidRequest, match="am9"):
            triton.generate(PROMPT, ADA, preset="am9")
        arguments = ["--url", url, "--face", str(ADA), "--prompt", PROMPT, "--seed", "7"]
        ran = CliRunner().invoke(client.main, [*arguments, "--out", str(out)])
        assert ran.exit_code == 0, ran.output
    same(load_picture(out), expected)


def test_a_server_that_is_not_there_is_an_error_of_one_sentence(tmp_path):
    with TritonClient("http://127.0.0.1:9") as triton:
        assert not triton.ready()
        with pytest.raises(Unavailable):
            triton.generate(PROMPT, ADA)


def test_engines_that_are_missing_are_said_at_loading(repository, tmp_path):
    import shutil

    broken = tmp_path / "repository"
    shutil.copytree(repository, broken)
    for folder in (broken / "fastface" / "1" / "engines").iterdir():
        (folder / "engine.onnx").write_bytes(b"")
    with pytest.raises(Exception, match="There is no engine") as raised:
        Instance(broken)
    assert type(raised.value).__name__ == "TritonModelException"
    assert "triton_python_backend_utils" not in sys.modules


class OneGpu:
    """A driver that sees `count` GPUs."""

    def __init__(self, count):
        self.count = count

    def device(self, ordinal):
        if ordinal >= self.count:
            raise EngineFailed("CUDA_ERROR_INVALID_DEVICE")
        return ordinal


@pytest.mark.parametrize(
    ("seen", "chosen"), [("", "2"), ("4,5,7", "7"), ("GPU-a, GPU-b,GPU-c", "GPU-c")]
)
def test_an_instance_keeps_to_its_gpu(seen, chosen):
    environment = {VISIBLE: seen} if seen else {}
    keep_to_gpu(2, environment, lambda: OneGpu(1))
    assert environment[VISIBLE] == chosen


def test_an_instance_that_still_sees_other_gpus_does_not_start():
    with pytest.raises(BackendUnavailable, match="cannot keep to GPU 1"):
        keep_to_gpu(1, {}, lambda: OneGpu(2))
