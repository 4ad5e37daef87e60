"""A `Worker` whose every event is the test's doing."""

import threading
from concurrent.futures import Future

import numpy as np

from fastface_trt.errors import Unavailable
from fastface_trt.runtime.face import Face
from fastface_trt.serving.work import PictureDone, State, StepDone, TaskFailed

WAIT_SECONDS = 60


def any_face():
    """A face of the right shapes."""
    return Face(
        embedding=np.eye(1, 512, dtype=np.float32)[0],
        embedding_norm=1.0,
        crop_bgr=np.zeros((224, 224, 3), np.uint8),
        box=(0, 0, 1, 1),
        score=1.0,
        index=0,
        count=1,
        detector_size=64,
    )


class ScriptedWorker:
    """Keeps what it is given; `refuse` is raised by `submit`, `face` is what `analyze` finds."""

    def __init__(self):
        self.state = State.READY
        self.tasks, self.cancelled, self.analysed = {}, [], []
        self.face, self.refuse = any_face(), None
        self.drained_for, self.closed = None, False
        self._change = threading.Condition()

    def submit(self, task, on_event):
        if self.refuse is not None:
            raise self.refuse
        with self._change:
            self.tasks[task.id] = (task, on_event)
            self._change.notify_all()

    def cancel(self, task_id):
        with self._change:
            self.cancelled.append(task_id)
            self._change.notify_all()

    def analyze(self, pixels, index=None, owner=""):
        self.analysed.append((pixels, index))
        future = Future()
        if isinstance(self.face, Exception):
            future.set_exception(self.face)
        elif self.face is not None:
            future.set_result(self.face)
        return future

    def forget(self):
        raise AssertionError("Triton has no registered faces")

    def drain(self, seconds):
        self.drained_for = seconds
        self.state = State.DRAINING
        return not self.tasks

    def close(self):
        self.closed = True
        for task_id in list(self.tasks):
            self.fail(task_id, Unavailable("closed"))

    # What the test does

    def wait_for(self, condition):
        """Wait until `condition(self)` holds."""
        with self._change:
            assert self._change.wait_for(lambda: condition(self), WAIT_SECONDS)

    def submitted(self, count):
        """The first `count` tasks, once they are there."""
        self.wait_for(lambda worker: len(worker.tasks) >= count)
        return [task for task, _ in list(self.tasks.values())[:count]]

    def step(self, task_id, step, preview=None):
        task, on_event = self.tasks[task_id]
        on_event(StepDone(task_id, step, task.request.steps, preview))

    def finish(self, task_id, value=0):
        task, on_event = self.tasks.pop(task_id)
        pixels = np.full((task.request.height, task.request.width, 3), value, np.uint8)
        on_event(PictureDone(task_id, pixels, task.request.to_dict(), ("w",), {"queue": 1.0}))

    def fail(self, task_id, error):
        self.tasks.pop(task_id)[1](TaskFailed(task_id, error))
