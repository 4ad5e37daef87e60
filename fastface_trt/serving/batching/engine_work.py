"""What the engine thread asks of the engines: measured, and with errors that clients may see.

A client learns what it can mend. What only the operator can mend is in the log, and the client gets
one generic sentence.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from fastface_trt.engines.device import Tensor
from fastface_trt.errors import EngineFailed, FastFaceError, OutOfMemory
from fastface_trt.runtime.face import Face
from fastface_trt.runtime.pipeline import FastFace
from fastface_trt.runtime.request import GenerationRequest
from fastface_trt.runtime.sampling import Run
from fastface_trt.serving.batching.cost import CostModel
from fastface_trt.serving.work import Pixels, Task

PATIENCE = 3
"""Failures of single runs in a row, at the same stage, before the engines are put to the test."""

Made = TypeVar("Made")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Stepped:
    """What a step did: per run None, or why it alone could not; whether they are too many."""

    errors: Sequence[FastFaceError | None]
    out_of_memory: bool = False


def shown(error: Exception) -> FastFaceError:
    """The error as a client may see it."""
    if isinstance(error, FastFaceError):
        return error
    return EngineFailed("The picture could not be made.", "Try again; the server's log says more.")


class EngineWork:
    """Preparation, UNet calls and decoding; one thread at a time may use it.

    After every call the device is waited for. That costs a GPU a moment without work, and buys what
    a server needs: costs that are true, errors that belong to a call, and runs that can be ended
    between two calls, because no more than one is ever queued.
    """

    def __init__(self, fastface: FastFace, cost: CostModel) -> None:
        self._stages = fastface.stages
        self._fastface = fastface
        self._cost = cost
        self._failures = {"preparation": 0, "step": 0, "decoding": 0}

    @property
    def suspect(self) -> bool:
        """Whether so much failed in a row that the engines may be what is broken."""
        return max(self._failures.values()) >= PATIENCE

    def prepare(self, task: Task, request: GenerationRequest) -> tuple[Run, tuple[str, ...]]:
        """The run of a task and its warnings; raises what the client may see."""

        def work() -> tuple[Run, tuple[str, ...]]:
            tokens = self._stages.image_tokens(task.face, task.channel_order)
            run = self._stages.start(self._stages.job(request, tokens))
            return run, tuple(self._fastface.warnings([request]))

        prepared, seconds = self._single("preparation", work)
        self._cost.observe_preparation(seconds)
        return prepared

    def step(self, runs: Sequence[Run]) -> Stepped:
        """Take the runs one step further.

        A call of several that fails is made again for each of them by itself: one request must not
        take others with it.
        """
        out_of_memory = False
        if len(runs) > 1:
            try:
                self._call(runs)
            except Exception as error:
                out_of_memory = isinstance(error, OutOfMemory)
                _log.warning("A UNet call of %d runs failed: one by one.", len(runs), exc_info=True)
            else:
                self._failures["step"] = 0
                return Stepped([None] * len(runs))
        errors: list[FastFaceError | None] = []
        for run in runs:
            try:
                self._single("step", partial(self._call, [run]))
                errors.append(None)
            except FastFaceError as error:
                errors.append(error)
        return Stepped(errors, out_of_memory)

    def decode(self, run: Run) -> Pixels:
        """The picture of a finished run; raises what the client may see."""
        pixels, seconds = self._single("decoding", lambda: self._stages.decode(run.latents))
        self._cost.observe_decoding(latent_area(run), seconds)
        return pixels

    def make(self, requests: Sequence[GenerationRequest], face: Face) -> None:
        """Take copies of one request through their steps together, and decode the first.

        Raises whatever fails, and `EngineFailed` where the picture is not finite. Nothing that is
        kept for the next call is used, so every engine runs.
        """
        self._stages.forget()
        started = perf_counter()
        tokens = self._stages.image_tokens(face)
        runs = [self._stages.start(self._stages.job(request, tokens)) for request in requests]
        self._cost.observe_preparation(perf_counter() - started)
        while not runs[0].finished:
            self._call(runs)
        started = perf_counter()
        self._stages.decode(runs[0].latents)
        self._cost.observe_decoding(latent_area(runs[0]), perf_counter() - started)
        self._failures = dict.fromkeys(self._failures, 0)

    def download(self, latents: Tensor) -> NDArray[np.float32]:
        """Latents [C,h,w] on the host, float32."""
        return np.asarray(self._stages.device.download(latents), dtype=np.float32)

    def _call(self, runs: Sequence[Run]) -> None:
        before = [(run.step, run.latents, run.sample) for run in runs]
        area, rows = latent_area(runs[0]), sum(len(run.guidance.branches) for run in runs)
        started = perf_counter()
        try:
            self._stages.step(runs)
            self._stages.device.synchronize()
        except Exception:
            # A device may tell of a failure only when it is waited for, after the runs moved on.
            for run, (step, latents, sample) in zip(runs, before, strict=True):
                run.step, run.latents, run.sample = step, latents, sample
            raise
        self._cost.observe_call(area, rows, perf_counter() - started)

    def _single(self, stage: str, work: Callable[[], Made]) -> tuple[Made, float]:
        started = perf_counter()
        try:
            made = work()
        except Exception as error:
            told = shown(error)
            if isinstance(told, EngineFailed):
                self._failures[stage] += 1
                _log.error("The %s of a task failed.", stage, exc_info=True)
            raise told from None
        self._failures[stage] = 0
        return made, perf_counter() - started


def latent_area(run: Run) -> int:
    """Latent pixels of one row of a run."""
    return run.job.latent_shape[1] * run.job.latent_shape[2]
