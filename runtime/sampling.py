"""Sampling: from noise to latents over a UNet engine, which could be any backend's.

Read top to bottom it is the method. A `Sample` is one image on its way; `denoise` takes samples to
the end of their schedules; a step calls the UNet once for samples that can share a call, guides its
prediction (Eq. 3 to 5) and moves every sample along its schedule: x' = a x + b ε + c z, and k x' is
what the UNet is given next.

Nothing here computes on a GPU's tensors: the UNet is one engine, guidance and the scheduler's line
are another (`EngineGuidance`). All that a sample needs is on the device before its first UNet call
but for a few numbers per step, and nothing comes back. On the host `HostGuidance` is numpy; tests
hold the two to each other and to float64.

Shape legend: S samples of one UNet call, G branches per sample, B = S·G rows (samples-major),
C latent channels, h × w latent size, T image tokens, N text tokens, D their width, P pooled width.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from fastface_trt.engines import contract
from fastface_trt.engines.device import Device, HostDevice, Tensor
from fastface_trt.engines.engine import Engine
from fastface_trt.errors import Cancelled, EngineFailed, InvalidRequest
from fastface_trt.runtime.guidance import GuidanceStep, combine
from fastface_trt.runtime.request import GenerationRequest
from fastface_trt.runtime.schedule import Schedule, Step
from fastface_trt.runtime.timeline import NO_TIMELINE, Timeline

Latents = NDArray[np.float32]
NoiseSource = Callable[[int, tuple[int, ...]], Latents]
"""(stream, shape) to standard noise."""

INITIAL_LATENTS = 0
"""The stream of the noise that a sample begins with; stream n + 1 is the fresh noise of step n."""

_NOT_FINITE = "An fp16 engine may overflow here: try --precision fp32, or milder parameters."


def denoise(
    unet: Engine,
    samples: Sequence["Sample"],
    *,
    guidance: "Guidance | None" = None,
    on_step: "OnStep | None" = None,
    max_rows: int | None = None,
    timeline: Timeline = NO_TIMELINE,
) -> list[Tensor]:
    """Take every sample to the end of its schedule; returns their latents, float32 [C,h,w] each.

    `guidance` runs where the UNet does: None is numpy, for a UNet on the host. Samples with equally
    many branches and the same size share UNet calls of at most `max_rows` rows, and of as many
    samples as the UNet's engine takes, whatever their settings and even at different steps; results
    equal single runs. Raises `Cancelled` when `on_step` returns False, and on the host
    `EngineFailed` when the UNet's output is not finite; elsewhere `require_finite` finds that.
    """
    guidance = guidance or HostGuidance()
    for index, sample in enumerate(samples):
        sample.index = index
    while active := [sample for sample in samples if not sample.finished]:
        for batch in batches(active, max_rows, unet.request_counts):
            take_step(unet, guidance, batch, on_step=on_step, timeline=timeline)
    return [sample.latents for sample in samples]


def take_step(
    unet: Engine,
    guidance: "Guidance",
    batch: Sequence["Sample"],
    *,
    on_step: "OnStep | None" = None,
    wait: bool = False,
    timeline: Timeline = NO_TIMELINE,
) -> None:
    """Take samples that agree in `Sample.sharing` one step further, in one UNet call.

    Raises what the UNet and `guidance` raise, the samples being as they were before; with `wait`
    that holds for failures too that a device only tells of when it is waited for. Raises
    `Cancelled` when `on_step` returns False, after which they must not go on.
    """
    device, branches = unet.device, len(batch[0].guidance.branches)
    where = {"step": min(sample.step for sample in batch)}
    with timeline.span("unet", device, **where, branches=branches, rows=branches * len(batch)):
        prediction_BChw = unet(**unet_inputs(batch, device))[contract.NOISE_PREDICTION]
    with timeline.span("guidance", device, **where):
        results = guidance(batch, prediction_BChw)
    if wait:
        device.synchronize()
    traces = [] if on_step is None else _traces(batch, device, prediction_BChw, results)
    for sample, result in zip(batch, results, strict=True):
        sample.advance(result)
    for trace in traces:
        if on_step is not None and on_step(trace) is False:
            raise Cancelled(f"The run was cancelled after step {trace.step + 1}.")


def unet_inputs(batch: Sequence["Sample"], device: Device) -> dict[str, Tensor]:
    """What the UNet is given for the next step of a batch; `engines.contract` has the shapes.

    What is the same for a whole sample is stacked on the device; the numbers of a step are numpy
    arrays of a few bytes per row, which the engine uploads.
    """
    rows = [(sample, sample.conditions[b]) for sample in batch for b in sample.guidance.branches]
    # With one parameter row per UNet row, the graph takes its statistics per branch.
    owners = batch if batch[0].shares_statistics else [sample for sample, _ in rows]
    inputs: dict[str, Tensor] = {
        contract.SAMPLE: device.stack([sample.model_input for sample, _ in rows]),
        contract.TIMESTEP: _scalars([sample.scheduled.timestep for sample, _ in rows]),
        contract.TEXT: device.stack([condition.text for _, condition in rows]),
        contract.POOLED_TEXT: device.stack([condition.pooled for _, condition in rows]),
        contract.TIME_IDS: np.stack([sample.time_ids for sample, _ in rows]),
        contract.IMAGE_TOKENS: device.stack([condition.image_tokens for _, condition in rows]),
        contract.IP_ADAPTER_SCALE: np.stack([sample.request.ip_scales() for sample in owners]),
        contract.MANIPULATION: np.stack([sample.manipulation_rows() for sample in owners]),
    }
    masks = [condition.token_mask for _, condition in rows if condition.token_mask is not None]
    return inputs | ({contract.TOKEN_MASK: np.stack(masks)} if masks else {})


def batches(
    samples: Sequence["Sample"], max_rows: int | None, counts: Sequence[int] | None
) -> list[list["Sample"]]:
    """Split unfinished samples into batches that can share one UNet call each, in their order.

    `counts` are the numbers of samples that the UNet's engine takes, None for any.
    """
    groups: dict[Hashable, list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[sample.sharing].append(sample)
    split = []
    for members in groups.values():
        while members:
            size = batch_size(members[0], len(members), max_rows, counts)
            split.append(members[:size])
            members = members[size:]
    return split


def batch_size(
    sample: "Sample", waiting: int, max_rows: int | None, counts: Sequence[int] | None
) -> int:
    """How many of `waiting` samples that can share a call the next one takes; at least 1."""
    branches = len(sample.guidance.branches)
    size = min(waiting, max(1, max_rows // branches) if max_rows else waiting)
    # Where every row has its own statistics, a row is a request to the engine: no size helps.
    if counts is None or not sample.shares_statistics:
        return size
    return max((count for count in counts if count <= size), default=size)


@dataclass(frozen=True, slots=True)
class Condition:
    """What the UNet is told in one branch: text [N,D], pooled text [P], image tokens [T,D].

    Tensors of the UNet's device, and where not all of the tokens need be there, their mask [T].
    """

    text: Tensor
    pooled: Tensor
    image_tokens: Tensor
    token_mask: Latents | None = None


class Sample:
    """One image on its way: its request, what the UNet is told, and how far its latents are.

    `conditions` are by branch, `guidance_steps` the branch plan, `latent_shape` is (C, h, w).
    `step` counts the steps that are done; `latents` are x, `model_input` is k x, what the UNet is
    given next, and `noise` holds z per step, None where the schedule adds none. `index` is its
    place among the samples of `denoise`.
    """

    __slots__ = (
        "conditions",
        "guidance_steps",
        "index",
        "latent_shape",
        "latents",
        "model_input",
        "noise",
        "request",
        "schedule",
        "step",
        "time_ids",
    )

    def __init__(
        self,
        request: GenerationRequest,
        schedule: Schedule,
        conditions: Mapping[str, Condition],
        latent_shape: tuple[int, int, int],
        device: Device,
        noise: NoiseSource | None = None,
    ) -> None:
        """Draw its noise from `noise`, by default that of the request's seed, onto `device`."""
        draw = noise or noise_of(request)
        self.request, self.schedule, self.conditions = request, schedule, conditions
        self.guidance_steps = request.guidance_steps()
        self.latent_shape = latent_shape
        size = (request.height, request.width)
        self.time_ids = np.array([*size, 0, 0, *size], dtype=np.float32)
        self.index = 0
        self.step = 0
        latents = np.float32(schedule.initial_scale) * draw(INITIAL_LATENTS, latent_shape)
        self.latents: Tensor = device.upload(latents)
        self.model_input: Tensor = device.upload(
            np.float32(schedule.steps[0].input_scale) * latents
        )
        self.noise: list[Tensor | None] = [
            device.upload(draw(step + 1, latent_shape)) if row.noise != 0 else None
            for step, row in enumerate(schedule.steps)
        ]

    @property
    def finished(self) -> bool:
        """Whether every step is done; the rest must not be asked for then."""
        return self.step == len(self.schedule)

    @property
    def scheduled(self) -> Step:
        """The schedule's coefficients for the next step."""
        return self.schedule.steps[self.step]

    @property
    def following_input_scale(self) -> float:
        """k of the step after the next; 1 after the last, where nothing reads it."""
        following = self.schedule.steps[self.step + 1 : self.step + 2]
        return following[0].input_scale if following else 1.0

    @property
    def guidance(self) -> GuidanceStep:
        """Guidance of the next step; its branches are the rows that the sample needs."""
        return self.guidance_steps[self.step]

    def manipulation_rows(self) -> NDArray[np.float32]:
        """Parameters of attention manipulation in the next step, float32 [parts, columns]."""
        manipulation, steps = self.request.manipulation, len(self.schedule)
        mask = next(iter(self.conditions.values())).token_mask
        if mask is None or not self.request.strength_for_tokens:
            return manipulation.rows(self.step, steps)
        return manipulation.rows(self.step, steps, int((mask == 0).sum()))

    @property
    def shares_statistics(self) -> bool:
        """Whether the graph may take one parameter row for all branches of this sample."""
        return shares_statistics(self.request)

    @property
    def text_positions(self) -> int:
        """Positions of text, the same in every branch; padding others would change pictures."""
        return int(next(iter(self.conditions.values())).text.shape[0])

    @property
    def sharing(self) -> Hashable:
        """Samples that agree in this may share their next UNet call, at whatever step each is."""
        branches = len(self.guidance.branches)
        return branches, self.latent_shape, self.shares_statistics, self.text_positions

    def advance(self, result: "StepResult") -> None:
        """One step is done: x' and k x' take the place of x and k x."""
        self.latents, self.model_input = result.latents, result.model_input
        self.step += 1


