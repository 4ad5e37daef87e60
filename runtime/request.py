"""A generation request: everything that changes a picture, frozen and serialisable.

`GenerationRequest` declares the fields and checks their values; `parse_request` makes one from the
plain values of any surface (command line, HTTP, Triton, C, Python keywords), with an export's size
and steps where the caller names none. Neither needs more than the manifest, so a server checks
requests before any engine is asked.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, TypeGuard

import numpy as np
from numpy.typing import NDArray

from fastface_trt.engines.contract import KINDS, MANIPULATION_COLUMNS, PARTS
from fastface_trt.engines.manifest import AdapterKind, ExportManifest
from fastface_trt.errors import FastFaceError, InvalidRequest, UnknownName, naming
from fastface_trt.runtime.guidance import (
    BRANCH_PLANS,
    VARIANTS,
    BranchPlan,
    GuidanceStep,
    NamedSchedule,
    guidance_step,
    parse_schedule,
    resolve_schedule,
)
from fastface_trt.runtime.manipulation import (
    NO_MANIPULATION,
    USUAL_TOKENS,
    AttentionManipulation,
    is_number,
    manipulated,
    parse_manipulation,
    token_factor,
)
from fastface_trt.runtime.presets import PRESETS, preset_fields
from fastface_trt.runtime.prompt_syntax import SYNTAXES, PromptSyntax, parse_prompt

_KIND, _POWER = (MANIPULATION_COLUMNS.index(name) for name in ("kind", "power"))
StatisticsScope = Literal["request", "branch"]
SCOPES: tuple[StatisticsScope, ...] = ("request", "branch")
MAX_SIDE = 4096
DEFAULT_STEPS = 4
WHOLE_NUMBERS: Mapping[str, tuple[int, int]] = {
    "seed": (0, 2**64 - 1),
    "image_index": (0, 2**32 - 1),
    "steps": (1, 1000),
    "height": (1, MAX_SIDE),
    "width": (1, MAX_SIDE),
}
"""Smallest and largest value of the fields that are whole numbers."""

ALIASES: Mapping[str, str] = {
    "rescale": "guidance_rescale",
    "num_inference_steps": "steps",
    "picture": "image_index",
}
"""Further names of fields: the one that diffusers has, and what older pictures have in them."""


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One picture to make; the face itself travels beside it as image tokens.

    prompt, negative_prompt: text, in windows of 75 tokens, of up to three of them; prompt_syntax:
    how weights are written in both, see `prompt_syntax`. seed: 0 to 2⁶⁴−1; image_index: which of a
    seed's images. steps: UNet steps. height, width: pixels. ip_adapter_scale: λ of Eq. 1, one
    number or one per part of the UNet (`{"down": …, "mid": …, "up": …}`). alpha, beta: DCG
    coefficients of Eq. 3 (number, list per step, or `NamedSchedule`). guidance_rescale: φ of Eq. 5,
    None = off. dcg_variant: 1, 2 or 3 of appendix D. manipulation: Eq. 7 to 10. scope: what the
    softmask normalises over (`request`: all branches evaluated, as published; `branch`: each by
    itself). plan: see `guidance.BRANCH_PLANS`. strength_for_tokens: whether s of the scale-power is
    adjusted to the number of image tokens where that varies, see `AttentionManipulation.rows`.

    Raises `InvalidRequest` or `UnknownName` when a value is out of range.
    """

    prompt: str
    negative_prompt: str = ""
    seed: int = 0
    image_index: int = 0
    steps: int = DEFAULT_STEPS
    height: int = 1024
    width: int = 1024
    ip_adapter_scale: float | Mapping[str, float] = 0.8
    alpha: float | Sequence[float] | NamedSchedule = 1.0
    beta: float | Sequence[float] | NamedSchedule = 1.0
    guidance_rescale: float | None = None
    dcg_variant: int = 2
    manipulation: AttentionManipulation = NO_MANIPULATION
    scope: StatisticsScope = "request"
    plan: BranchPlan = "exact"
    prompt_syntax: PromptSyntax = "plain"
    strength_for_tokens: bool = True

    def __post_init__(self) -> None:
        for name in ("prompt", "negative_prompt"):
            _check_text(name, getattr(self, name))
        if not self.prompt.strip():
            with naming("prompt"):
                raise InvalidRequest("The prompt is empty.", "Describe the picture in a few words.")
        for name in WHOLE_NUMBERS:
            _check_whole(name, getattr(self, name))
        for name, kind, value, known in (
            ("plan", "branch plan", self.plan, BRANCH_PLANS),
            ("scope", "statistics scope", self.scope, SCOPES),
            ("prompt_syntax", "prompt syntax", self.prompt_syntax, SYNTAXES),
            ("dcg_variant", "DCG variant", str(self.dcg_variant), tuple(map(str, VARIANTS))),
        ):
            if value not in known:
                with naming(name):
                    raise UnknownName(kind, str(value), known)
        for name in ("prompt", "negative_prompt"):
            with naming(name):
                parse_prompt(getattr(self, name), self.prompt_syntax)
        if not isinstance(self.strength_for_tokens, bool):
            with naming("strength_for_tokens"):
                raise InvalidRequest(
                    f"strength_for_tokens is {self.strength_for_tokens!r:.40}.",
                    "It must be true or false.",
                )
        phi = self.guidance_rescale
        if phi is not None and not (is_number(phi) and 0 <= phi <= 1):
            with naming("guidance_rescale"):
                raise InvalidRequest(
                    f"guidance_rescale is {phi!r:.40}.", "It must be between 0 and 1, or off."
                )
        with naming("ip_adapter_scale"):
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
        alphas, betas = self._per_step("alpha"), self._per_step("beta")
        couples = self.manipulation.uses_softmask and self.scope == "request"
        return [
            guidance_step(
                alpha,
                beta,
                self.guidance_rescale,
                variant=self.dcg_variant,
                plan=self.plan,
                couples_branches=couples,
            )
            for alpha, beta in zip(alphas, betas, strict=True)
        ]

    def _per_step(self, name: Literal["alpha", "beta"]) -> list[float]:
        with naming(name):
            return resolve_schedule(name, getattr(self, name), self.steps)

    @property
    def unet_samples(self) -> int:
        """How many UNet samples the whole request evaluates."""
        return sum(len(step.branches) for step in self.guidance_steps())

    def with_preset(self, name: str, **overrides: Any) -> "GenerationRequest":
        """This request with a preset's fields, then `overrides` as `parse_request` reads them."""
        with _by_field({"preset": name} | overrides, {}) as given:
            return replace(self, **_typed(given, given.get("steps", self.steps)))

    @property
    def preset(self) -> str:
        """The name of the preset whose fields this request has, or `custom`."""
        plain = {"alpha": 1.0, "beta": 1.0, "guidance_rescale": None}
        for name in PRESETS:
            fields = {"manipulation": NO_MANIPULATION} | plain | preset_fields(name, self.steps)
            if replace(self, **fields).to_dict() == self.to_dict():
                return name
        return "custom"

    def told_strength(self, manifest: ExportManifest, pictures: int) -> str:
        """That s is not as it was given, with so many pictures of a person; empty where it is."""
        tokens = manifest.tokens_per_face * pictures
        powers = {
            row[_POWER]
            for step in range(self.steps)
            for row in self.manipulation.rows(step, self.steps)
            if row[_KIND] == KINDS.index("scale_power") and row[_POWER] != 1
        }
        if not powers or not self.strength_for_tokens:
            return ""
        factors = " or ".join(f"{token_factor(power, tokens):.3g}" for power in sorted(powers))
        return (
            f"The scale of the attention manipulation is for {USUAL_TOKENS} image tokens and was "
            f"multiplied by {factors} for {tokens} (strength_for_tokens off leaves it)."
        )

    def for_adapter(self, kind: AdapterKind) -> "GenerationRequest":
        """This request with what it leaves to the adapter settled for one of that kind."""
        return replace(self, manipulation=self.manipulation.for_adapter(kind))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, for metadata; schedules are written out per step."""
        values = {k: v for k, v in asdict(self).items() if k != "manipulation"}
        values["alpha"], values["beta"] = self._per_step("alpha"), self._per_step("beta")
        if isinstance(self.ip_adapter_scale, Mapping):
            values["ip_adapter_scale"] = dict(self.ip_adapter_scale)
        values["manipulation"] = self.manipulation.to_dict()
        if self.strength_for_tokens:  # what most adapters have no use for
            del values["strength_for_tokens"]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "GenerationRequest":
        """The inverse of `to_dict`, also of older pictures' metadata; see `parse_request`."""
        return parse_request(values)


