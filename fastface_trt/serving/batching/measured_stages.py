"""The stages of a picture as the engine thread calls them: measured, with errors for clients.

A client learns what it can fix. What only the operator can fix is in the log, and the client gets
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

from fastface_trt.engines.device import DeviceLost, Tensor
from fastface_trt.errors import Cancelled, EngineFailed, FastFaceError, OutOfMemory
from fastface_trt.runtime.face import Face
from fastface_trt.runtime.pipeline import FastFace
from fastface_trt.runtime.request import GenerationRequest
from fastface_trt.runtime.sampling import Sample
from fastface_trt.serving.batching.cost import CostModel
from fastface_trt.serving.work import Pixels, Task

PATIENCE = 3
"""Failures in a row, each alone and at the same stage, before the engines are put to the test."""

Made = TypeVar("Made")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Stepped:
    """What a step did: per sample None, or why it alone could not; whether they are too many."""

    errors: Sequence[FastFaceError | None]
    out_of_memory: bool = False


class EnginesLost(Exception):
    """The device works no more; no error of a task, which may have had no part in it."""


def for_client(error: Exception) -> FastFaceError:
    """The error as a client may see it."""
    if isinstance(error, FastFaceError):
        return error
    return EngineFailed("The picture could not be made.", "Try again; the server's log says more.")


class MeasuredStages:
    """Preparation, UNet calls and decoding; one thread at a time may use it.

    After every call the device is waited for. That costs a GPU a moment without work, and buys what
    a server needs: costs that are true, errors that belong to a call, and samples that can be
    ended between two calls, because no more than one is ever queued.
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

    def prepare(self, task: Task, request: GenerationRequest) -> tuple[Sample, tuple[str, ...]]:
        """The sample of a task and its warnings; raises what the client may see."""

        def work() -> tuple[Sample, tuple[str, ...]]:
            tokens = self._stages.image_tokens(task.face, task.channel_order)
            sample = self._stages.sample(request, tokens)
            return sample, tuple(self._fastface.warnings([request], [task.face]))

        prepared, seconds = self._single("preparation", work)
        self._cost.observe_preparation(seconds)
        return prepared

    def step(self, samples: Sequence[Sample], wanted: Callable[[int], bool]) -> Stepped:
        """Take the samples one step further.

        A call of several that fails is made again for each of them by itself, as far as it is still
        `wanted`: one request must not take others with it. Raises `EnginesLost`, as all here do.
        """
        out_of_memory = False
        if len(samples) > 1:
            try:
                self._call(samples)
            except Exception as error:
                self._require_device(error)
                out_of_memory = isinstance(error, OutOfMemory)
                message = "A UNet call of %d samples failed: one by one."
                _log.warning(message, len(samples), exc_info=True)
            else:
                self._failures["step"] = 0
                return Stepped([None] * len(samples))
        errors: list[FastFaceError | None] = []
        for index, sample in enumerate(samples):
            if len(samples) > 1 and not wanted(index):
                errors.append(Cancelled("Nobody waits for this step any more."))
                continue
            try:
                self._single("step", partial(self._call, [sample]))
                errors.append(None)
            except FastFaceError as error:
                errors.append(error)
        return Stepped(errors, out_of_memory)

    def decode(self, sample: Sample) -> Pixels:
        """The picture of a finished sample; raises what the client may see."""
        pixels, seconds = self._single("decoding", lambda: self._stages.decode(sample.latents))
        self._cost.observe_decoding(latent_area(sample), seconds)
        return pixels

    def make(self, requests: Sequence[GenerationRequest], face: Face) -> None:
        """Take copies of one request through their steps together, and decode the first.

        Raises whatever fails, and `EngineFailed` where the picture is not finite. Nothing that is
        kept for the next call is used, so every engine runs.
        """
        self._stages.forget()
        started = perf_counter()
        tokens = self._stages.image_tokens(face)
        samples = [self._stages.sample(request, tokens) for request in requests]
        self._cost.observe_preparation(perf_counter() - started)
        while not samples[0].finished:
            self._call(samples)
        started = perf_counter()
        self._stages.decode(samples[0].latents)
        self._cost.observe_decoding(latent_area(samples[0]), perf_counter() - started)
        self._failures = dict.fromkeys(self._failures, 0)

    def download(self, latents: Tensor) -> NDArray[np.float32]:
        """Latents [C,h,w] on the host, float32."""
        return np.asarray(self._stages.device.download(latents), dtype=np.float32)

    def _call(self, samples: Sequence[Sample]) -> None:
        area, rows = latent_area(samples[0]), sum(len(s.guidance.branches) for s in samples)
        started = perf_counter()
        self._stages.step(samples, wait=True)
        self._cost.observe_call(area, rows, perf_counter() - started)

    def _single(self, stage: str, work: Callable[[], Made]) -> tuple[Made, float]:
        started = perf_counter()
        try:
            made = work()
        except Exception as error:
            self._require_device(error)
            visible = for_client(error)
            if isinstance(visible, EngineFailed):
                self._failures[stage] += 1
                _log.error("The %s of a task failed.", stage, exc_info=True)
            raise visible from None
        self._failures[stage] = 0
        return made, perf_counter() - started

    def _require_device(self, error: Exception) -> None:
        """Raise `EnginesLost` where that is why; a device tells when it is waited for."""
        try:
            if isinstance(error, DeviceLost):
                raise error
            self._stages.device.synchronize()
        except DeviceLost as lost:
            raise EnginesLost(lost.message) from error
        except EngineFailed:
            return


def latent_area(sample: Sample) -> int:
    """Latent pixels of one row of a sample."""
    return sample.latent_shape[1] * sample.latent_shape[2]
