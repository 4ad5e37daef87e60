"""Parts of the batcher by themselves: the face thread, and what is left of a task."""

import subprocess
import sys
import threading

import numpy as np
import pytest

from fastface_trt.errors import Busy, EngineFailed, NoFaceFound, Unavailable
from fastface_trt.measure.memory import resident_bytes
from fastface_trt.serving.batching.batcher import FaceAnalysis
from fastface_trt.serving.batching.cost import Remaining
from fastface_trt.serving.batching.entry import Demand, Entry
from tests.serving.batching.batching_fakes import WAIT, ArithmeticFastFace, Events, task

FACE = np.full((4, 4, 3), 7, np.uint8)
NO_FACE = np.zeros((4, 4, 3), np.uint8)


class HeldFaces(ArithmeticFastFace):
    """Analyses when it is let; says when it was asked."""

    def __init__(self):
        super().__init__()
        self.asked, self.let = threading.Semaphore(0), threading.Event()

    def analyze(self, picture, **kwargs):
        self.asked.release()
        assert self.let.wait(WAIT)
        if picture[0, 0, 0] == 99:
            raise RuntimeError("a secret of the detector")
        return super().analyze(picture, **kwargs)


@pytest.fixture
def fastface():
    return HeldFaces()


@pytest.fixture
def analysis(fastface):
    started = FaceAnalysis(fastface, max_waiting=2)
    started.start()
    yield started
    fastface.let.set()
    started.close()


def test_pictures_wait_up_to_a_number(fastface, analysis):
    first = analysis.submit(FACE, None)
    assert fastface.asked.acquire(timeout=WAIT)
    waiting = [analysis.submit(FACE, None) for _ in range(2)]
    with pytest.raises(Busy):
        analysis.submit(FACE, None).result(WAIT)
    assert not first.done()
    fastface.let.set()
    assert all(one.result(WAIT).count == 1 for one in [first, *waiting])


def test_errors_are_what_a_client_can_fix_or_one_sentence(fastface, analysis, caplog):
    fastface.let.set()
    with pytest.raises(NoFaceFound):
        analysis.submit(NO_FACE, None).result(WAIT)
    with pytest.raises(EngineFailed) as failed:
        analysis.submit(np.full((4, 4, 3), 99, np.uint8), None).result(WAIT)
    assert "secret" not in str(failed.value)
    assert "a secret of the detector" in caplog.text
    assert analysis.submit(FACE, None).result(WAIT).count == 1


def test_closing_finishes_one_and_refuses_the_rest(fastface, analysis):
    first = analysis.submit(FACE, None)
    assert fastface.asked.acquire(timeout=WAIT)
    second, third = analysis.submit(FACE, None), analysis.submit(FACE, None)
    assert third.cancel()
    closing = threading.Thread(target=analysis.close)
    closing.start()
    while not isinstance(analysis.submit(FACE, None).exception(WAIT), Unavailable):
        pass  # until the close is seen; before that it is Busy
    fastface.let.set()
    closing.join(WAIT)
    assert first.result(WAIT).count == 1
    with pytest.raises(Unavailable):
        second.result(WAIT)


def test_what_is_left_of_a_task_shrinks_with_its_steps():
    fastface = ArithmeticFastFace()
    one = task(fastface, "a", preset="am1+dcg", deadline=4.0)
    entry = Entry(7, one, Events(), one.request, 0.0, Demand.of(one.request, fastface.manifest))
    assert entry.remaining() == Remaining((2, 3, 3, 2), 576, unprepared=True)
    assert not entry.candidate().begun
    stages = fastface.stages
    entry.sample = stages.sample(one.request, stages.image_tokens(one.face))
    stages.step([entry.sample])
    assert entry.remaining() == Remaining((3, 3, 2), 576, unprepared=False)
    candidate = entry.candidate()
    assert (candidate.order, candidate.rows, candidate.steps_left) == (7, 3, 3)
    assert candidate.begun
    assert candidate.deadline == 4.0
    assert candidate.sharing == entry.sample.sharing
    assert not entry.finished


def test_resident_memory_is_that_of_this_process():
    psutil = pytest.importorskip("psutil")
    assert resident_bytes() == pytest.approx(psutil.Process().memory_info().rss, rel=0.2)


def test_a_batcher_needs_no_server():
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(('fastapi', 'uvicorn', 'psutil', 'torch')))\n"
        "import fastface_trt.serving.batching\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