def shares_statistics(request: GenerationRequest) -> bool:
    """Whether the graph may take one parameter row for all branches of this request."""
    return not (request.manipulation.uses_softmask and request.scope == "branch")


class StepResult(NamedTuple):
    """What a step makes of a sample: the guided ε, x', and k x' for the next UNet call.

    Tensors float32 [C,h,w] that the caller owns.
    """

    guided: Tensor
    latents: Tensor
    model_input: Tensor


class Guidance(Protocol):
    """Guidance (Eq. 3 to 5), the scheduler's step x' = a x + b ε + c z, and the scaling by k."""

    def __call__(self, batch: Sequence[Sample], prediction_BChw: Tensor) -> list[StepResult]:
        """The next step of samples with equally many branches, which stay as they are."""
        ...


class HostGuidance:
    """Guidance in numpy; raises `EngineFailed` when a prediction is not finite."""

    def __call__(self, batch: Sequence[Sample], prediction_BChw: Tensor) -> list[StepResult]:
        """The next step of samples with equally many branches, which stay as they are."""
        host = HostDevice()
        prediction_BChw = host.download(prediction_BChw).astype(np.float32, copy=False)
        if not np.isfinite(prediction_BChw).all():
            step = min(sample.step for sample in batch) + 1
            raise EngineFailed(
                f"The UNet returned values that are not finite at step {step}.", _NOT_FINITE
            )
        rows = iter(prediction_BChw)
        results = []
        for sample in batch:
            plan, row, z = sample.guidance, sample.scheduled, sample.noise[sample.step]
            epsilon = combine({branch: next(rows) for branch in plan.branches}, plan)
            latents = np.float32(row.latents) * host.download(sample.latents)
            latents = latents + np.float32(row.prediction) * epsilon
            if z is not None:
                latents += np.float32(row.noise) * host.download(z)
            model_input = np.float32(sample.following_input_scale) * latents
            results.append(StepResult(epsilon, latents, model_input))
        return results


