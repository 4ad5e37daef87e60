"""Decoupled classifier-free guidance (DCG), Eq. 3 to 5: which branches a step needs, and their sum.

A branch is one evaluation of the UNet for a request: `u` (no prompt, no face), `t` (prompt only),
`i` (face only), `ti` (both). Every variant is a linear combination of branches whose coefficients
are host scalars, so a branch whose coefficient is 0 and whose spread rescaling does not ask for
need not be evaluated.

Shape legend: B branches, C latent channels, h × w latent size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fastface_trt.errors import InvalidRequest, UnknownName
from fastface_trt.runtime.manipulation import is_number

Latents = NDArray[np.float32]

UNCONDITIONAL, TEXT, FACE, TEXT_AND_FACE = "u", "t", "i", "ti"

BranchPlan = Literal["exact", "full", "lean"]
BRANCH_PLANS: tuple[BranchPlan, ...] = ("exact", "full", "lean")
"""exact: skip what cannot change the result. full: all three branches on every step, as the authors
run it. lean: exact, and no rescaling on steps where ε̂ is one branch (a small, measured change)."""

VARIANTS: Mapping[int, tuple[tuple[str, ...], tuple[tuple[str, str], tuple[str, str]]]] = {
    1: (("u", "t", "ti"), (("t", "u"), ("ti", "t"))),
    2: (("u", "i", "ti"), (("i", "u"), ("ti", "i"))),
    3: (("u", "t", "i"), (("t", "u"), ("i", "u"))),
}
"""DCG-1, DCG-2 (the method's default) and DCG-3 of appendix D, Eq. 16 to 18: the branches in order,
and the two differences that α and β multiply: ε̂ = ε_u + α (ε_a − ε_b) + β (ε_c − ε_d)."""


@dataclass(frozen=True, slots=True)
class GuidanceStep:
    """Guidance of one step: coefficients per branch, what to evaluate, and the rescaling φ.

    `rescale` is None where the step is not rescaled; otherwise the spread is averaged over the
    second and third branch of the variant (`spread_branches`).
    """

    coefficients: Mapping[str, float]
    branches: tuple[str, ...]
    spread_branches: tuple[str, ...]
    rescale: float | None


def guidance_step(
    alpha: float,
    beta: float,
    rescale: float | None,
    *,
    variant: int = 2,
    plan: BranchPlan = "exact",
    couples_branches: bool = False,
) -> GuidanceStep:
    """Plan one step of Eq. 3 to 5 for scalars α, β and φ (`rescale`; None switches Eq. 4 off).

    `couples_branches` says that the branches of a request share statistics inside the UNet
    (softmask with scope `request`), so that skipping one would change the others: then all three
    are evaluated whatever the plan says.
    """
    if variant not in VARIANTS:
        raise UnknownName("DCG variant", str(variant), map(str, VARIANTS))
    if plan not in BRANCH_PLANS:
        raise UnknownName("branch plan", str(plan), BRANCH_PLANS)
    order, ((a, b), (c, d)) = VARIANTS[variant]
    coefficients = dict.fromkeys(order, 0.0)
    for branch, factor in (("u", 1.0), (a, alpha), (b, -alpha), (c, beta), (d, -beta)):
        coefficients[branch] += factor
    alive = [branch for branch in order if coefficients[branch] != 0]
    # One branch with weight 1: rescaling would only pull its spread towards the other's.
    if plan == "lean" and len(alive) == 1:
        rescale = None
    spread = order[1:] if rescale is not None else ()
    if plan == "full" or couples_branches:
        needed = order
    else:
        needed = tuple(x for x in order if x in alive or x in spread)
    return GuidanceStep(coefficients, needed, spread, rescale)


def combine(predictions: Mapping[str, Latents], step: GuidanceStep) -> Latents:
    """The guided prediction ε of Eq. 5 for one request, float32 [C,h,w].

    `predictions` holds [C,h,w] for at least the step's branches. ε̂ = Σ coefficient · ε_branch;
    with rescaling ε = ε̂ · (φ σ̄ / std(ε̂) + 1 − φ), σ̄ the mean of the spread branches' unbiased
    standard deviations over channels and pixels.
    """
    guided = sum(
        np.float32(factor) * predictions[branch]
        for branch, factor in step.coefficients.items()
        if factor != 0
    )
    if isinstance(guided, int):  # α = β = 0 in DCG-3 with u cancelled: nothing is left
        guided = np.zeros_like(next(iter(predictions.values())))
    if step.rescale is None:
        return guided
    spread = np.mean(
        [np.std(predictions[x], ddof=1, dtype=np.float64) for x in step.spread_branches]
    )
    own = np.std(guided, ddof=1, dtype=np.float64)
    factor = step.rescale * spread / own + 1 - step.rescale if own > 0 else 1.0
    return guided * np.float32(factor)


def _progress(steps: int) -> NDArray[np.float64]:
    """0 at the first step, 1 at the last; 0 for a single step."""
    return np.linspace(0.0, 1.0, steps) if steps > 1 else np.zeros(1)


def _constant(steps: int, low: float, high: float, power: float) -> NDArray[np.float64]:
    return np.full(steps, high)


def _linear(steps: int, low: float, high: float, power: float) -> NDArray[np.float64]:
    return low + (high - low) * (1 - _progress(steps))


def _cosine(steps: int, low: float, high: float, power: float) -> NDArray[np.float64]:
    return low + (high - low) * (1 + np.cos(np.pi * _progress(steps))) / 2


def _power_cosine(steps: int, low: float, high: float, power: float) -> NDArray[np.float64]:
    return low + (high - low) * (1 + np.cos(np.pi * _progress(steps) ** power)) / 2


def _cap(steps: int, low: float, high: float, power: float) -> NDArray[np.float64]:
    values = np.full(steps, low)
    values[1 : steps - 1] = high
    return values


FAMILIES = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "power-cosine": _power_cosine,
    "cap": _cap,
}
"""Named schedules of α and β over the steps, falling from `high` to `low` (cap: `high` on every
step but the first and the last, which is the shape that the method uses)."""


@dataclass(frozen=True, slots=True)
class NamedSchedule:
    """A schedule of α or β by family; `inverse` reverses it in time, `clamp` bounds its values."""

    family: str
    high: float
    low: float = 1.0
    power: float = 3.0
    inverse: bool = False
    clamp: tuple[float, float] | None = None

    def values(self, steps: int) -> list[float]:
        """One value per step, in the order in which the steps run."""
        if self.family not in FAMILIES:
            raise UnknownName("schedule family", self.family, FAMILIES)
        values = FAMILIES[self.family](steps, self.low, self.high, self.power)
        if self.inverse:
            values = values[::-1]
        if self.clamp is not None:
            values = np.clip(values, *self.clamp)
        return [float(v) for v in values]


def resolve_schedule(
    name: str, schedule: float | Sequence[float] | NamedSchedule, steps: int
) -> list[float]:
    """Values of α or β (`name` is for messages), one per step.

    A number is constant, a list must have one value per step, a `NamedSchedule` is evaluated.
    """
    if isinstance(schedule, NamedSchedule):
        values = schedule.values(steps)
    elif isinstance(schedule, Sequence) and not isinstance(schedule, str):
        values = _numbers(name, schedule)
        if len(values) != steps:
            raise InvalidRequest(
                f"{name} has {len(values)} values for {steps} steps.",
                "Give one value per step, a single number, or the name of a schedule.",
            )
    else:
        values = _numbers(name, [schedule]) * steps
    if not all(np.isfinite(values)):
        raise InvalidRequest(f"{name} holds a value that is not finite.", "Use plain numbers.")
    return values


def _numbers(name: str, values: Sequence[Any]) -> list[float]:
    for value in values:
        if not is_number(value):
            raise InvalidRequest(f"{name} is {value!r:.40}.", "Use plain, finite numbers.")
    return [float(value) for value in values]


def parse_schedule(text: str) -> float | list[float] | NamedSchedule:
    """Read `1.5`, `1,1.5,1.5,1` or `cosine:high=3,low=1,inverse=1,power=2,clamp=1..2.5`."""
    family, _, options = text.partition(":")
    if family.strip() in FAMILIES:
        return _parse_named(family.strip(), options)
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        if any(ch.isdigit() for ch in family):
            raise InvalidRequest(
                f"{text!r} is not a schedule.",
                "Write a number, a list such as 1,1.5,1.5,1, or e.g. cosine:high=3,low=1.",
            ) from None
        raise UnknownName("schedule family", family, FAMILIES) from None
    return values[0] if len(values) == 1 else values


def _parse_named(family: str, options: str) -> NamedSchedule:
    fields: dict[str, Any] = {}
    for option in filter(None, options.split(",")):
        key, _, value = option.partition("=")
        try:
            if key in ("high", "low", "power"):
                fields[key] = float(value)
            elif key == "inverse":
                fields[key] = value.strip().lower() in ("1", "true", "yes")
            elif key == "clamp":
                low, high = value.split("..")
                fields[key] = (float(low), float(high))
            else:
                raise UnknownName(
                    "schedule option", key, ["high", "low", "power", "inverse", "clamp"]
                )
        except ValueError:
            raise InvalidRequest(
                f"{option!r} is not an option of a schedule.", "Write e.g. cosine:high=3,low=1."
            ) from None
    if "high" not in fields:
        raise InvalidRequest(f"Schedule {family} needs high=NUMBER.", f"Write {family}:high=3.")
    return NamedSchedule(family, **fields)
