"""Schedules as tables of host scalars.

Every sampler here is linear in the latents and the network's output, so one step is
`x' = a x + b ε + c z` after the input scaling `x_in = k x`, with z fresh standard noise. A table
holds one (timestep, k, a, b, c) per step; `tests/runtime/test_schedule.py` compares the tables with
diffusers' own classes. Sources of the formulas: DDIM (Song et al. 2021, Eq. 12), Euler and Euler
ancestral in the form of Karras et al. 2022 (σ-parametrisation), EDM (the same, Table 1 and Eq. 5),
LCM (Luo et al. 2023, Alg. 2), zero terminal SNR (Lin et al. 2023, Alg. 1).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastface_trt.errors import InvalidRequest, UnknownName

Vector = NDArray[np.float64]

EXPLICIT_TIMESTEPS = "timesteps"
"""Key of a configuration that lists the timesteps instead of spacing them."""

EDM = "EDMEulerScheduler"
NETWORK_KEYS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
    "prediction_type",
)
"""Keys of a configuration that say what a network was trained to see and to predict. The others
belong to the sampler: its class, and where between noise and picture it asks the network."""


@dataclass(frozen=True, slots=True)
class Step:
    """Coefficients of one step; `timestep` is what the UNet is told: 0…999, or ln(σ)/4 for EDM."""

    timestep: float
    input_scale: float  # k
    latents: float  # a
    prediction: float  # b, applied to the guided output
    noise: float  # c


@dataclass(frozen=True, slots=True)
class Schedule:
    """A sampler unrolled for a number of steps; latents start as `initial_scale` · noise."""

    steps: tuple[Step, ...]
    initial_scale: float

    def __len__(self) -> int:
        return len(self.steps)


def _float32_linspace(start: float, end: float, count: int) -> Vector:
    """torch.linspace in float32, bit for bit: both halves run inwards from their end, fused."""
    first, last = np.float32(start), np.float32(end)
    step = np.float64((last - first) / np.float32(count - 1))
    index = np.arange(count)
    values = np.where(index < count // 2, first + step * index, last - step * index[::-1])
    return values.astype(np.float32)


def with_network_of(sampler: Mapping[str, Any], network: Mapping[str, Any]) -> dict[str, Any]:
    """The class and spacing of configuration `sampler` for the network of configuration `network`.

    A network of EDM keeps its own: what it is told instead of a timestep fits no other sampler.
    """
    if network.get("class") == EDM:
        return dict(network)
    kept = {key: network[key] for key in NETWORK_KEYS if network.get(key) is not None}
    return {key: sampler[key] for key in sampler if key not in NETWORK_KEYS} | kept


def _betas(config: Mapping[str, Any]) -> Vector:
    """Variance added in each of T training steps, float32 [T]."""
    count = int(config.get("num_train_timesteps", 1000))
    start, end = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
    kind = config.get("beta_schedule", "linear")
    if config.get("trained_betas") is not None:
        return np.asarray(config["trained_betas"], dtype=np.float32)
    if kind == "scaled_linear":
        return (_float32_linspace(start**0.5, end**0.5, count) ** 2).astype(np.float32)
    if kind == "linear":
        return _float32_linspace(start, end, count)
    if kind == "squaredcos_cap_v2":  # Nichol and Dhariwal 2021, Eq. 17
        bar = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.asarray(np.minimum(1 - bar[1:] / bar[:-1], 0.999), dtype=np.float32)
    raise UnknownName("beta schedule", str(kind), ["linear", "scaled_linear", "squaredcos_cap_v2"])


def _alphas_cumprod(config: Mapping[str, Any]) -> Vector:
    """ᾱ_t for t = 0…T−1, float64 [T], with the float32 rounding that checkpoints were made with.

    σ = √((1−ᾱ)/ᾱ) loses five digits near t = 0, so the rounding of ᾱ shows in the tables. With
    zero terminal SNR √ᾱ is shifted and scaled so that it ends in 0 and begins where it did.
    """
    betas = _betas(config)
    if config.get("rescale_betas_zero_snr"):
        roots = np.sqrt(_cumulated(betas))
        roots = (roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))
        bar = roots**2
        betas = np.float32(1) - np.append(bar[:1], bar[1:] / bar[:-1])
    return _cumulated(betas).astype(np.float64)


def _cumulated(betas: Vector) -> Vector:
    """∏ (1 − β) up to each step, float32 [T], summed up in float64 as PyTorch does."""
    retained = (np.float32(1) - betas).astype(np.float64)
    return np.asarray(np.cumprod(retained).astype(np.float32))


def _spaced_timesteps(config: Mapping[str, Any], count: int) -> Vector:
    """Timesteps in falling order, float64 [count], by the configuration's `timestep_spacing`."""
    if config.get(EXPLICIT_TIMESTEPS):
        return np.array(config[EXPLICIT_TIMESTEPS], dtype=np.float64)
    train = int(config.get("num_train_timesteps", 1000))
    offset = int(config.get("steps_offset", 0))
    spacing = config.get("timestep_spacing", "leading")
    if spacing == "trailing":
        return np.round(np.arange(train, 0, -train / count))[:count] - 1
    if spacing == "leading":
        return np.arange(count, dtype=np.float64)[::-1] * (train // count) + offset
    if spacing == "linspace":
        return np.linspace(0, train - 1, count, dtype=np.float32)[::-1].astype(np.float64)
    raise UnknownName("timestep spacing", str(spacing), ["leading", "linspace", "trailing"])


def _epsilon_form(
    config: Mapping[str, Any], alpha: float, x_weight: float, x0_weight: float
) -> tuple[float, float]:
    """Coefficients on (x, network output) of `x_weight · x + x0_weight · x̂₀`.

    `alpha` is ᾱ_t of the variance-preserving form: x̂₀ = (x − √(1−ᾱ) ε) / √ᾱ for ε-prediction,
    x̂₀ = √ᾱ x − √(1−ᾱ) v for v-prediction, and the output itself for sample prediction. Where the
    signal is zero its noise says nothing of x̂₀: `InvalidRequest` for ε-prediction.
    """
    kind = config.get("prediction_type", "epsilon")
    if kind == "epsilon":
        if alpha == 0:
            raise InvalidRequest(
                "A network that predicts noise cannot start where there is no signal "
                "(epsilon with rescale_betas_zero_snr).",
                "Such checkpoints predict v: say --prediction-type v_prediction when exporting, or "
                "--no-zero-snr.",
            )
        on_x, on_output = 1 / alpha**0.5, -((1 - alpha) ** 0.5) / alpha**0.5
    elif kind == "v_prediction":
        on_x, on_output = alpha**0.5, -((1 - alpha) ** 0.5)
    elif kind == "sample":
        on_x, on_output = 0.0, 1.0
    else:
        raise UnknownName("prediction type", str(kind), ["epsilon", "sample", "v_prediction"])
    return x_weight + x0_weight * on_x, x0_weight * on_output


def _ddim(config: Mapping[str, Any], count: int) -> Schedule:
    """DDIM with η = 0: x' = √ᾱ' x̂₀ + √(1−ᾱ') ε̂."""
    alphas = _alphas_cumprod(config)
    train = len(alphas)
    timesteps = _spaced_timesteps(config, count)
    final = 1.0 if config.get("set_alpha_to_one", True) else float(alphas[0])
    steps = []
    for t in np.round(timesteps).astype(int):
        previous = t - train // count
        alpha, alpha_next = float(alphas[t]), float(alphas[previous]) if previous >= 0 else final
        # ε̂ = (x − √ᾱ x̂₀) / √(1−ᾱ), whatever the network predicts.
        ratio = ((1 - alpha_next) / (1 - alpha)) ** 0.5
        a, b = _epsilon_form(config, alpha, ratio, alpha_next**0.5 - ratio * alpha**0.5)
        steps.append(Step(float(t), 1.0, a, b, 0.0))
    return Schedule(tuple(steps), 1.0)


def _sigmas(config: Mapping[str, Any], count: int) -> tuple[Vector, Vector, float]:
    """Timesteps [count], σ [count + 1] ending in 0, and the initial noise scale."""
    if config.get("use_karras_sigmas") or config.get("use_exponential_sigmas"):
        raise InvalidRequest(
            "Karras and exponential sigmas are not few-step schedules of this program.",
            "Use the scheduler configuration that the checkpoint was distilled with.",
        )
    alphas = _alphas_cumprod(config).astype(np.float32)
    if config.get("rescale_betas_zero_snr"):
        alphas[-1] = 2**-24  # as diffusers has it, or the first σ would be infinite
    table = ((1 - alphas) / alphas) ** 0.5  # float32, as above
    timesteps = _spaced_timesteps(config, count)
    sigmas = np.append(np.interp(timesteps, np.arange(len(table)), table), 0.0)
    sigmas = sigmas.astype(np.float32).astype(np.float64)
    if config.get("timestep_spacing", "leading") in ("linspace", "trailing"):
        initial = float(sigmas.max())
    else:
        initial = float((sigmas.max() ** 2 + 1) ** 0.5)
    return timesteps, sigmas, initial


def _euler(config: Mapping[str, Any], count: int) -> Schedule:
    """Euler in σ: x' = x + (σ' − σ) ε with x_in = x / √(σ² + 1)."""
    return _euler_table(config, count, ancestral=False)


def _euler_ancestral(config: Mapping[str, Any], count: int) -> Schedule:
    """Euler to σ_down, then fresh noise σ_up with σ_down² + σ_up² = σ'²."""
    return _euler_table(config, count, ancestral=True)


def _euler_table(config: Mapping[str, Any], count: int, *, ancestral: bool) -> Schedule:
    timesteps, sigmas, initial = _sigmas(config, count)
    steps = []
    for t, sigma, following in zip(timesteps, sigmas[:-1], sigmas[1:], strict=True):
        up = (following**2 * (sigma**2 - following**2) / sigma**2) ** 0.5 if ancestral else 0.0
        down = (following**2 - up**2) ** 0.5
        scale = 1 / (sigma**2 + 1) ** 0.5
        # x̂₀ from the scaled input, whose ᾱ is 1/(σ²+1); then x' = x̂₀ + σ_down (x − x̂₀)/σ.
        on_scaled, b = _epsilon_form(config, scale**2, 0.0, 1 - down / sigma)
        steps.append(Step(float(t), scale, down / sigma + on_scaled * scale, b, float(up)))
    return Schedule(tuple(steps), initial)


def _edm_sigmas(config: Mapping[str, Any], count: int) -> Vector:
    """σ falling from sigma_max to sigma_min, with the 0 after it, float64 [count + 1]."""
    smallest, largest = float(config["sigma_min"]), float(config["sigma_max"])
    kind = config.get("sigma_schedule", "karras")
    if kind == "karras":
        rho = float(config.get("rho", 7.0))
        ends = largest ** (1 / rho), smallest ** (1 / rho)
        sigmas = (ends[0] + np.linspace(0, 1, count) * (ends[1] - ends[0])) ** rho
    elif kind == "exponential":
        sigmas = np.exp(np.linspace(np.log(smallest), np.log(largest), count))[::-1]
    else:
        raise UnknownName("sigma schedule", str(kind), ["exponential", "karras"])
    return np.append(sigmas, 0.0).astype(np.float32).astype(np.float64)


def _edm(config: Mapping[str, Any], count: int) -> Schedule:
    """Euler in σ with EDM's preconditioning: x̂₀ = c_skip x + c_out F(c_in x; ln(σ)/4).

    c_in = 1/√(σ² + σ_d²), c_skip = σ_d² c_in², c_out = ± σ σ_d c_in (minus for v-prediction), and
    x' = x + (σ' − σ)(x − x̂₀)/σ.
    """
    if config.get(EXPLICIT_TIMESTEPS):
        raise InvalidRequest("EDM has no timesteps to choose.", "Ask for a number of steps.")
    data = float(config.get("sigma_data", 0.5))
    kind = config.get("prediction_type", "epsilon")
    if kind not in ("epsilon", "v_prediction"):
        raise UnknownName("prediction type of EDM", str(kind), ["epsilon", "v_prediction"])
    sign = 1.0 if kind == "epsilon" else -1.0
    steps = []
    for sigma, following in pairwise(_edm_sigmas(config, count)):
        scale = 1 / (sigma**2 + data**2) ** 0.5
        move = following / sigma - 1
        a = 1 + move * (1 - (data * scale) ** 2)
        b = -move * sign * sigma * data * scale
        steps.append(Step(0.25 * float(np.log(sigma)), scale, a, b, 0.0))
    return Schedule(tuple(steps), (float(config["sigma_max"]) ** 2 + 1) ** 0.5)


def _lcm_timesteps(config: Mapping[str, Any], count: int) -> NDArray[np.int64]:
    if config.get(EXPLICIT_TIMESTEPS):
        return np.array(config[EXPLICIT_TIMESTEPS], dtype=np.int64)
    train = int(config.get("num_train_timesteps", 1000))
    original = int(config.get("original_inference_steps", 50))
    if count > original:
        raise InvalidRequest(
            f"LCM was distilled on {original} steps and cannot do {count}.",
            f"Ask for at most {original} steps.",
        )
    origin = np.arange(1, original + 1) * (train // original) - 1
    indices = np.floor(np.linspace(0, len(origin), num=count, endpoint=False)).astype(np.int64)
    return origin[::-1][indices].astype(np.int64)


def _lcm(config: Mapping[str, Any], count: int) -> Schedule:
    """LCM: x' = √ᾱ' (c_out x̂₀ + c_skip x) + √(1−ᾱ') z; the last step returns the bracket.

    Boundary conditions with σ_data = 0.5 and s = timestep_scaling (10):
    c_skip = σ_data² / ((s t)² + σ_data²), c_out = s t / √((s t)² + σ_data²).
    """
    alphas = _alphas_cumprod(config)
    timesteps = _lcm_timesteps(config, count)
    scaling, data = float(config.get("timestep_scaling", 10.0)), 0.5
    steps = []
    for index, t in enumerate(timesteps):
        alpha = float(alphas[t])
        scaled = float(t) * scaling
        skip = data**2 / (scaled**2 + data**2)
        out = scaled / (scaled**2 + data**2) ** 0.5
        a, b = _epsilon_form(config, alpha, skip, out)
        last = index == count - 1
        alpha_next = 1.0 if last else float(alphas[timesteps[index + 1]])
        root = alpha_next**0.5
        steps.append(
            Step(float(t), 1.0, root * a, root * b, 0.0 if last else (1 - alpha_next) ** 0.5)
        )
    return Schedule(tuple(steps), 1.0)


SAMPLERS: Mapping[str, Callable[[Mapping[str, Any], int], Schedule]] = {
    "DDIMScheduler": _ddim,
    EDM: _edm,
    "EulerDiscreteScheduler": _euler,
    "EulerAncestralDiscreteScheduler": _euler_ancestral,
    "LCMScheduler": _lcm,
}


def make_schedule(
    config: Mapping[str, Any], count: int, *, timesteps: Sequence[float] | None = None
) -> Schedule:
    """The table of `count` steps for a diffusers scheduler configuration with its `class`.

    `timesteps` (falling, `count` of them) replace the configuration's spacing. Raises `UnknownName`
    for another sampler and `InvalidRequest` for a count or timesteps that it cannot do.
    """
    name = str(config.get("class") or config.get("_class_name"))
    if name not in SAMPLERS:
        raise UnknownName("scheduler", name, SAMPLERS)
    train = int(config.get("num_train_timesteps", 1000))
    if not 1 <= count <= train:
        raise InvalidRequest(f"{count} steps cannot be scheduled.", f"Ask for 1 to {train} steps.")
    if timesteps is not None:
        falling = all(a > b for a, b in pairwise(timesteps))
        if len(timesteps) != count or not falling or not 0 <= timesteps[-1] <= timesteps[0] < train:
            raise InvalidRequest(
                f"Timesteps {list(timesteps)} cannot be scheduled.",
                f"Give {count} falling numbers from {train - 1} to 0.",
            )
        config = {**config, EXPLICIT_TIMESTEPS: list(timesteps)}
    return SAMPLERS[name](config, count)
