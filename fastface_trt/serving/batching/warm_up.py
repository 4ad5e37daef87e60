"""The pictures that a batcher makes before it takes tasks, and when it doubts its engines."""

from collections.abc import Sequence

import numpy as np

from fastface_trt.pipeline import FastFace
from fastface_trt.runtime.face import CROP_SIZE, EMBEDDING_SIZE, Face
from fastface_trt.runtime.portrait import PORTRAIT_SIZE
from fastface_trt.runtime.request import GenerationRequest
from fastface_trt.serving.batching.cost import CostModel
from fastface_trt.serving.batching.engine_work import EngineWork
from fastface_trt.serving.batching.policy import Policy

_PROMPT = "photo; a person in a garden"
_PRESETS = ("plain", "am1+dcg")
"""Between them their steps have one, two and three branches."""


def blank_face(seed: int = 0) -> Face:
    """A face of nobody: a random direction and grey pixels."""
    generator = np.random.default_rng(seed)
    direction = generator.standard_normal(EMBEDDING_SIZE)
    return Face(
        embedding=(direction / np.linalg.norm(direction)).astype(np.float32),
        embedding_norm=20.0,
        crop_bgr=np.full((CROP_SIZE, CROP_SIZE, 3), 127, np.uint8),
        box=(0.0, 0.0, float(CROP_SIZE), float(CROP_SIZE)),
        score=1.0,
        index=0,
        count=1,
        detector_size=0,
        portrait_bgr=np.full((PORTRAIT_SIZE, PORTRAIT_SIZE, 3), 127, np.uint8),
    )


def warm_up(fastface: FastFace, work: EngineWork, policy: Policy, cost: CostModel) -> None:
    """Make pictures with every number of branches, alone and in pairs, with opened engines.

    Raises what fails. The cost model has numbers for one and, where the engines take them, two
    requests per call then; everything is made twice, since a first call pays for allocations.
    """
    for measured in (False, True):
        if measured:
            cost.clear()
        for preset in _PRESETS:
            for requests in _alone_and_paired(fastface.request(_PROMPT, preset=preset), policy):
                work.make(requests, blank_face())


def self_test(fastface: FastFace, work: EngineWork) -> None:
    """One guided picture through every engine; raises what fails."""
    work.make([fastface.request(_PROMPT, preset="am1+dcg")], blank_face())


def _alone_and_paired(
    request: GenerationRequest, policy: Policy
) -> Sequence[Sequence[GenerationRequest]]:
    most = max(len(step.branches) for step in request.guidance_steps())
    fits_rows = policy.max_rows is None or policy.max_rows >= 2 * most
    fits_engine = policy.request_counts is None or 2 in policy.request_counts
    paired = fits_rows and fits_engine and policy.max_running > 1
    return [[request], [request, request]] if paired else [[request]]
