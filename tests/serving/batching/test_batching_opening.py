"""A worker as it is opened for serving, over the mini model."""

import queue

import numpy as np
import pytest

from fastface_trt.engines.manifest import EXPORT_MANIFEST, ExportManifest, read_manifest
from fastface_trt.errors import EngineFailed
from fastface_trt.mini.folders import EXPORT, SAMPLE_FACES
from fastface_trt.runtime import preview as preview_module
from fastface_trt.runtime.images import load_picture
from fastface_trt.runtime.request import request_for
from fastface_trt.serving.batching import opening
from fastface_trt.serving.settings import WorkerSettings
from fastface_trt.serving.work import PictureDone, StepDone, Task


def events_of(batcher, task):
    """What happens to a task, until its picture is done."""
    told = queue.Queue()
    batcher.submit(task, told.put)
    events = [told.get(timeout=60)]
    while isinstance(events[-1], StepDone):
        events.append(told.get(timeout=60))
    assert isinstance(events[-1], PictureDone)
    return events


def test_steps_come_with_previews_of_what_becomes_the_picture():
    manifest = read_manifest(EXPORT / EXPORT_MANIFEST, ExportManifest)
    with opening.open_batcher(WorkerSettings()) as batcher:
        face = batcher.analyze(load_picture(SAMPLE_FACES / "ada.png")).result(60)
        request = request_for(manifest, "photo; person in a garden", seed=1)
        *steps, done = events_of(batcher, Task("seen", request, face, previews=True))
        *unseen, _ = events_of(batcher, Task("unseen", request, face))
    assert [step.preview.shape for step in steps] == [(24, 24, 3)] * len(steps)
    small = done.pixels.reshape(24, 4, 24, 4, 3).mean((1, 3))
    last = steps[-1].preview
    assert np.corrcoef(small.reshape(-1), last.reshape(-1).astype(float))[0, 1] > 0.8
    assert [step.preview for step in unseen] == [None] * len(unseen)


def test_engines_that_fail_on_opening_are_closed(monkeypatch):
    closed = []

    class Broken(opening.FastFace):
        def close(self):
            closed.append(self)
            super().close()

    def fail(stages, manifest):
        raise EngineFailed("The decoder failed.")

    monkeypatch.setattr(opening, "FastFace", Broken)
    monkeypatch.setattr(preview_module.LatentPreview, "fit", fail)
    with pytest.raises(EngineFailed):
        opening.open_batcher(WorkerSettings())
    assert len(closed) == 1
