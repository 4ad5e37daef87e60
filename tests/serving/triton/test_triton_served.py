"""Triton's requests against a worker whose every event the test decides."""

import json
import threading
from contextlib import contextmanager

import numpy as np
import pytest

from fastface_trt.engines.manifest import EXPORT_MANIFEST, ExportManifest, read_manifest
from fastface_trt.errors import Busy, DeadlinePassed, EngineFailed, NoFaceFound, Unavailable
from fastface_trt.mini.folders import EXPORT, SAMPLE_FACES
from fastface_trt.serving.settings import WorkerSettings
from fastface_trt.serving.triton.opening import complete_config
from fastface_trt.serving.triton.repository import RepositoryOptions, model_config
from fastface_trt.serving.triton.served import ServedModel
from fastface_trt.serving.work import State
from tests.serving.triton import triton_double
from tests.serving.triton.triton_server import Instance, Refused, text
from tests.serving.triton.triton_worker import ScriptedWorker

FILE = (SAMPLE_FACES / "ada.png").read_bytes()
ANALYSED = {
    "FACE_EMBEDDING": np.eye(1, 512, dtype=np.float32),
    "FACE_CROP_BGR": np.zeros((1, 224, 224, 3), np.uint8),
}
ONE = {"PROMPT": text("a person"), "FACE_FILE": text(FILE)}
TWO = {"PROMPT": text("a person", "a person"), "FACE_FILE": text(FILE, FILE)}


class Model:
    """What `model.py` is, around a worker of the test."""

    def __init__(self, worker, capacity):
        self.worker, self.capacity = worker, capacity

    auto_complete_config = staticmethod(complete_config)

    def initialize(self, args):
        pb_utils = triton_double.make_module()
        self.log = pb_utils.Logger.lines
        config = json.loads(args["model_config"])
        self.served = ServedModel(
            self.worker,
            read_manifest(EXPORT / EXPORT_MANIFEST, ExportManifest),
            pb_utils,
            capacity=self.capacity,
            decoupled=pb_utils.using_decoupled_model_transaction_policy(config),
            drain_seconds=5,
        )
        self.execute, self.finalize = self.served.execute, self.served.close


@contextmanager
def serving(tmp_path, *, decoupled=False, capacity=16):
    folder = tmp_path / "fastface"
    folder.mkdir()
    options = RepositoryOptions(decoupled=decoupled)
    unet = type("Engine", (), {"options": {}})
    config = model_config(WorkerSettings(), options, unet)
    (folder / "config.pbtxt").write_text(config.to_text(), "utf-8")
    worker = ScriptedWorker()
    with Instance(tmp_path, model=Model(worker, capacity)) as instance:
        yield instance, worker


def test_pictures_go_back_as_they_are_ready(tmp_path):
    with serving(tmp_path) as (instance, worker):
        (first,) = instance.execute(ONE)
        (second,) = instance.execute(ONE)
        one, two = worker.submitted(2)
        worker.finish(two.id, 2)
        assert second.wait()["IMAGE"].shape == (1, 96, 96, 3)
        assert not first.ended.is_set()
        worker.finish(one.id, 1)
        assert first.wait()["IMAGE"].max() == 1
        facts = json.loads(first.wait()["IMAGE_PARAMETERS"][0, 0])
        assert facts["parameters"] == json.loads(json.dumps(one.request.to_dict()))
        assert facts["warnings"] == ["w"]
        assert facts["seconds"] == {"queue": 1.0}


def test_only_the_outputs_that_are_asked_for_go_back(tmp_path):
    with serving(tmp_path) as (instance, worker):
        (sent,) = instance.execute(ONE, outputs=("IMAGE",))
        worker.finish(worker.submitted(1)[0].id)
        assert list(sent.wait()) == ["IMAGE"]


def test_several_pictures_of_a_request_go_back_together_in_order(tmp_path):
    with serving(tmp_path) as (instance, worker):
        (sent,) = instance.execute(TWO)
        one, two = worker.submitted(2)
        worker.finish(two.id, 2)
        worker.finish(one.id, 1)
        image = sent.wait()["IMAGE"]
        assert image.shape == (2, 96, 96, 3)
        assert [image[0].max(), image[1].max()] == [1, 2]


