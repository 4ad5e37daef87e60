"""A worker without engines: it does what a test tells it, or everything at once."""

import threading
from concurrent.futures import Future

import numpy as np

from fastface_trt.errors import Busy, Cancelled, EngineFailed, Unavailable
from fastface_trt.runtime.face import Face
from fastface_trt.serving.work import Load, PictureDone, State, StepDone, TaskFailed

PIXELS = np.arange(32 * 48 * 3, dtype=np.uint8).reshape(32, 48, 3)
PREVIEW = np.full((8, 12, 3), 90, np.uint8)


def make_face(embedding=1.0, index=0):
    return Face(
        embedding=np.full(512, embedding, np.float32),
        embedding_norm=20.0,
        crop_bgr=np.zeros((224, 224, 3), np.uint8),
        box=(1.0, 2.0, 30.0, 40.5),
        score=0.75,
        index=index,
        count=2,
        detector_size=640,
    )


class ScriptedWorker:
    """`eager` makes every picture within `submit`; otherwise tasks wait for `step` and `finish`."""

    def __init__(self, *, eager=True, capacity=100):
        self.eager, self.capacity = eager, capacity
        self.state = State.READY
        self.open = {}
        self.submitted, self.cancelled, self.analysed = [], [], []
        self.drained = self.closed = False
        self.analysis_error = None
        self.analysis = None
        self.calls = self.forgotten = 0
        self._lock = threading.Lock()
        self._empty = threading.Event()

    def load(self):
        with self._lock:
            return Load(
                waiting=len(self.open),
                running=0,
                backlog_seconds=0.5 * len(self.open),
                calls=self.calls,
                rows=3 * self.calls,
                memory_bytes=1_000_000,
            )

    def submit(self, task, on_event):
        with self._lock:
            if self.state is not State.READY:
                raise Unavailable("The worker is draining.")
            if len(self.open) >= self.capacity:
                raise Busy("The queue is full.", "Try again later.", retry_after=7.2)
            assert all(task.id != other.id for other in self.submitted)
            self.submitted.append(task)
            self.open[task.id] = (task, on_event)
        if self.eager:
            for _ in range(task.request.steps):
                self.step(task.id)
            self.finish(task.id)

    def step(self, name):
        task, on_event = self.open[name]
        self.calls += 1
        done = getattr(self, "_done", {})
        done[name] = done.get(name, 0) + 1
        self._done = done
        preview = PREVIEW if task.previews else None
        on_event(StepDone(name, done[name], task.request.steps, preview))

    def finish(self, name):
        task, on_event = self._ended(name)
        seconds = {"queue": 0.25, "denoise": 0.5, "decode": 0.125}
        parameters = task.request.to_dict() | {"backend": "fake"}
        on_event(PictureDone(name, PIXELS, parameters, ("a warning",), seconds))

    def fail(self, name, error):
        self._ended(name)[1](TaskFailed(name, error))

    def cancel(self, name):
        with self._lock:
            self.cancelled.append(name)
            known = name in self.open
        if known:
            self.fail(name, Cancelled("The task was cancelled."))

    def _ended(self, name):
        with self._lock:
            ended = self.open.pop(name)
            if not self.open:
                self._empty.set()
            return ended

    def analyze(self, pixels, index=None, owner=""):
        self.analysed.append((pixels, index))
        if self.analysis is not None:
            return self.analysis
        future = Future()
        if self.analysis_error is not None:
            future.set_exception(self.analysis_error)
        else:
            future.set_result(make_face(float(len(self.analysed)), index or 0))
        return future

    def forget(self):
        self.forgotten += 1

    def drain(self, seconds):
        self.state, self.drained = State.DRAINING, True
        return not self.open or self._empty.wait(seconds)

    def close(self):
        self.closed = True
        for name in list(self.open):
            self.fail(name, Unavailable("The worker was closed."))


class SecondFails(ScriptedWorker):
    """Of the pictures that it is given the second one fails at once."""

    def submit(self, task, on_event):
        super().submit(task, on_event)
        if len(self.submitted) == 2:
            self.fail(task.id, EngineFailed("NaN"))
