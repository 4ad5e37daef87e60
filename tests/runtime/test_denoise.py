"""The loop over an engine made of plain arithmetic: plans, batches, cancellation, bad output."""

from dataclasses import replace

import numpy as np
import pytest

from fastface_trt.checkpoints import CHECKPOINTS
from fastface_trt.engines import contract
from fastface_trt.engines.device import HostDevice
from fastface_trt.errors import Cancelled, EngineFailed
from fastface_trt.runtime.request import GenerationRequest
from fastface_trt.runtime.sampling import (
    Condition,
    HostGuidance,
    Sample,
    denoise,
    take_step,
)
from fastface_trt.runtime.schedule import make_schedule

SHAPE = (4, 8, 8)


class ArithmeticUNet:
    """A function of every input of its row, and of its request's parameters, like the real one."""

    def __init__(self, request_counts=None):
        self.rows = []
        self.device = HostDevice()
        self.request_counts = request_counts

    def __call__(self, **inputs):
        rows, requests = len(inputs[contract.SAMPLE]), len(inputs[contract.IP_ADAPTER_SCALE])
        self.rows.append((rows, requests))
        owner = np.arange(rows) // (rows // requests)
        signal = (
            inputs[contract.TEXT].mean((1, 2))
            + 2 * inputs[contract.POOLED_TEXT].mean(1)
            + 3 * inputs[contract.IMAGE_TOKENS].mean((1, 2)) * inputs["ip_adapter_scale"][owner, 0]
            + inputs[contract.TIMESTEP] / 1000
            + inputs[contract.MANIPULATION].mean((1, 2))[owner]
        )
        wave = np.sin(inputs[contract.SAMPLE] * (1 + signal[:, None, None, None]))
        return {contract.NOISE_PREDICTION: wave.astype(np.float32)}


def sample_of(request, seed=0):
    rng = np.random.default_rng(seed)
    conditions = {
        branch: Condition(
            *(rng.standard_normal(s).astype(np.float32) for s in ((77, 6), (5,), (4, 6)))
        )
        for branch in ("u", "t", "i", "ti")
    }
    checkpoint = "turbo" if seed % 2 else "hyper"
    schedule = make_schedule(dict(CHECKPOINTS[checkpoint].scheduler), request.steps)
    return Sample(request, schedule, conditions, SHAPE, HostDevice())


def requests():
    base = GenerationRequest("a", seed=5)
    return [
        base.with_preset("am1+dcg"),
        replace(base, seed=6, ip_adapter_scale=0.3),
        base.with_preset("am2+dcg", scope="branch", seed=9),
        replace(base, steps=2).with_preset("dcg", dcg_variant=1),
        base.with_preset("am2"),
        base.with_preset("dcg", dcg_variant=3, guidance_rescale=None),
    ]


def each_alone():
    return [
        denoise(ArithmeticUNet(), [sample_of(request, seed)])[0]
        for seed, request in enumerate(requests())
    ]


@pytest.mark.parametrize("max_rows", [None, 3, 5])
def test_a_batch_gives_what_single_runs_give(max_rows):
    samples = [sample_of(request, seed) for seed, request in enumerate(requests())]
    together = denoise(ArithmeticUNet(), samples, max_rows=max_rows)
    for one, expected in zip(together, each_alone(), strict=True):
        np.testing.assert_allclose(one, expected, atol=1e-6)


def test_exact_plan_equals_the_full_one():
    for request in requests():
        exact = denoise(ArithmeticUNet(), [sample_of(request)])[0]
        full = denoise(ArithmeticUNet(), [sample_of(replace(request, plan="full"))])[0]
        assert np.linalg.norm(exact - full) / np.linalg.norm(full) < 1e-5


def test_lean_plan_differs_a_little():
    request = GenerationRequest("a").with_preset("dcg")
    full = denoise(ArithmeticUNet(), [sample_of(request)])[0]
    lean = denoise(ArithmeticUNet(), [sample_of(replace(request, plan="lean"))])[0]
    assert 0 < np.linalg.norm(lean - full) / np.linalg.norm(full) < 0.5