PARSED_FIELDS = frozenset({f.name for f in fields(GenerationRequest)} | {"preset", "size"})
"""What `parse_request` takes, beside `ALIASES` and the parameters of attention manipulation."""

_CHANGES = "manipulation."

_ELSEWHERE: Mapping[str, str] = {
    "guidance_scale": "Guidance is alpha and beta here.",
    "cfg_scale": "Guidance is alpha and beta here.",
    "ip_adapter_image": "Pass the picture of the face as face.",
    "ip_adapter_image_embeds": "Pass a picture, or what FastFace.analyze returns, as face.",
    "image": "Pass the picture of the face as face.",
    "strength": "How closely the face is followed is ip_adapter_scale.",
    "prompt_2": "Both text encoders read prompt.",
    "negative_prompt_2": "Both text encoders read negative_prompt.",
    "latents": "Noise is a function of seed.",
    "callback": "Use callback_on_step_end, or on_step.",
    "callback_on_step_end_tensor_inputs": "callback_on_step_end is given the latents.",
}
"""What diffusers' arguments are here, where they have no field of the same meaning."""

CHANNEL_ORDERS = ("bgr", "rgb")
OutputType = Literal["pil", "np", "latent"]
OUTPUT_TYPES: tuple[OutputType, ...] = ("pil", "np", "latent")


