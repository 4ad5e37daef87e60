"""The guidance step's graph against numpy's arithmetic and against float64."""

from dataclasses import replace

import numpy as np
import onnx
import pytest

from fastface_trt.engines import contract
from fastface_trt.engines.backends import builder_for
from fastface_trt.engines.cache import EngineCache
from fastface_trt.engines.device import HostDevice
from fastface_trt.errors import EngineFailed
from fastface_trt.export.guidance_step import write_guidance_step
from fastface_trt.runtime.request import GenerationRequest
from fastface_trt.runtime.sampling import EngineGuidance, HostGuidance, Sample, require_finite
from fastface_trt.runtime.schedule import Schedule, Step

SHAPE = (4, 8, 16)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guidance")
    return folder, write_guidance_step(
        folder, channels=SHAPE[0], latent_size=SHAPE[1:], fixed_size=False
    )


@pytest.fixture(scope="module")
def engine(written):
    folder, spec = written
    with EngineCache().open(spec, folder, builder_for("onnxruntime", threads=1)) as opened:
        yield opened


def samples(seed=0, **changes):
    """Three branches each, and everything else different; latents and noise are of `seed`."""
    schedules = [
        Schedule((Step(999, 1, 1.1, -0.4, 0.0), Step(499, 0.7, 0.9, -0.3, 0.0)), 1.0),
        Schedule((Step(999, 0.3, 1.0, -2.5, 0.6), Step(499, 0.2, 1.0, -1.5, 0.0)), 14.0),
        Schedule((Step(749, 1, 0.2, 0.1, 0.0),), 1.0),
        Schedule((Step(749, 1, 0.2, 0.1, 1.3),), 1.0),
    ]
    base = GenerationRequest("a", steps=2, plan="full")
    requests = [
        replace(base, alpha=1.5, beta=3.0, guidance_rescale=0.75),
        replace(base, alpha=0.0, beta=2.0, guidance_rescale=1.0, dcg_variant=1),
        replace(base, steps=1, alpha=1.5, beta=3.0, dcg_variant=3),
        replace(base, steps=1, guidance_rescale=0.0),
    ]
    return [
        Sample(replace(request, seed=seed + index, **changes), schedule, {}, SHAPE, HostDevice())
        for index, (request, schedule) in enumerate(zip(requests, schedules, strict=True))
    ]


def predicted(batch, seed=0, offset=0.0):
    rng = np.random.default_rng(seed)
    spread = rng.uniform(0.5, 2.0, (3 * len(batch), 1, 1, 1))
    return (offset + spread * rng.standard_normal((3 * len(batch), *SHAPE))).astype("f4")


def float64_reference(batch, prediction):
    """Spec section 2 and x' = a x + b ε + c z, written out: (ε, x', k x') of each sample."""
    results = []
    rows = iter(prediction.astype(np.float64))
    for sample in batch:
        x, z = sample.latents, sample.noise[0]
        alpha, beta = (getattr(sample.request, name) for name in ("alpha", "beta"))
        first, second, third = next(rows), next(rows), next(rows)  # u, then the variant's two
        e = {
            1: first + alpha * (second - first) + beta * (third - second),
            2: first + alpha * (second - first) + beta * (third - second),
            3: first + alpha * (second - first) + beta * (third - first),
        }[sample.request.dcg_variant]
        phi = sample.request.guidance_rescale
        if phi is not None:
            mean = (second.std(ddof=1) + third.std(ddof=1)) / 2
            e = e * (phi * mean / e.std(ddof=1) + 1 - phi)
        row = sample.schedule.steps[0]
        new = row.latents * x.astype(np.float64) + row.prediction * e
        new = new if z is None else new + row.noise * z
        k = sample.schedule.steps[1].input_scale if len(sample.schedule) > 1 else 1.0
        results.append((e, new, k * new))
    return results


@pytest.mark.parametrize("offset", [0.0, 100.0])  # where a one-pass variance cancels
def test_both_guidances_equal_float64(engine, offset):
    batch = samples()
    prediction = predicted(batch, offset=offset)
    expected = float64_reference(batch, prediction)
    tolerance = 2e-6 * (1 + offset)
    for guidance in (HostGuidance(), EngineGuidance(engine)):
        ours = guidance(batch, prediction)
        for mine, theirs in zip(ours, expected, strict=True):
            np.testing.assert_allclose(np.stack(mine), np.stack(theirs), rtol=3e-6, atol=tolerance)


def test_engine_and_host_agree_on_every_branch_count(engine):
    for plan, (alpha, beta, rescale) in {
        1: (1.0, 1.0, None),
        2: (1.0, 1.0, 0.75),
        3: (1.5, 3.0, 0.75),
    }.items():
        batch = samples(
            plan, alpha=alpha, beta=beta, guidance_rescale=rescale, dcg_variant=2, plan="exact"
        )
        batch = batch[:2]
        assert [len(sample.guidance.branches) for sample in batch] == [plan] * 2
        prediction = predicted(batch, seed=plan)[: plan * len(batch)]
        host, ours = (
            guide(batch, prediction) for guide in (HostGuidance(), EngineGuidance(engine))
        )
        np.testing.assert_allclose(ours, host, rtol=2e-6, atol=2e-6)


def test_a_flat_prediction_is_left_alone(engine):
    batch = samples()[:1]
    prediction = np.full((3, *SHAPE), 0.25, np.float32)
    for guidance in (HostGuidance(), EngineGuidance(engine)):
        (result,) = guidance(batch, prediction)
        np.testing.assert_allclose(result.guided, 0.25)


def test_what_is_not_finite_reaches_the_last_latents(engine):
    batch = samples()[:2]
    prediction = predicted(batch)
    prediction[4, 1, 2, 3] = np.nan
    fine, bad = EngineGuidance(engine)(batch, prediction)
    require_finite(HostDevice(), fine.latents)
    with pytest.raises(EngineFailed, match="not finite"):
        require_finite(HostDevice(), bad.latents)


def test_the_tensorrt_parser_takes_it_and_no_product_may_run_in_tf32(written):
    trt = pytest.importorskip("tensorrt_rtx")
    folder, spec = written
    path = folder / spec.files[0].path
    assert not {"MatMul", "Gemm", "Einsum"} & {n.op_type for n in onnx.load(path).graph.node}
    logger = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(logger).create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(path)), parser.get_error(0)


def test_a_fixed_size_is_written_out(tmp_path):
    spec = write_guidance_step(tmp_path, channels=4, latent_size=(8, 16), fixed_size=True)
    shapes = {tensor.name: tensor.shape for tensor in spec.inputs}
    assert shapes[contract.NOISE_PREDICTION] == ("batch", 4, 8, 16)
    assert shapes[contract.COEFFICIENTS] == ("requests", "branches")
