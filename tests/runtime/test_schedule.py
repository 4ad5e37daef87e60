"""The tables are diffusers' schedulers: one line of arithmetic per step gives what they give."""

import numpy as np
import pytest
import torch

from fastface_trt.checkpoints import CHECKPOINTS
from fastface_trt.errors import InvalidRequest, UnknownName
from fastface_trt.runtime.schedule import make_schedule, with_network_of

diffusers = pytest.importorskip("diffusers")


class DoublesForFloats:
    """torch, in which float32 is float64: diffusers' Euler steps round x to float32 otherwise,
    which at σ = 4096 leaves five digits of it."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@pytest.fixture
def doubles(monkeypatch):
    for name in ("euler_discrete", "euler_ancestral_discrete", "edm_euler"):
        module = __import__(f"diffusers.schedulers.scheduling_{name}", fromlist=["torch"])
        monkeypatch.setattr(module, "torch", DoublesForFloats())


def run_diffusers(config, count, x, epsilons):
    """Every (timestep, scaled input, latents) of a diffusers run in float64, with fresh noise z."""
    arguments = {k: v for k, v in config.items() if k != "class"}
    scheduler = getattr(diffusers, config["class"])(**arguments)
    scheduler.set_timesteps(count)
    if isinstance(getattr(scheduler, "sigmas", None), torch.Tensor):
        scheduler.sigmas = scheduler.sigmas.double()
    x = x * float(scheduler.init_noise_sigma)
    for step, t in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(x, t)
        stochastic = config["class"] not in ("DDIMScheduler", "EDMEulerScheduler")
        extra = {"generator": torch.Generator().manual_seed(step)} if stochastic else {}
        x = scheduler.step(epsilons[step], t, x, **extra).prev_sample.double()
        yield float(t), scaled, x


def noise_of_step(step, shape, dtype):
    return torch.randn(shape, generator=torch.Generator().manual_seed(step), dtype=dtype)


def check(config, count, tolerance=1e-6):
    schedule = make_schedule(config, count)
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(1, 4, 16, 16, generator=generator, dtype=torch.float64)
    epsilons = torch.randn(count, 1, 4, 16, 16, generator=generator, dtype=torch.float64)
    ours = x * schedule.initial_scale
    for step, (t, scaled, theirs) in enumerate(run_diffusers(config, count, x, epsilons)):
        row = schedule.steps[step]
        assert t == pytest.approx(row.timestep, abs=1e-6)
        assert relative(row.input_scale * ours, scaled) < 1e-6
        # Noise is drawn in the prediction's dtype.
        z = noise_of_step(step, x.shape, torch.float64)
        ours = row.latents * ours + row.prediction * epsilons[step] + row.noise * z
        assert relative(ours, theirs) < tolerance
        ours = theirs  # so that a later step is judged by itself
    assert len(schedule) == count


def relative(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("count", [1, 2, 4, 8])
@pytest.mark.parametrize("name", ["hyper", "lightning", "lcm", "turbo"])
def test_tables_of_the_checkpoints_equal_diffusers(name, count):
    check(dict(CHECKPOINTS[name].scheduler), count)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("name", ["hyper", "lightning", "turbo"])
def test_spacings_and_predictions_equal_diffusers(name, spacing, prediction):
    config = dict(CHECKPOINTS[name].scheduler)
    check(config | {"timestep_spacing": spacing, "prediction_type": prediction}, 5)


@pytest.mark.parametrize("count", [1, 4, 8])
@pytest.mark.parametrize("name", ["hyper", "lightning", "lcm", "turbo"])
def test_v_prediction_with_zero_terminal_snr_equals_diffusers(doubles, name, count):
    config = dict(CHECKPOINTS[name].scheduler)
    check(config | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, count)


@pytest.mark.parametrize("name", ["lightning", "turbo"])
def test_zero_terminal_snr_with_leading_steps_equals_diffusers(doubles, name):
    """PyTorch's square roots of ᾱ are a last bit off in some places, which shows near t = 0."""
    config = dict(CHECKPOINTS[name].scheduler) | {"timestep_spacing": "leading"}
    config |= {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    check(config, 5, tolerance=3e-6)


def test_other_betas_equal_diffusers():
    hyper = dict(CHECKPOINTS["hyper"].scheduler)
    check(hyper | {"beta_schedule": "squaredcos_cap_v2"}, 4)
    check(hyper | {"trained_betas": np.linspace(1e-4, 0.03, 1000).tolist()}, 4)


EDM = {
    "class": "EDMEulerScheduler",
    "sigma_min": 0.002,
    "sigma_max": 80.0,
    "sigma_data": 0.5,
    "prediction_type": "epsilon",
}
"""Playground v2.5's; the other is CosXL's."""


@pytest.mark.parametrize("count", [2, 4, 25])
@pytest.mark.parametrize(
    "facts",
    [
        {},
        {
            "sigma_max": 120.0,
            "sigma_data": 1.0,
            "prediction_type": "v_prediction",
            "sigma_schedule": "exponential",
        },
    ],
    ids=["playground", "cosxl"],
)
def test_edm_equals_diffusers(doubles, facts, count):
    check(EDM | facts, count)


def test_a_network_keeps_its_facts_under_another_sampler():
    lightning, hyper = (dict(CHECKPOINTS[name].scheduler) for name in ("lightning", "hyper"))
    network = hyper | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    merged = with_network_of(lightning, network)
    assert merged == lightning | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    assert with_network_of(network, lightning) == hyper
    assert with_network_of(lightning, EDM) == EDM


@pytest.mark.parametrize("name", ["hyper", "lightning", "lcm", "turbo"])
def test_explicit_timesteps_equal_the_spaced_ones(name):
    config = dict(CHECKPOINTS[name].scheduler)
    spaced = make_schedule(config, 4)
    explicit = make_schedule(config, 4, timesteps=[s.timestep for s in spaced.steps])
    assert explicit == spaced


def test_first_step_of_hyper_by_hand():
    """DDIM at t = 999 to 749 from the definition, in float64 numbers computed here."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alphas = np.cumprod(1 - betas)
    a = (alphas[749] / alphas[999]) ** 0.5
    b = (1 - alphas[749]) ** 0.5 - a * (1 - alphas[999]) ** 0.5
    step = make_schedule(dict(CHECKPOINTS["hyper"].scheduler), 4).steps[0]
    assert step.latents == pytest.approx(a, rel=1e-5)
    assert step.prediction == pytest.approx(b, rel=1e-5)


def test_what_cannot_be_scheduled_is_refused():
    hyper = dict(CHECKPOINTS["hyper"].scheduler)
    with pytest.raises(InvalidRequest):
        make_schedule(hyper, 0)
    with pytest.raises(InvalidRequest):
        make_schedule(hyper, 2, timesteps=[249, 999])
    with pytest.raises(InvalidRequest):
        make_schedule(dict(CHECKPOINTS["lcm"].scheduler), 51)
    with pytest.raises(InvalidRequest):
        make_schedule(dict(CHECKPOINTS["lightning"].scheduler) | {"use_karras_sigmas": True}, 4)
    with pytest.raises(InvalidRequest, match="no signal"):
        make_schedule(hyper | {"rescale_betas_zero_snr": True}, 4)
    with pytest.raises(InvalidRequest, match="EDM"):
        make_schedule(EDM, 2, timesteps=[500, 250])
    with pytest.raises(UnknownName, match="EulerDiscreteScheduler"):
        make_schedule({"class": "EulerDiscretScheduler"}, 4)
