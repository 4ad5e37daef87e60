"""Crowds of tasks with all sorts of settings, that come at chosen moments of the work."""

import threading

import numpy as np

from fastface_trt.runtime.presets import PRESETS
from fastface_trt.serving.batching.loop import blank_face
from fastface_trt.serving.work import PictureDone, StepDone, Task

WAIT = 120


def random_task(fastface, generator, name):
    """A task with settings drawn at random; sizes, steps and plans among them."""
    pick = generator.choice
    fields = {
        "steps": int(pick([1, 2, 3, 4])),
        "seed": int(generator.integers(2**32)),
        "width": int(pick([64, 96])),
        "ip_adapter_scale": float(generator.uniform(0.1, 1.2)),
        "scope": str(pick(["request", "request", "branch"])),
        "plan": str(pick(["exact", "full", "lean"])),
        "dcg_variant": int(pick([1, 2, 3])),
        "negative_prompt": str(pick(["", "blurry"])),
    }
    prompt = str(
        pick(["photo; a person in a garden", "painting; a person", "a person at long last, " * 12])
    )
    request = fastface.request(prompt, preset=str(pick(PRESETS)), **fields)
    face = blank_face(int(generator.integers(3)))
    return Task(name, request, face, str(pick(["bgr", "rgb"])), previews=True)


class Crowd:
    """Submits tasks when so many steps of others are done, and keeps pictures and last latents.

    `moments` holds for each task the number of `StepDone` before it comes; where nothing is in work
    the next one comes at once. The batcher's `preview` must be `keep_latents`.
    """

    def __init__(self, batcher, tasks, moments):
        self.batcher = batcher
        self.left = sorted(zip(moments, tasks, strict=True), key=lambda one: one[0])
        self.pictures, self.latents, self.errors = {}, {}, {}
        self.steps = self.in_work = 0
        self._lock = threading.Lock()
        self._done = threading.Event()

    def run(self):
        """Until every task has ended."""
        with self._lock:
            self._go_on()
        assert self._done.wait(WAIT), "a task never ended"

    def __call__(self, event):
        with self._lock:
            if isinstance(event, StepDone):
                self.steps += 1
                self.latents[event.id] = event.preview
            else:
                self.in_work -= 1
                if isinstance(event, PictureDone):
                    self.pictures[event.id] = event.pixels
                else:
                    self.errors[event.id] = event.error
            self._go_on()

    def _go_on(self):
        while self.left and (self.left[0][0] <= self.steps or not self.in_work):
            self.in_work += 1
            self.batcher.submit(self.left.pop(0)[1], self)
        if not self.left and not self.in_work:
            self._done.set()


def keep_latents(latents):
    """In place of a preview: the latents themselves."""
    return latents.copy()


def moments(generator, count, until, burst=1):
    """Moments drawn evenly, rounded so that those within a burst come at once."""
    return [int(moment) // burst * burst for moment in generator.integers(0, until, count)]


def alone(stages, task):
    """Latents and pixels of a task with nobody beside it."""
    tokens = stages.image_tokens(task.face, task.channel_order)
    sample = stages.sample(task.request.for_adapter("faceid-plus-v2"), tokens)
    while not sample.finished:
        stages.step([sample])
    return sample.latents, stages.decode(sample.latents)


def assert_same_as_alone(crowd, stages, tasks, tolerance):
    """Everybody got what they get alone: latents within the tolerance, pixels within a level."""
    assert set(crowd.pictures) == {one.id for one in tasks}
    for one in tasks:
        latents, pixels = alone(stages, one)
        error = np.linalg.norm(crowd.latents[one.id] - latents) / np.linalg.norm(latents)
        assert error <= tolerance, one
        assert np.abs(crowd.pictures[one.id].astype(int) - pixels).max() <= 1, one
