"""Face and scene judges against the networks called directly, and ImageReward's interface."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
from insightface.app import FaceAnalysis

from fastface_trt.errors import (
    InvalidRequest,
    LicenceNotAcknowledged,
    MissingDependency,
    UnknownName,
    WeightsError,
)
from fastface_trt.evaluation.data import Dataset, Pair
from fastface_trt.evaluation.judges import (
    FaceView,
    IdentityJudge,
    JudgeWeights,
    NoFaceJudge,
    OtherPeopleJudge,
    RewardJudge,
    Sample,
    choose_judges,
    real_judges,
)
from fastface_trt.evaluation.mini import mini_dataset, mini_judges
from fastface_trt.mini.folders import FACE_MODEL, JUDGES
from fastface_trt.runtime.face import FaceAnalyzer


@pytest.fixture(scope="module")
def data():
    return mini_dataset(3)


@pytest.fixture(scope="module")
def samples(data):
    """Person 1's photo taken for person 0's picture, and a picture without a face."""
    blank = np.full((96, 96, 3), 90, np.uint8)
    return [Sample(data.people["person-01"], data.pairs[0]), Sample(blank, data.pairs[1])]


def test_identity_is_the_cosine_of_insightface_embeddings(data, samples):
    view = FaceView(FaceAnalyzer(FACE_MODEL))
    judges = [IdentityJudge(view), OtherPeopleJudge(view), NoFaceJudge(view)]
    for judge in judges:
        judge.load(data)
    app = FaceAnalysis(str(FACE_MODEL), providers=["CPUExecutionProvider"])
    app.prepare(ctx_id=0, det_size=(640, 640))
    vectors = []
    for photo in data.people.values():
        face = app.get(np.ascontiguousarray(photo[..., ::-1]))[0]
        vectors.append(face.embedding.astype(np.float64))
        vectors[-1] /= np.linalg.norm(vectors[-1])
    same, other, none = (judge.judge(samples) for judge in judges)
    assert same == [pytest.approx(vectors[1] @ vectors[0], abs=1e-5), None]
    expected = (1 + vectors[1] @ vectors[2]) / 2
    assert other == [pytest.approx(expected, abs=1e-5), None]
    assert none == [0.0, 1.0]


def test_scene_judges_read_the_classifier(data, samples):
    judges = mini_judges()
    for judge in judges.values():
        judge.load(data)
    session = onnxruntime.InferenceSession(str(JUDGES / "scene.onnx"))
    labels = json.loads((JUDGES / "labels.json").read_text())
    picture = samples[0].picture.astype(np.float32)
    logits = session.run(None, {"input.1": (picture / 127.5 - 1).transpose(2, 0, 1)[None]})
    scene = data.pairs[0].scene
    expected, hits = 1.0, {}
    for kind, row in zip(("style", "place"), logits[:2], strict=True):
        powers = np.exp(row[0].astype(np.float64))
        wanted = labels[kind].index(getattr(scene, kind))
        expected *= powers[wanted] / powers.sum()
        hits[kind] = float(row[0].argmax() == wanted)
    assert judges["clip"].judge(samples[:1]) == [pytest.approx(expected, rel=1e-4, abs=1e-9)]
    assert judges["style"].judge(samples[:1]) == [hits["style"]]
    assert judges["place"].judge(samples[:1]) == [hits["place"]]


def test_scene_judges_refuse_prompts_that_they_do_not_know():
    free = Dataset("mine", {}, [Pair(0, "x", "person riding a horse", 0)], {})
    with pytest.raises(InvalidRequest, match="only the mini model's prompts"):
        mini_judges()["style"].load(free)


def test_a_network_runs_once_per_picture(data):
    seen = []
    sample = Sample(data.people["person-00"], data.pairs[0])
    assert [sample.once("key", lambda s: seen.append(s) or len(seen)) for _ in range(3)] == [1] * 3
    assert sample.once("other", lambda s: "x") == "x"


def test_judges_are_chosen_by_name_and_nothing_else_is_opened(monkeypatch):
    monkeypatch.delenv("FASTFACE_ACCEPT_LICENCES", raising=False)
    assert list(choose_judges({"a": 1, "b": 2, "c": 3}, ["c", "a"])) == [1, 3]
    with pytest.raises(UnknownName, match="judge 'idd'"):
        real_judges(JudgeWeights(), ["idd"], licence_acknowledged=False)
    with pytest.raises(LicenceNotAcknowledged):
        real_judges(JudgeWeights(), ["id"], licence_acknowledged=False)
    (only,) = real_judges(JudgeWeights(), ["clip"], licence_acknowledged=False)
    assert only.column.name == "clip"
    everything = real_judges(JudgeWeights(str(FACE_MODEL)), None, licence_acknowledged=False)
    assert [j.column.name for j in everything] == [
        "id",
        "id_other",
        "clip",
        "ae",
        "ir",
        "fcs",
        "ffc",
    ]


def test_image_reward_is_given_prompt_and_picture(samples, data, monkeypatch):
    loaded = []

    def load(name):
        loaded.append(name)
        return SimpleNamespace(score=lambda prompt, image: len(prompt) + np.asarray(image).mean())

    monkeypatch.setitem(sys.modules, "ImageReward", SimpleNamespace(load=load))
    judge = RewardJudge()
    judge.load(data)
    judge.load(data)
    assert loaded == ["ImageReward-v1.0"]
    expected = [len(s.pair.prompt) + s.picture.mean() for s in samples]
    assert judge.judge(samples) == pytest.approx(expected)


def test_absent_image_reward_is_one_sentence(data, monkeypatch):
    monkeypatch.setitem(sys.modules, "ImageReward", None)
    with pytest.raises(MissingDependency, match=r"image-reward.*pip install"):
        RewardJudge().load(data)

    def load(name):
        raise OSError("no route to host")

    monkeypatch.setitem(sys.modules, "ImageReward", SimpleNamespace(load=load))
    with pytest.raises(WeightsError, match=r"could not be loaded: no route to host"):
        RewardJudge().load(data)