def test_a_wrong_request_leaves_the_others_of_its_batch_alone(tmp_path):
    wrong = ONE | {"PARAMETERS": text('{"steps": 7}')}
    with serving(tmp_path) as (instance, worker):
        good, bad, other = instance.execute(ONE, wrong, ONE)
        with pytest.raises(Refused, match="7 steps") as refused:
            bad.wait()
        assert refused.value.code == "INVALID_ARG"
        for task in worker.submitted(2):
            worker.finish(task.id)
        assert good.wait()
        assert other.wait()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DeadlinePassed("Too late."), "UNAVAILABLE"),
        (Unavailable("Draining."), "UNAVAILABLE"),
        (NoFaceFound("No face."), "INVALID_ARG"),
    ],
)
def test_a_task_that_fails_is_an_error_of_its_request_alone(error, code, tmp_path):
    with serving(tmp_path) as (instance, worker):
        failing, other = instance.execute(ONE, ONE)
        one, two = worker.submitted(2)
        worker.fail(one.id, error)
        with pytest.raises(Refused, match=error.message) as refused:
            failing.wait()
        assert refused.value.code == code
        worker.finish(two.id)
        assert other.wait()


def test_what_went_wrong_inside_is_logged_and_not_told(tmp_path):
    with serving(tmp_path) as (instance, worker):
        (sent,) = instance.execute(ONE)
        worker.fail(worker.submitted(1)[0].id, EngineFailed("secret /path/of/engine"))
        with pytest.raises(Refused) as refused:
            sent.wait()
        assert refused.value.code == "INTERNAL"
        assert "secret" not in str(refused.value)
        assert "secret" in "".join(instance.model.log)


def test_one_picture_that_fails_ends_its_request_and_stops_its_other_pictures(tmp_path):
    with serving(tmp_path) as (instance, worker):
        (sent,) = instance.execute(TWO)
        one, two = worker.submitted(2)
        worker.fail(one.id, DeadlinePassed("Too late."))
        with pytest.raises(Refused):
            sent.wait()
        worker.wait_for(lambda w: two.id in w.cancelled)
        worker.finish(two.id)  # it was past its last step: nothing more may be sent
        assert len(sent.responses) == 1


def test_a_picture_without_a_face_is_an_error_of_that_request(tmp_path):
    with serving(tmp_path) as (instance, worker):
        worker.face = NoFaceFound("No face was found.")
        (sent,) = instance.execute(ONE)
        with pytest.raises(Refused, match="No face") as refused:
            sent.wait()
        assert refused.value.code == "INVALID_ARG"


def test_a_refused_picture_ends_the_request_before_its_next_one_is_submitted(tmp_path):
    with serving(tmp_path) as (instance, worker):
        worker.refuse = Busy("64 pictures wait already.", retry_after=3)
        embedded = {name: np.repeat(array, 2, 0) for name, array in ANALYSED.items()}
        (sent,) = instance.execute({"PROMPT": TWO["PROMPT"]} | embedded)
        with pytest.raises(Refused, match="64 pictures") as refused:
            sent.wait()
        assert refused.value.code == "UNAVAILABLE"
        assert not worker.tasks


def test_an_analysed_face_is_not_looked_for_again(tmp_path):
    with serving(tmp_path) as (instance, worker):
        (sent,) = instance.execute({"PROMPT": ONE["PROMPT"]} | ANALYSED)
        (task,) = worker.submitted(1)
        assert not worker.analysed
        assert task.face.embedding[0] == 1
        worker.finish(task.id)
        assert sent.wait()


def test_a_client_that_cancels_between_steps_frees_its_row(tmp_path):
    with serving(tmp_path) as (instance, worker):
        (sent,) = instance.execute(ONE)
        (task,) = worker.submitted(1)
        sent.sender.cancelled.set()
        worker.step(task.id, 1)
        with pytest.raises(Refused) as refused:
            sent.wait()
        assert refused.value.code == "CANCELLED"
        worker.wait_for(lambda w: w.cancelled == [task.id])


def test_a_client_that_cancels_while_its_task_waits_is_noticed_without_events(tmp_path):
    with serving(tmp_path) as (instance, worker):
        worker.face = None  # the analysis does not end
        (sent,) = instance.execute(ONE)
        sent.sender.cancelled.set()
        with pytest.raises(Refused) as refused:
            sent.wait()
        assert refused.value.code == "CANCELLED"


