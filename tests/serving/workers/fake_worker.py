"""A worker's process without engines: it does what the prompt of a task says.

paint: two steps and a picture that follows from the seed. die: leaves at once, whoever works on it.
die once FILE: leaves the first time, and paints when FILE is there. wait: nothing, until cancelled.
refuse: fails with Busy. An export called `none` cannot be opened; `fragile` dies after opening.
"""

import os
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from fastface_trt.errors import Busy, Cancelled, ExportIncomplete, NoFaceFound
from fastface_trt.runtime.face import Face
from fastface_trt.serving.work import Load, PictureDone, State, StepDone, TaskFailed
from fastface_trt.serving.workers.messages import (
    Analyze,
    Analyzed,
    Cancel,
    Close,
    Forget,
    OpenFailed,
    Report,
    Submit,
)


def picture(seed):
    return np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def face():
    return Face(
        np.ones(512, np.float32),
        20.0,
        np.zeros((224, 224, 3), np.uint8),
        (0, 0, 9, 9),
        1.0,
        0,
        1,
        640,
    )


def main():
    connection = Connection(int(sys.argv[1]))
    settings = connection.recv().settings
    if settings.export == "none":
        connection.send(OpenFailed(ExportIncomplete("There is no export.", "Make one.")))
        return
    connection.send(Report(State.READY, Load(memory_bytes=1000)))
    if settings.export == "fragile":
        return
    waiting, kept = set(), {"a face"}
    while True:
        try:
            message = connection.recv()
        except EOFError:
            return
        match message:
            case Submit(task):
                prompt = task.request.prompt
                if prompt == "wait":
                    waiting.add(task.id)
                    connection.send(StepDone(task.id, 1, 2))
                    connection.send(Report(State.READY, Load(running=len(waiting))))
                    continue
                if prompt == "refuse":
                    connection.send(TaskFailed(task.id, Busy("Late.", retry_after=7)))
                    continue
                if prompt == "die":
                    os._exit(3)
                if prompt.startswith("die once"):
                    flag = Path(prompt.removeprefix("die once "))
                    if not flag.exists():
                        flag.write_text("died")
                        os._exit(3)
                for step in (1, 2):
                    connection.send(StepDone(task.id, step, 2))
                facts = {"kept": sorted(kept)}
                connection.send(PictureDone(task.id, picture(task.request.seed), facts))
            case Cancel(task_id) if task_id in waiting:
                waiting.discard(task_id)
                connection.send(TaskFailed(task_id, Cancelled("Cancelled.")))
            case Forget():
                kept.clear()
            case Close():
                return
            case Analyze(key, pixels, _):
                if pixels[0, 0, 0] == 13:
                    os._exit(3)
                found = face() if pixels.any() else NoFaceFound("No face.", "Another.")
                connection.send(Analyzed(key, found))


if __name__ == "__main__":
    main()
