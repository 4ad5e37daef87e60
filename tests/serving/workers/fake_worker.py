"""A worker's process without engines: it does what the prompt of a task says.

paint: two steps and a picture that follows from the seed. die: leaves in its call, whoever works on
it. die once FILE: is killed in its call the first time, and paints when FILE is there. join: waits
for a crowd of three, which share a call; in it the process leaves. poison: joins too, and by itself
it dies. stand still: its call never ends. stop: no call, and not a word any more. wait: nothing,
until cancelled. refuse: fails with Busy. An export called `none` cannot be opened; `fragile` dies
after opening, `weak` in no call with its first task.
"""

import os
import signal
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from fastface_trt.errors import Busy, Cancelled, ExportIncomplete, NoFaceFound
from fastface_trt.runtime.face import Face
from fastface_trt.serving.work import Load, PictureDone, State, StepDone, TaskFailed
from fastface_trt.serving.workers.messages import (
    Analyze,
    Analyzed,
    CallRecord,
    Cancel,
    Close,
    Forget,
    OpenFailed,
    Outbox,
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


class FakeWorker:
    def __init__(self, connection, record, settings):
        self.connection, self.record, self.settings = connection, record, settings
        self.outbox = Outbox(connection, "outbox")
        self.waiting, self.crowd, self.kept = set(), [], {"a face"}
        self.silent = False
        threading.Thread(target=self.report, daemon=True).start()

    def report(self):
        while not self.silent:
            self.outbox.put(Report(State.READY, Load(running=len(self.waiting), memory_bytes=1000)))
            time.sleep(0.02)

    def submit(self, task, alone):
        prompt = task.request.prompt
        if self.settings.export == "weak":
            os._exit(3)
        if prompt == "refuse":
            self.outbox.put(TaskFailed(task.id, Busy("Late.", retry_after=7)))
        elif prompt == "wait":
            self.waiting.add(task.id)
            self.outbox.put(StepDone(task.id, 1, 2))
        elif prompt == "stop":
            self.silent = True
        elif prompt in ("join", "poison") and not alone:
            self.crowd.append(task.id)
            if len(self.crowd) == 3:
                self.record.write(self.crowd)
                os._exit(3)
        else:
            self.record.write([task.id])
            self.call(prompt)
            self.record.write(None)
            for step in (1, 2):
                self.outbox.put(StepDone(task.id, step, 2))
            facts = {"kept": sorted(self.kept)}
            self.outbox.put(PictureDone(task.id, picture(task.request.seed), facts))

    def call(self, prompt):
        if prompt in ("die", "poison"):
            os._exit(3)
        if prompt == "stand still":
            time.sleep(600)
        flag = Path(prompt.removeprefix("die once "))
        if prompt.startswith("die once") and not flag.exists():
            flag.write_text("died")
            os.kill(os.getpid(), signal.SIGKILL)

    def analyze(self, key, pixels):
        if pixels[0, 0, 0] == 13:
            os._exit(3)
        if pixels[0, 0, 0] == 14:
            return  # it looks and looks
        found = face() if pixels.any() else NoFaceFound("No face.", "Another.")
        self.outbox.put(Analyzed(key, found))

    def answer(self):
        while True:
            try:
                message = self.connection.recv()
            except EOFError:
                return
            match message:
                case Submit(task, alone):
                    self.submit(task, alone)
                case Cancel(task_id) if task_id in self.waiting:
                    self.waiting.discard(task_id)
                    self.outbox.put(TaskFailed(task_id, Cancelled("Cancelled.")))
                case Forget():
                    self.kept.clear()
                case Close():
                    return
                case Analyze(key, pixels, _):
                    self.analyze(key, pixels)


def main():
    connection = Connection(int(sys.argv[1]))
    settings = connection.recv().settings
    if settings.export == "none":
        connection.send(OpenFailed(ExportIncomplete("There is no export.", "Make one.")))
    elif settings.export == "fragile":
        connection.send(Report(State.READY, Load()))
    else:
        FakeWorker(connection, CallRecord(int(sys.argv[2])), settings).answer()


if __name__ == "__main__":
    main()