def test_steps_and_previews_are_responses_of_a_decoupled_model(tmp_path):
    previews = ONE | {"PARAMETERS": text('{"previews": true}')}
    with serving(tmp_path, decoupled=True) as (instance, worker):
        (sent,) = instance.execute(previews)
        (task,) = worker.submitted(1)
        assert task.previews
        worker.step(task.id, 1)
        worker.step(task.id, 2, np.full((24, 24, 3), 7, np.uint8))
        worker.finish(task.id)
        assert sent.wait()["IMAGE"].shape == (1, 96, 96, 3)
        steps = [arrays for arrays, _ in sent.responses[:-1]]
        assert [arrays["STEP"].tolist() for arrays in steps] == [[[1, 4]], [[2, 4]]]
        assert "PREVIEW" not in steps[0]
        assert steps[1]["PREVIEW"].shape == (1, 24, 24, 3)
        assert steps[1]["PREVIEW"].min() == 7


def test_a_decoupled_request_is_one_picture(tmp_path):
    with serving(tmp_path, decoupled=True) as (instance, _):
        (sent,) = instance.execute(TWO)
        with pytest.raises(Refused, match="one request for each"):
            sent.wait()


def test_no_steps_and_no_previews_without_decoupling(tmp_path):
    previews = ONE | {"PARAMETERS": text('{"previews": true}')}
    with serving(tmp_path) as (instance, worker):
        (sent,) = instance.execute(previews)
        (task,) = worker.submitted(1)
        assert not task.previews
        worker.step(task.id, 1)
        worker.finish(task.id)
        sent.wait()
        assert len(sent.responses) == 1


def test_tensors_on_a_gpu_are_refused_with_the_parameter_to_set(tmp_path):
    with serving(tmp_path) as (instance, _):
        (sent,) = instance.execute({"PROMPT": ONE["PROMPT"]} | ANALYSED, gpu=("FACE_EMBEDDING",))
        with pytest.raises(Refused, match="FORCE_CPU_ONLY_INPUT_TENSORS"):
            sent.wait()


def test_what_exceeds_the_capacity_waits_in_triton(tmp_path):
    with serving(tmp_path, capacity=2) as (instance, worker):
        first = instance.execute(TWO)
        entered = threading.Event()

        def third():
            entered.set()
            later.extend(instance.execute(ONE))
            returned.set()

        later, returned = [], threading.Event()
        thread = threading.Thread(target=third, daemon=True)
        thread.start()
        assert entered.wait(60)
        one, two = worker.submitted(2)
        assert not returned.is_set()
        assert len(worker.tasks) == 2
        worker.finish(one.id)
        worker.finish(two.id)
        assert first[0].wait()
        assert returned.wait(60)
        thread.join()
        worker.finish(worker.submitted(1)[0].id)
        assert later[0].wait()


def test_readiness_is_the_workers(tmp_path):
    with serving(tmp_path) as (instance, worker):
        assert instance.model.served.ready
        worker.state = State.DEAD
        assert not instance.model.served.ready


def test_unloading_drains_answers_everything_and_ends_its_thread(tmp_path):
    with serving(tmp_path) as (instance, worker):
        (submitted,) = instance.execute(ONE)
        worker.submitted(1)
        worker.face = None
        (analysing,) = instance.execute(ONE)
    assert worker.drained_for == 5
    assert worker.closed
    for sent in (submitted, analysing):
        with pytest.raises(Refused) as refused:
            sent.wait()
        assert refused.value.code == "UNAVAILABLE"
    assert "fastface-triton" not in [thread.name for thread in threading.enumerate()]


def test_a_config_that_was_changed_by_hand_is_refused_at_loading(tmp_path):
    folder = tmp_path / "fastface"
    folder.mkdir()
    unet = type("Engine", (), {"options": {}})
    config = model_config(WorkerSettings(), RepositoryOptions(), unet).to_text()
    (folder / "config.pbtxt").write_text(config.replace("dims: [ 512 ]", "dims: [ 256 ]"), "utf-8")
    with pytest.raises(ValueError, match="FACE_EMBEDDING"):
        Instance(tmp_path, model=Model(ScriptedWorker(), 4))