class EngineGuidance:
    """Guidance by an engine of the module `guidance_step`, on the engine's device.

    It looks at no value, so it cannot tell whether a prediction is finite: check the last latents.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __call__(self, batch: Sequence[Sample], prediction_BChw: Tensor) -> list[StepResult]:
        """The next step of samples with equally many branches, which stay as they are."""
        device = self._engine.device
        plans, rows = [s.guidance for s in batch], [s.scheduled for s in batch]
        noise = [s.noise[s.step] for s in batch]
        outputs = self._engine(
            **{
                contract.NOISE_PREDICTION: prediction_BChw,
                contract.LATENTS: device.stack([s.latents for s in batch]),
                contract.NOISE: device.stack(
                    [
                        device.zeros(s.latent_shape, "float32") if z is None else z
                        for s, z in zip(batch, noise, strict=True)
                    ]
                ),
                contract.COEFFICIENTS: _scalars(
                    [[plan.coefficients[branch] for branch in plan.branches] for plan in plans]
                ),
                contract.SPREAD: _scalars([_spread_weights(plan) for plan in plans]),
                contract.RESCALE: _scalars([plan.rescale or 0.0 for plan in plans]),
                contract.STEP: _scalars([[r.latents, r.prediction, r.noise] for r in rows]),
                contract.INPUT_SCALE: _scalars([s.following_input_scale for s in batch]),
            }
        )
        # Copies, because the engine's next call overwrites what it returned.
        copies = (
            device.copy(outputs[name])
            for name in (contract.GUIDED, contract.NEXT_LATENTS, contract.SAMPLE)
        )
        return [StepResult(*tensors) for tensors in zip(*copies, strict=True)]


def _spread_weights(plan: GuidanceStep) -> list[float]:
    """Weights of the branches' standard deviations in σ̄ of Eq. 4."""
    share = 1 / max(len(plan.spread_branches), 1)
    return [share if branch in plan.spread_branches else 0.0 for branch in plan.branches]