def test_rows_of_the_calls():
    unet = ArithmeticUNet()
    denoise(unet, [sample_of(requests()[0])])
    assert unet.rows == [(2, 1), (3, 1), (3, 1), (2, 1)]
    assert sum(rows for rows, _ in unet.rows) == requests()[0].unet_samples
    unet = ArithmeticUNet()
    denoise(unet, [sample_of(requests()[2])])  # scope branch: one parameter row per UNet row
    assert unet.rows == [(2, 2), (3, 3), (3, 3), (2, 2)]


def test_calls_hold_as_many_requests_as_the_engine_takes():
    whole, parts = ArithmeticUNet(), ArithmeticUNet(request_counts=(1, 2))
    expected, ours = (
        denoise(unet, [sample_of(requests()[0]) for _ in range(5)]) for unet in (whole, parts)
    )
    np.testing.assert_array_equal(ours, expected)
    assert whole.rows == [(10, 5), (15, 5), (15, 5), (10, 5)]
    assert parts.rows[:3] == [(4, 2), (4, 2), (2, 1)]
    assert len(parts.rows) == 12


def test_cancelling_stops_after_the_step():
    seen = []
    with pytest.raises(Cancelled):
        denoise(
            ArithmeticUNet(),
            [sample_of(requests()[0])],
            on_step=lambda trace: seen.append(trace.step) or trace.step < 1,
        )
    assert seen == [0, 1]


def test_trace_holds_what_the_step_used():
    traces = []
    samples = [sample_of(requests()[0], seed) for seed in range(2)]
    final = denoise(ArithmeticUNet(), samples, on_step=traces.append)
    assert [(t.index, t.step, t.steps) for t in traces] == [
        (index, step, 4) for step in range(4) for index in range(2)
    ]
    traces = [t for t in traces if t.index == 1]
    assert [sorted(t.predictions) for t in traces] == [["i", "ti"]] + [["i", "ti", "u"]] * 2 + [
        ["i", "ti"]
    ]
    np.testing.assert_array_equal(traces[-1].latents, final[1])


def test_output_that_is_not_finite_is_an_error():
    class Broken(ArithmeticUNet):
        def __call__(self, **inputs):
            return {contract.NOISE_PREDICTION: np.full_like(inputs[contract.SAMPLE], np.nan)}

    with pytest.raises(EngineFailed, match="not finite at step 1"):
        denoise(Broken(), [sample_of(requests()[0])])


class LateDevice(HostDevice):
    """Tells of a failure when it is waited for, as a GPU does."""

    def synchronize(self):
        raise EngineFailed("An asynchronous failure.")


def test_a_step_that_fails_leaves_the_samples_as_they_were():
    class HalfBroken(ArithmeticUNet):
        def __call__(self, **inputs):
            outputs = super().__call__(**inputs)
            outputs[contract.NOISE_PREDICTION][-1] = np.nan
            return outputs

    late = ArithmeticUNet()
    late.device = LateDevice()
    for unet, wait in ((HalfBroken(), False), (late, True)):
        samples = [sample_of(requests()[0], seed) for seed in range(3)]
        before = [(s.step, s.latents, s.model_input) for s in samples]
        with pytest.raises(EngineFailed):
            take_step(unet, HostGuidance(), samples, wait=wait)
        for sample, (step, latents, model_input) in zip(samples, before, strict=True):
            assert sample.step == step
            assert sample.latents is latents
            assert sample.model_input is model_input


def test_samples_at_different_steps_share_a_call():
    unet = ArithmeticUNet()
    waiting = [sample_of(request, seed) for seed, request in enumerate(requests())]
    running, mixed = [], 0
    while waiting or any(not sample.finished for sample in running):
        running += waiting[:1]  # one comes in before every call
        del waiting[:1]
        active = [sample for sample in running if not sample.finished]
        group = [sample for sample in active if sample.sharing == active[-1].sharing]
        mixed += len({sample.step for sample in group}) > 1
        take_step(unet, HostGuidance(), group)
    assert mixed > 0
    for sample, alone in zip(running, each_alone(), strict=True):
        np.testing.assert_allclose(sample.latents, alone, atol=1e-6)
