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
    DenoiseReport,
    HostGuidance,
    Job,
    Run,
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


def job(request, seed=0):
    rng = np.random.default_rng(seed)
    conditions = {
        branch: Condition(
            *(rng.standard_normal(s).astype(np.float32) for s in ((77, 6), (5,), (4, 6)))
        )
        for branch in ("u", "t", "i", "ti")
    }
    checkpoint = "turbo" if seed % 2 else "hyper"
    schedule = make_schedule(dict(CHECKPOINTS[checkpoint].scheduler), request.steps)
    return Job.prepare(request, schedule, conditions, SHAPE)


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


@pytest.mark.parametrize("max_rows", [None, 3, 5])
def test_a_batch_gives_what_single_runs_give(max_rows):
    jobs = [job(request, seed) for seed, request in enumerate(requests())]
    together = denoise(ArithmeticUNet(), jobs, max_rows=max_rows)
    for one, expected in zip(jobs, together, strict=True):
        np.testing.assert_allclose(denoise(ArithmeticUNet(), [one])[0], expected, atol=1e-6)


def test_exact_plan_equals_the_full_one():
    for request in requests():
        exact = denoise(ArithmeticUNet(), [job(request)])[0]
        full = denoise(ArithmeticUNet(), [job(replace(request, plan="full"))])[0]
        assert np.linalg.norm(exact - full) / np.linalg.norm(full) < 1e-5


def test_lean_plan_differs_a_little():
    request = GenerationRequest("a").with_preset("dcg")
    full = denoise(ArithmeticUNet(), [job(request)])[0]
    lean = denoise(ArithmeticUNet(), [job(replace(request, plan="lean"))])[0]
    assert 0 < np.linalg.norm(lean - full) / np.linalg.norm(full) < 0.5


def test_rows_of_the_calls():
    report = DenoiseReport()
    denoise(ArithmeticUNet(), [job(requests()[0])], report=report)
    assert report.rows == [2, 3, 3, 2]
    unet = ArithmeticUNet()
    denoise(unet, [job(requests()[2])])  # scope branch: one parameter row per UNet row
    assert unet.rows == [(2, 2), (3, 3), (3, 3), (2, 2)]


def test_calls_hold_as_many_requests_as_the_engine_takes():
    one = job(requests()[0])
    whole, parts = ArithmeticUNet(), ArithmeticUNet(request_counts=(1, 2))
    expected = denoise(whole, [one] * 5)
    np.testing.assert_array_equal(denoise(parts, [one] * 5), expected)
    assert whole.rows == [(10, 5), (15, 5), (15, 5), (10, 5)]
    assert parts.rows[:3] == [(4, 2), (4, 2), (2, 1)]
    assert len(parts.rows) == 12


def test_cancelling_stops_after_the_step():
    seen = []
    with pytest.raises(Cancelled):
        denoise(
            ArithmeticUNet(),
            [job(requests()[0])],
            on_step=lambda trace: seen.append(trace.step) or trace.step < 1,
        )
    assert seen == [0, 1]


def test_trace_holds_what_the_step_used():
    traces = []
    one = job(requests()[0])
    final = denoise(ArithmeticUNet(), [one], on_step=lambda trace: traces.append(trace))[0]
    assert [sorted(t.predictions) for t in traces] == [["i", "ti"]] + [["i", "ti", "u"]] * 2 + [
        ["i", "ti"]
    ]
    np.testing.assert_array_equal(traces[-1].latents, final)


def test_output_that_is_not_finite_is_an_error():
    class Broken(ArithmeticUNet):
        def __call__(self, **inputs):
            return {contract.NOISE_PREDICTION: np.full_like(inputs[contract.SAMPLE], np.nan)}

    with pytest.raises(EngineFailed, match="not finite at step 1"):
        denoise(Broken(), [job(requests()[0])])


def test_runs_at_different_steps_share_a_call():
    jobs = [job(request, seed) for seed, request in enumerate(requests())]
    expected = [denoise(ArithmeticUNet(), [one])[0] for one in jobs]
    unet = ArithmeticUNet()
    waiting = [Run(one, HostDevice()) for one in jobs]
    running, mixed = [], 0
    while waiting or any(not run.finished for run in running):
        running += waiting[:1]  # one comes in before every call
        del waiting[:1]
        active = [run for run in running if not run.finished]
        group = [run for run in active if run.sharing == active[-1].sharing]
        mixed += len({run.step for run in group}) > 1
        take_step(unet, HostGuidance(), group)
    assert mixed > 0
    for run, alone in zip(running, expected, strict=True):
        np.testing.assert_allclose(run.latents, alone, atol=1e-6)