def _scalars(values: Sequence[Any]) -> Latents:
    return np.array(values, dtype=np.float32)


def require_finite(device: Device, latents: Tensor) -> None:
    """Raise `EngineFailed` unless all final latents [C,h,w] are finite; downloads them.

    For the end of a sample: latents that were not finite once stay so to the last step.
    """
    if not np.isfinite(device.download(latents)).all():
        raise EngineFailed("The UNet returned values that are not finite.", _NOT_FINITE)


def noise_of(request: GenerationRequest) -> NoiseSource:
    """The noise that a request's seed stands for."""
    return partial(standard_noise, request.seed, request.image_index)


def standard_noise(seed: int, image_index: int, stream: int, shape: tuple[int, ...]) -> Latents:
    """Standard normal numbers, float32 of `shape`, for a seed in 0…2⁶⁴−1: the same everywhere.

    They are a function of the three. The uniform bits are those of Philox-4x64-10 (Salmon et al.
    2011) with the 128-bit key `seed + 2⁶⁴ · image_index` and the counter starting at
    `stream · 2⁶⁴`; numpy guarantees the bit stream of its Philox. Two 64-bit
    words make two normal numbers by Box and Muller: with u₁ = (⌊word₁/2¹¹⌋ + 1)/2⁵³ and
    u₂ = ⌊word₂/2¹¹⌋/2⁵³, √(−2 ln u₁) · (cos 2πu₂, sin 2πu₂), in float64, rounded to float32.
    """
    if not 0 <= seed < 2**64:
        raise InvalidRequest(f"Seed {seed} is out of range.", "Use 0 to 2^64 - 1.")
    bits = np.random.Philox(key=seed + (image_index << 64), counter=stream << 64)
    pairs = (prod(shape) + 1) // 2
    words = bits.random_raw(2 * pairs).reshape(pairs, 2) >> np.uint64(11)
    radius = np.sqrt(-2 * np.log((words[:, 0] + 1.0) * 2.0**-53))
    angle = 2 * np.pi * (words[:, 1] * 2.0**-53)
    normal = np.stack((radius * np.cos(angle), radius * np.sin(angle)), axis=1)
    return normal.reshape(-1)[: prod(shape)].reshape(shape).astype(np.float32)


