"""The pictures that a batcher makes before it takes tasks, and when it doubts its engines."""

import logging

import numpy as np

from fastface_trt.errors import OutOfMemory
from fastface_trt.pipeline import FastFace
from fastface_trt.runtime.face import CROP_SIZE, EMBEDDING_SIZE, Face
from fastface_trt.runtime.portrait import PORTRAIT_SIZE
from fastface_trt.runtime.request import GenerationRequest
from fastface_trt.serving.batching.cost import CostModel
from fastface_trt.serving.batching.engine_work import EngineWork
from fastface_trt.serving.batching.policy import Policy

_PROMPT = "photo; a person in a garden"
_PLAIN, _GUIDED = "plain", "am1+dcg"
"""Between them their steps have one, two and three branches."""

_log = logging.getLogger(__name__)


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


def warm_up(fastface: FastFace, work: EngineWork, policy: Policy, cost: CostModel) -> Policy:
    """Make pictures with every number of branches, alone and in the fullest call.

    The fullest call claims its memory now: where there is too little, the policy that is returned
    has fewer rows, so that this shows before the first client and not under load. Everything is
    made twice, since a first call pays for allocations, and the cost model has the second times.
    Raises what fails.
    """
    plain, guided = (_request(fastface, preset) for preset in (_PLAIN, _GUIDED))
    for request in (plain, guided):
        work.make([request], blank_face())
    policy = _fitting(guided, work, policy)
    cost.clear()
    for requests in ([plain], [guided], [guided] * _most(guided, policy)):
        work.make(requests, blank_face())
    return policy


def self_test(fastface: FastFace, work: EngineWork) -> None:
    """One guided picture through every engine; raises what fails."""
    work.make([_request(fastface, _GUIDED)], blank_face())


def _request(fastface: FastFace, preset: str) -> GenerationRequest:
    request = fastface.request(_PROMPT, preset=preset)
    return request.for_adapter(fastface.manifest.adapter_kind)


def _rows(request: GenerationRequest) -> int:
    return max(len(step.branches) for step in request.guidance_steps())


def _most(request: GenerationRequest, policy: Policy) -> int:
    return policy.size(_rows(request), policy.max_running)


def _fitting(request: GenerationRequest, work: EngineWork, policy: Policy) -> Policy:
    """The policy with as many rows as there is memory for."""
    while (count := _most(request, policy)) > 1:
        try:
            work.make([request] * count, blank_face())
        except OutOfMemory as error:
            policy = policy.with_fewer_rows(count * _rows(request))
            _log.warning("%s UNet calls have %d rows at most now.", error, policy.max_rows)
        else:
            break
    return policy