def parse_request(
    values: Mapping[str, Any],
    manifest: ExportManifest | None = None,
    *,
    spelling: Mapping[str, str] | None = None,
) -> GenerationRequest:
    """The request that plain values (text, numbers, lists, mappings) stand for.

    Every surface comes through here. `values` are fields of `GenerationRequest` by name or alias,
    over those of `preset` and, with a manifest, over the export's size and steps. As text may be
    written: alpha and beta (`1.5`, `1,2,2,1`, `cosine:high=3`), ip_adapter_scale (`0.8`,
    `down=0.5,up=1`), guidance_rescale (`0.7`, `off`) and `size`, which stands for width and height
    (`1024x1024`, or `auto`). `manipulation` is a mapping by part that replaces the preset's;
    `manipulation.up` (a mapping, or `scale=1.55,power=1.3`) and `manipulation.up.scale` change it.
    `spelling` says how the caller spells what has another name there, for errors.

    Raises `InvalidRequest` and `UnknownName`, whose `param` is the field as the caller spells it.
    """
    with _by_field(values, spelling or {}) as given:
        if "prompt" not in given:
            raise InvalidRequest("A request has no prompt.", "Describe the picture in a few words.")
        defaults: dict[str, Any] = {}
        if manifest is not None:
            defaults = {"height": manifest.height, "width": manifest.width, "steps": manifest.steps}
        steps = given.get("steps", defaults.get("steps", DEFAULT_STEPS))
        if manifest is not None and steps not in manifest.allowed_steps:
            with naming("steps"):
                raise InvalidRequest(
                    f"The schedule of this {manifest.checkpoint} export does not do "
                    f"{steps!r:.40} steps.",
                    f"Choose one of {', '.join(map(str, manifest.allowed_steps))}.",
                )
        request = GenerationRequest(**(defaults | _typed(given, steps)))
        if manifest is not None:
            with naming("size"):
                check_size(manifest, request)
        return request


