"""This project's runtime as a peer: with and without the branch plan, features fresh or cached."""

from dataclasses import replace
from typing import Literal

import numpy as np
from PIL import Image

from benchmarks.peers.work import Made, Work
from fastface_trt import FastFace
from fastface_trt.runtime.sampling import StepTrace

Features = Literal["fresh", "cached"]


class FastFacePeer:
    """`FastFace` with plan `full` or `exact`; `fresh` encodes text and face for every picture."""

    def __init__(
        self, fastface: FastFace, plan: Literal["full", "exact"], features: Features
    ) -> None:
        self._fastface = fastface
        self._plan: Literal["full", "exact"] = plan
        self._features = features
        self.name = f"fastface-trt-{plan}-{features}"
        branches = "branch plan" if plan == "exact" else "every branch"
        self.label = f"FastFace-TRT, {branches}, {features} text and face features"

    def work(self, work: Work) -> Work:
        return work

    def unet_samples(self, work: Work) -> int:
        return replace(work.request, plan=self._plan).unet_samples

    def prepare(self, work: Work) -> float | None:
        return None

    def before(self) -> None:
        if self._features == "fresh":
            self._fastface.forget()

    def picture(self, work: Work) -> Image.Image:
        request = replace(work.request, plan=self._plan)
        return self._fastface.generate([request], [work.face]).images[0]

    def made(self, work: Work) -> Made:
        kept: list[StepTrace] = []
        request = replace(work.request, plan=self._plan)
        result = self._fastface.generate([request], [work.face], on_step=kept.append)
        return Made(result.images[0], np.asarray(kept[-1].latents))
