"""How far a backend may be from the reference, by the precision that a module computes in."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from fastface_trt.errors import UnknownName


@dataclass(frozen=True)
class Tolerance:
    """The largest allowed ‖ours − reference‖₂ / ‖reference‖₂ of a tensor, and why that much."""

    relative_l2: float
    reason: str


TOLERANCES: Mapping[str, Tolerance] = MappingProxyType(
    {
        "fp32": Tolerance(
            1e-4,
            "2^-24 per operation, over a thousand operations and sums in another order; "
            "a backend that multiplies in TF32 (10 bits) does not pass, and should not",
        ),
        "fp16": Tolerance(
            1e-2,
            "2^-11 per operation; the reference rounds every intermediate tensor to float16, a "
            "backend that fuses does not",
        ),
        "bf16": Tolerance(3e-2, "2^-8 per operation, where float16 has 2^-11"),
        "fp8": Tolerance(
            5e-2,
            "both sides round to e4m3 at the same places (Q/DQ); what is near the middle of two "
            "values may go either way, and a step is 2^-3",
        ),
        "int8": Tolerance(
            5e-2,
            "both sides round to int8 at the same places (Q/DQ); a small value may differ by a "
            "whole step of its tensor's scale",
        ),
    }
)

_ONLY_UNET = ("fp8", "int8")
"""Precisions that only the UNet is quantised to; the other modules of such an export are fp16."""


def tolerance_for(precision: str, module: str) -> Tolerance:
    """The tolerance for `module` of an export of `precision`; raises `UnknownName`."""
    if precision not in TOLERANCES:
        raise UnknownName("precision", precision, TOLERANCES)
    if precision in _ONLY_UNET and module != "unet":
        precision = "fp16"
    return TOLERANCES[precision]
