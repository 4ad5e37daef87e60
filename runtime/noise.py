"""Noise: one documented generator, the same numbers on every backend and platform.

A request's noise is a function of (seed, picture index, stream). The uniform bits are those of
Philox-4x64-10 (Salmon et al. 2011) with the 128-bit key `seed + 2⁶⁴ · picture` and the counter
starting at `stream · 2⁶⁴`; numpy guarantees the bit stream of its Philox. Two 64-bit words make two
normal numbers by Box and Muller: with u₁ = (⌊word₁/2¹¹⌋ + 1)/2⁵³ and u₂ = ⌊word₂/2¹¹⌋/2⁵³,
√(−2 ln u₁) · (cos 2πu₂, sin 2πu₂), in float64, rounded to float32. Stream 0 gives the initial
latents, stream n + 1 the fresh noise of step n.
"""

from math import prod

import numpy as np
from numpy.typing import NDArray

from fastface_trt.errors import InvalidRequest

INITIAL_LATENTS = 0


def step_stream(step: int) -> int:
    """The stream of the fresh noise that a stochastic scheduler adds after step `step`."""
    return step + 1


def standard_noise(
    seed: int, picture: int, stream: int, shape: tuple[int, ...]
) -> NDArray[np.float32]:
    """Standard normal numbers, float32 of `shape`, for a seed in 0…2⁶⁴−1."""
    if not 0 <= seed < 2**64:
        raise InvalidRequest(f"Seed {seed} is out of range.", "Use 0 to 2^64 - 1.")
    bits = np.random.Philox(key=seed + (picture << 64), counter=stream << 64)
    pairs = (prod(shape) + 1) // 2
    words = bits.random_raw(2 * pairs).reshape(pairs, 2) >> np.uint64(11)
    radius = np.sqrt(-2 * np.log((words[:, 0] + 1.0) * 2.0**-53))
    angle = 2 * np.pi * (words[:, 1] * 2.0**-53)
    normal = np.stack((radius * np.cos(angle), radius * np.sin(angle)), axis=1)
    return normal.reshape(-1)[: prod(shape)].reshape(shape).astype(np.float32)