def _traces(
    batch: Sequence[Sample],
    device: Device,
    prediction_BChw: Tensor,
    results: Sequence[StepResult],
) -> list["StepTrace"]:
    # Copies, because the next UNet call overwrites its output and a trace may be kept.
    rows = iter(list(device.copy(prediction_BChw)))
    return [
        StepTrace(sample, device, {b: next(rows) for b in sample.guidance.branches}, result)
        for sample, result in zip(batch, results, strict=True)
    ]


class StepTrace:
    """What happened to one sample in one step; arrays are float32 [C,h,w].

    `index` is the sample's, `step` counts from 0 to `steps` − 1, `timestep` is what the UNet was
    told of it. The arrays cross from a GPU when
    they are read, each time: a callback that reads none of them costs no copy to the host.
    """

    __slots__ = (
        "_device",
        "_model_input",
        "_predictions",
        "_result",
        "index",
        "step",
        "steps",
        "timestep",
    )

    def __init__(
        self,
        sample: Sample,
        device: Device,
        predictions: Mapping[str, Tensor],
        result: StepResult,
    ) -> None:
        """Of the sample's next step, before the sample advances."""
        self.index, self.step, self.steps = sample.index, sample.step, len(sample.schedule)
        self.timestep = sample.scheduled.timestep
        self._device, self._model_input = device, sample.model_input
        self._predictions, self._result = predictions, result

    @property
    def model_input(self) -> Latents:
        """What the UNet was given, k x."""
        return self._read(self._model_input)

    @property
    def predictions(self) -> dict[str, Latents]:
        """The UNet's noise prediction by branch."""
        return {branch: self._read(tensor) for branch, tensor in self._predictions.items()}

    @property
    def guided(self) -> Latents:
        """The guided prediction ε of Eq. 5."""
        return self._read(self._result.guided)

    @property
    def latents(self) -> Latents:
        """The latents after the step, x'."""
        return self._read(self._result.latents)

    def _read(self, tensor: Tensor) -> Latents:
        return self._device.download(tensor).astype(np.float32, copy=False)


OnStep = Callable[[StepTrace], bool | None]
"""Called after each step of each sample; returning False cancels the run."""

OnStepEnd = Callable[[Any, int, float, dict[str, Any]], Any]
"""diffusers' `callback_on_step_end`: (pipe, step, timestep, {"latents": float32 [N,C,h,w]})."""


def on_step_end(callback: OnStepEnd, pipe: object, samples: int) -> OnStep:
    """`callback` as an `OnStep` of samples with equally many steps: called once per step of all.

    It may return False to cancel. Its latents are for reading: others in what it returns are an
    `InvalidRequest`.
    """
    traces: dict[int, dict[int, StepTrace]] = defaultdict(dict)

    def on_step(trace: StepTrace) -> bool | None:
        traces[trace.step][trace.index] = trace
        if len(traces[trace.step]) < samples:
            return None
        done = traces.pop(trace.step)
        latents = np.stack([done[index].latents for index in range(samples)])
        latents.flags.writeable = False
        answer = callback(pipe, trace.step, trace.timestep, {"latents": latents})
        if isinstance(answer, Mapping) and answer.get("latents", latents) is not latents:
            raise InvalidRequest(
                "callback_on_step_end returned other latents, and they cannot be changed here.",
                "Return nothing, or what it was given; False cancels.",
            )
        return False if answer is False else None

    return on_step
