"""Whether two peers made the same picture: nobody is timed whose output differs."""

from dataclasses import dataclass

import numpy as np

from benchmarks.peers.work import Made

LATENTS_TOLERANCE = {"am2": 2e-3, "am2+dcg": 2e-3}
"""Relative L2 by preset; the softmask's thresholds are found by counting, to within 1e-6."""

DEFAULT_LATENTS_TOLERANCE = 1e-3

HALF_TOLERANCE = 2e-2
"""Where the peers compute in float16: a UNet call by another order of sums is 2e-3 to 3e-3 off, and
four steps of guidance multiply it."""

PICTURE_TOLERANCE = 2 / 255


@dataclass(frozen=True)
class Difference:
    """latents: relative L2 distance of final latents. picture: mean absolute difference, of 1."""

    latents: float
    picture: float

    def problem(self, preset: str, allowed: float | None = None) -> str | None:
        """What is out of tolerance, in words; None where the outputs are the same.

        `allowed` is for latents, in place of the preset's own.
        """
        allowed = allowed or LATENTS_TOLERANCE.get(preset, DEFAULT_LATENTS_TOLERANCE)
        if not self.latents < allowed:  # not a number is no equality either
            return f"its latents differ by {self.latents:.1e} of their length, allowed {allowed:g}"
        if not self.picture < PICTURE_TOLERANCE:
            return f"its picture differs by {255 * self.picture:.2f}/255 on average, allowed 2/255"
        return None


def difference(made: Made, reference: Made) -> Difference:
    """How far a peer's output is from the reference's."""
    if made.picture.size != reference.picture.size:
        return Difference(float("inf"), float("inf"))
    apart = made.latents.astype(np.float64) - reference.latents
    pixels = np.asarray(made.picture, np.float64) - np.asarray(reference.picture, np.float64)
    return Difference(
        float(np.linalg.norm(apart) / np.linalg.norm(reference.latents)),
        float(np.abs(pixels).mean() / 255),
    )
