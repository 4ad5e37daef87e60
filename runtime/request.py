"""A generation request: everything that changes a picture, frozen and serialisable.

A request as one export makes it: its size and steps where the caller names none, and its limits.

It needs nothing but the manifest, so a server checks requests before any engine is asked.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fastface_trt.engines.contract import PARTS
from fastface_trt.engines.manifest import AdapterKind, ExportManifest
from fastface_trt.errors import InvalidRequest, UnknownName
from fastface_trt.runtime.guidance import (
    BRANCH_PLANS,
    VARIANTS,
    BranchPlan,
    GuidanceStep,
    NamedSchedule,
    guidance_step,
    resolve_schedule,
)
from fastface_trt.runtime.manipulation import NO_MANIPULATION, AttentionManipulation, is_number
from fastface_trt.runtime.presets import preset_fields

StatisticsScope = Literal["request", "branch"]
SCOPES: tuple[StatisticsScope, ...] = ("request", "branch")
MAX_SIDE = 4096


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One picture to make; the face itself travels beside it as image tokens.

    prompt, negative_prompt: text of up to 75 tokens. seed: 0 to 2⁶⁴−1; picture: index within a
    seed. steps: UNet steps. height, width: pixels. ip_adapter_scale: λ of Eq. 1, one number or one
    per part of the UNet (`{"down": …, "mid": …, "up": …}`). alpha, beta: DCG coefficients of Eq. 3
    (number, list per step, or `NamedSchedule`). rescale: φ of Eq. 5, None = off. dcg_variant: 1, 2
    or 3 of appendix D. manipulation: Eq. 7 to 10. scope: what the softmask normalises over
    (`request`: all branches evaluated, as published; `branch`: each by itself). plan: see
    `guidance.BRANCH_PLANS`.

    Raises `InvalidRequest` or `UnknownName` when a value is out of range.
    """

    prompt: str
    negative_prompt: str = ""
    seed: int = 0
    picture: int = 0
    steps: int = 4
    height: int = 1024
    width: int = 1024
    ip_adapter_scale: float | Mapping[str, float] = 0.8
    alpha: float | Sequence[float] | NamedSchedule = 1.0
    beta: float | Sequence[float] | NamedSchedule = 1.0
    rescale: float | None = None
    dcg_variant: int = 2
    manipulation: AttentionManipulation = NO_MANIPULATION
    scope: StatisticsScope = "request"
    plan: BranchPlan = "exact"

    def __post_init__(self) -> None:
        for name in ("prompt", "negative_prompt"):
            _check_text(name, getattr(self, name))
        if not self.prompt.strip():
            raise InvalidRequest("The prompt is empty.", "Describe the picture in a few words.")
        for name, low, high in (
            ("seed", 0, 2**64 - 1),
            ("picture", 0, 2**32 - 1),
            ("steps", 1, 1000),
            ("height", 1, MAX_SIDE),
            ("width", 1, MAX_SIDE),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise InvalidRequest(
                    f"{name} is {value!r:.40}.", f"It must be a whole number from {low} to {high}."
                )
        for kind, value, known in (
            ("branch plan", self.plan, BRANCH_PLANS),
            ("statistics scope", self.scope, SCOPES),
            ("DCG variant", str(self.dcg_variant), tuple(map(str, VARIANTS))),
        ):
            if value not in known:
                raise UnknownName(kind, str(value), known)
        if self.rescale is not None and not (is_number(self.rescale) and 0 <= self.rescale <= 1):
            raise InvalidRequest(
                f"rescale is {self.rescale!r:.40}.", "It must be between 0 and 1, or none for off."
            )
        self.ip_scales()
        self.guidance_steps()
        for step in range(self.steps):
            self.manipulation.rows(step, self.steps)

    def ip_scales(self) -> NDArray[np.float32]:
        """λ per part of the UNet, float32 [parts]."""
        scale = self.ip_adapter_scale
        if isinstance(scale, Mapping):
            for part in scale:
                if part not in PARTS:
                    raise UnknownName("part of the UNet", str(part), PARTS)
            values = [scale.get(part, 0.8) for part in PARTS]
        else:
            values = [scale] * len(PARTS)
        for value in values:
            if not is_number(value):
                raise InvalidRequest(
                    f"ip_adapter_scale is {value!r:.40}.", "Use a number such as 0.8."
                )
            if not -10 <= value <= 10:
                raise InvalidRequest(
                    f"ip_adapter_scale is {value!r}.", "Use a number from -10 to 10; 0.8 is usual."
                )
        return np.array(values, dtype=np.float32)

    def guidance_steps(self) -> list[GuidanceStep]:
        """The branch plan: guidance of every step."""
        alphas = resolve_schedule("alpha", self.alpha, self.steps)
        betas = resolve_schedule("beta", self.beta, self.steps)
        couples = self.manipulation.uses_softmask and self.scope == "request"
        return [
            guidance_step(
                alpha,
                beta,
                self.rescale,
                variant=self.dcg_variant,
                plan=self.plan,
                couples_branches=couples,
            )
            for alpha, beta in zip(alphas, betas, strict=True)
        ]

    @property
    def unet_samples(self) -> int:
        """How many UNet samples the whole request evaluates."""
        return sum(len(step.branches) for step in self.guidance_steps())

    def with_preset(self, name: str, **overrides: Any) -> "GenerationRequest":
        """This request with the fields of a preset, then `overrides`."""
        return replace(self, **{**preset_fields(name, self.steps), **overrides})

    def for_adapter(self, kind: AdapterKind) -> "GenerationRequest":
        """This request with what it leaves to the adapter settled for one of that kind."""
        return replace(self, manipulation=self.manipulation.for_adapter(kind))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, for metadata; schedules are written out per step."""
        values = {k: v for k, v in asdict(self).items() if k != "manipulation"}
        values["alpha"] = resolve_schedule("alpha", self.alpha, self.steps)
        values["beta"] = resolve_schedule("beta", self.beta, self.steps)
        if isinstance(self.ip_adapter_scale, Mapping):
            values["ip_adapter_scale"] = dict(self.ip_adapter_scale)
        values["manipulation"] = self.manipulation.to_dict()
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "GenerationRequest":
        """The inverse of `to_dict`; unknown fields raise `UnknownName`."""
        known = set(cls.__slots__)
        for name in values:
            if name not in known:
                raise UnknownName("field of a request", str(name), known)
        if "prompt" not in values:
            raise InvalidRequest("A request has no prompt.", "Describe the picture in a few words.")
        fields = dict(values)
        if "manipulation" in fields:
            fields["manipulation"] = AttentionManipulation.from_dict(fields["manipulation"])
        return cls(**fields)


def _check_text(name: str, text: object) -> None:
    """Raise `InvalidRequest` for what no tokenizer takes."""
    if not isinstance(text, str):
        raise InvalidRequest(f"The {name.replace('_', ' ')} is not text.", "Give a string.")
    try:
        text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can write as an escape
        raise InvalidRequest(
            f"The {name.replace('_', ' ')} holds a character that does not exist.",
            "Give text that has a UTF-8 encoding.",
        ) from None


def request_for(
    manifest: ExportManifest,
    prompt: str,
    *,
    preset: str = "plain",
    steps: int | None = None,
    **fields: Any,
) -> GenerationRequest:
    """A request with the export's size and steps, a preset's fields, and then `fields`.

    Raises `InvalidRequest` and `UnknownName`.
    """
    steps = manifest.steps if steps is None else steps
    if steps not in manifest.allowed_steps:
        raise InvalidRequest(
            f"The schedule of this {manifest.checkpoint} export does not do {steps} steps.",
            f"Choose one of {', '.join(map(str, manifest.allowed_steps))}.",
        )
    values: dict[str, Any] = {"height": manifest.height, "width": manifest.width}
    values |= preset_fields(preset, steps) | fields
    try:
        return GenerationRequest(prompt, steps=steps, **values)
    except TypeError as error:
        raise InvalidRequest(f"A request has no such field: {error}.", "") from None


def check_size(manifest: ExportManifest, request: GenerationRequest) -> None:
    """Raise `InvalidRequest` unless the export makes pictures of the request's size."""
    size = (request.height, request.width)
    if manifest.fixed_size and size != (manifest.height, manifest.width):
        raise InvalidRequest(
            f"This export makes only {manifest.width}x{manifest.height} pictures.",
            "Export without --fixed-size for others.",
        )
    if any(side % manifest.size_unit for side in size):
        raise InvalidRequest(
            f"{request.width}x{request.height} does not fit the model.",
            f"Width and height must be multiples of {manifest.size_unit} pixels.",
        )