def request_for(
    manifest: ExportManifest,
    prompt: str,
    *,
    preset: str = "plain",
    steps: int | None = None,
    **fields: Any,
) -> GenerationRequest:
    """`parse_request` with the values as keywords."""
    return parse_request({"prompt": prompt, "preset": preset, "steps": steps, **fields}, manifest)


def parse_call(
    manifest: ExportManifest,
    prompt: Any,
    face: Any,
    *,
    known: Collection[str],
    num_images_per_prompt: Any = 1,
    **fields: Any,
) -> tuple[list[GenerationRequest], list[Any]]:
    """Requests, and the face of each, that the arguments of a call stand for; see `FastFace`.

    `known` are the call's other arguments, for errors. prompt, face and negative_prompt are single
    or lists of equal length; each of these makes `num_images_per_prompt` pictures. A list of seeds
    (or of generators) has one per picture.
    """
    for name in fields:
        _require_field(
            name, PARSED_FIELDS | ALIASES.keys() | {*known, "generator", "num_images_per_prompt"}
        )
    if face is None:
        raise InvalidRequest("A call has no face.", "Pass the picture of one as face.")
    if prompt is None:
        raise InvalidRequest("A call has no prompt.", "Describe the picture in a few words.")
    if not _is_whole(num_images_per_prompt) or num_images_per_prompt < 1:
        raise InvalidRequest(
            f"num_images_per_prompt is {num_images_per_prompt!r:.40}.", "Ask for at least one."
        )
    seeds = _seeds(fields)
    negative = fields.pop("negative_prompt", None)
    lists = {
        "prompts": _listed(prompt),
        "faces": list(face) if isinstance(face, list | tuple) else [face],
        "negative prompts": _listed("" if negative is None else negative),
    }
    if num_images_per_prompt == 1:
        lists["seeds"] = seeds
    count = max(map(len, lists.values()))
    for name, values in lists.items():
        if len(values) not in (1, count):
            more = max(lists, key=lambda other: len(lists[other]))
            raise InvalidRequest(
                f"{len(values)} {name} and {count} {more} do not pair up.",
                "Give equally many, or one of either.",
            )
        lists[name] = values * (count // len(values))
    pictures = count * num_images_per_prompt
    if len(seeds) not in (1, pictures):
        raise InvalidRequest(
            f"{len(seeds)} seeds are not one for each of {pictures} pictures.",
            "Give one per picture, or one for all.",
        )
    first = fields.pop("image_index", 0)
    _check_whole("image_index", first)
    requests = [
        request_for(
            manifest,
            lists["prompts"][row],
            negative_prompt=lists["negative prompts"][row],
            seed=seeds[row * num_images_per_prompt + index] if len(seeds) > 1 else seeds[0],
            image_index=first if len(seeds) > 1 else first + index,
            **fields,
        )
        for row in range(count)
        for index in range(num_images_per_prompt)
    ]
    return requests, [one for one in lists["faces"] for _ in range(num_images_per_prompt)]


def check_run(
    requests: Sequence[GenerationRequest],
    faces: Sequence[object],
    *,
    face_index: object = None,
    channel_order: object = "bgr",
    max_rows: object = None,
    output_type: object = "pil",
    on_step: object = None,
) -> None:
    """Raise `InvalidRequest` or `UnknownName` for what `FastFace.generate` cannot do."""
    if len(requests) != len(faces):
        raise InvalidRequest(
            f"{len(requests)} requests and {len(faces)} faces do not pair up.",
            "Give each request its face.",
        )
    for kind, value, names in (
        ("channel order", channel_order, CHANNEL_ORDERS),
        ("output type", output_type, OUTPUT_TYPES),
    ):
        if value not in names:
            raise UnknownName(kind, str(value), names)
    for name, value, least in (("face_index", face_index, 0), ("max_rows", max_rows, 1)):
        if value is not None and not (_is_whole(value) and value >= least):
            raise InvalidRequest(
                f"{name} is {value!r:.40}.", f"It must be a whole number from {least} on."
            )
    if on_step is not None:
        check_callable("on_step", on_step)
    if output_type != "pil" and len({(r.height, r.width) for r in requests}) > 1:
        raise InvalidRequest(
            "Pictures of several sizes are not one array.", "Leave output_type at pil."
        )


def check_callable(name: str, value: object) -> None:
    """Raise `InvalidRequest` unless the argument `name` can be called."""
    if not callable(value):
        raise InvalidRequest(f"{name} is {value!r:.40}.", "Give a function.")


def _listed(values: Any) -> list[Any]:
    if isinstance(values, Sequence | np.ndarray) and not isinstance(values, str | bytes):
        return list(values)
    return [values]


def _seeds(fields: dict[str, Any]) -> list[Any]:
    """Takes seed, or what diffusers has for it, out of `fields`."""
    generators = _listed(fields.pop("generator", None))
    if generators == [None]:
        seeds = _listed(fields.pop("seed", 0))
        return [int(seed) if isinstance(seed, np.integer) else seed for seed in seeds]
    if "seed" in fields:
        raise InvalidRequest("seed and generator are one field.", "Give one of them.")
    seeds = []
    for generator in generators:
        initial = getattr(generator, "initial_seed", None)  # torch's
        seed = initial() if callable(initial) else generator
        if not _is_whole(seed):
            raise InvalidRequest(
                f"generator is {generator!r:.40}.",
                "Give a torch.Generator, whose seed is taken, or a whole number.",
            )
        seeds.append(int(seed))
    return seeds


def parse_fields(values: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """Arguments of `GenerationRequest` that plain values stand for, over those of their preset."""
    with _by_field(values, {}) as given:
        return _typed(given, steps)


def parse_size(text: str) -> tuple[int, int]:
    """Read WIDTHxHEIGHT in pixels; raises `InvalidRequest`."""
    match = re.fullmatch(r"([0-9]{1,9})[x×]([0-9]{1,9})", str(text).strip().lower())
    if not match:
        raise InvalidRequest(f"The size is {text!r:.40}.", "Write WIDTHxHEIGHT, e.g. 1024x1024.")
    return int(match[1]), int(match[2])


@contextmanager
def _by_field(values: Mapping[str, Any], spelling: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """`values` by the names of the fields; errors inside spell them as the caller does."""
    given: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    for name, value in values.items():
        field = ALIASES.get(name, name)
        _require_field(field, PARSED_FIELDS)
        if field == "steps" and value is None:  # the export's
            continue
        spelled_now = spelling.get(name, str(name))
        if field in given and given[field] != value:
            raise InvalidRequest(
                f"{spelled_now} and {spelled[field]} are one field and differ.", "Give one of them."
            )
        given[field], spelled[field] = value, spelled_now
    if "size" in given:
        spelled |= dict.fromkeys({"width", "height"} - given.keys(), spelled["size"])
    try:
        yield given
    except FastFaceError as error:
        if error.param in spelled:
            error.spell_param(spelled[error.param])
        raise


def _require_field(name: Any, known: Collection[str]) -> None:
    if name not in known and not str(name).startswith(_CHANGES):
        hint = _ELSEWHERE.get(name) or UnknownName("field", str(name), known).hint
        raise InvalidRequest(f"A request has no field {name!r:.60}.", hint)


def _typed(given: Mapping[str, Any], steps: Any) -> dict[str, Any]:
    """Arguments of `GenerationRequest` from what `_by_field` gives."""
    _check_whole("steps", steps)
    values = dict(given) | {"steps": steps}
    with naming("preset"):
        typed = preset_fields(values.pop("preset", "plain"), steps)
    changes = {name: values.pop(name) for name in given if name.startswith(_CHANGES)}
    if "size" in values:
        with naming("size"):
            size = values.pop("size")
            if size != "auto":
                sides = dict(zip(("width", "height"), parse_size(size), strict=True))
                if any(values.get(name, side) != side for name, side in sides.items()):
                    raise InvalidRequest(
                        "size and width or height differ.", "Give the size or its sides."
                    )
                values |= sides
    for name, value in values.items():
        with naming(name):
            typed[name] = _READ[name](value) if name in _READ else value
    for name, value in changes.items():
        with naming(name):
            typed["manipulation"] = _changed(
                typed.get("manipulation", NO_MANIPULATION), name, value
            )
    return typed


def _schedule(value: Any) -> Any:
    if isinstance(value, str):
        return parse_schedule(value)
    return list(value) if isinstance(value, list | tuple) else value


def _scale(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if not isinstance(value, str):
        return value
    try:
        if "=" not in value:
            return float(value)
        return {part.strip(): float(x) for part, x in (p.split("=") for p in value.split(","))}
    except ValueError:
        raise InvalidRequest(
            f"ip_adapter_scale is {value!r:.40}.",
            "Use a number such as 0.8, or down=0.8,mid=0.8,up=0.6.",
        ) from None


def _guidance_rescale(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if value.lower() in ("none", "off"):
        return None
    try:
        return float(value)
    except ValueError:
        raise InvalidRequest(
            f"guidance_rescale is {value!r:.40}.", "Use a number from 0 to 1, or off."
        ) from None


def _manipulation(value: Any) -> AttentionManipulation:
    if isinstance(value, AttentionManipulation):
        return value
    return AttentionManipulation.from_dict(value)


_READ: Mapping[str, Callable[[Any], Any]] = {
    "ip_adapter_scale": _scale,
    "alpha": _schedule,
    "beta": _schedule,
    "guidance_rescale": _guidance_rescale,
    "manipulation": _manipulation,
}
"""How the fields are read that may be written in more than one way."""


def _changed(base: AttentionManipulation, name: str, value: Any) -> AttentionManipulation:
    """`base` with what `manipulation.PART` or `manipulation.PART.PARAMETER` says."""
    part, _, parameter = name.removeprefix(_CHANGES).partition(".")
    if part not in PARTS:
        raise UnknownName("part of the UNet", part, PARTS)
    before = getattr(base, part)
    if parameter:
        after = manipulated(before, {parameter: value})
    elif isinstance(value, str):
        after = parse_manipulation(value, before)
    else:
        after = manipulated(before, value)
    return replace(base, **{part: after})


def _is_whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _check_whole(name: str, value: object) -> None:
    low, high = WHOLE_NUMBERS[name]
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        with naming(name):
            raise InvalidRequest(
                f"{name} is {value!r:.40}.", f"It must be a whole number from {low} to {high}."
            )


def _check_text(name: str, text: object) -> None:
    """Raise `InvalidRequest` for what no tokenizer takes."""
    with naming(name):
        if not isinstance(text, str):
            raise InvalidRequest(f"{name} is not text.", "Give a string.")
        try:
            text.encode()
        except UnicodeEncodeError:  # half a surrogate pair, which JSON can write as an escape
            raise InvalidRequest(
                f"{name} holds a character that does not exist.",
                "Give text that has a UTF-8 encoding.",
            ) from None


def check_pictures(manifest: ExportManifest, count: int, param: str = "face") -> None:
    """Raise `InvalidRequest` unless the export takes so many pictures of one person."""
    with naming(param):
        if count == 0:
            raise InvalidRequest("A person has no picture.", "Give one or more.")
        if count > manifest.max_faces:
            most = manifest.max_faces
            one = "one picture" if most == 1 else f"up to {most} pictures"
            raise InvalidRequest(
                f"This {manifest.adapter_kind} export takes {one} of a person, and {count} were "
                "given.",
                "Give fewer, or export FaceID-Portrait with a larger --max-faces.",
            )


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
