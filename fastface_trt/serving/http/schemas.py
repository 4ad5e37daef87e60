"""What a client may ask for: one closed model for JSON and for multipart forms.

The fields up to `output_compression` are OpenAI's, the others are ours. This is what is written in
the OpenAPI document and refused before anything looks at it; what the fields of a request mean, and
how they may be written, `parse_request` says.
"""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fastface_trt.engines.manifest import MOST_FACES
from fastface_trt.runtime.guidance import FAMILIES, BranchPlan
from fastface_trt.runtime.picture_file import QUALITY, PictureFormat
from fastface_trt.runtime.presets import PRESETS
from fastface_trt.runtime.prompt_syntax import PromptSyntax
from fastface_trt.runtime.request import (
    ALIASES,
    PARSED_FIELDS,
    WHOLE_NUMBERS,
    StatisticsScope,
)
from fastface_trt.serving.http.clients import as_sent
from fastface_trt.serving.http.errors import InvalidField

PICTURE_FIELDS = frozenset({"face", "image", "images"})
"""The only fields that may be long."""
MAX_PROMPT_LENGTH = 8000
"""Characters; an export reads 75 or 225 tokens, and what it cuts is said in a warning."""

Number = Annotated[float, Field(allow_inf_nan=False, ge=-1000, le=1000)]
PerStep = Number | Annotated[list[Number], Field(min_length=1, max_length=1000, fail_fast=True)]
"""One error is told in any case: a list of nothing but errors would make thousands."""
Phi = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Prompt = Annotated[str, Field(max_length=MAX_PROMPT_LENGTH)]

_SCHEDULE = (
    "A number, a list with one number per step, or a named schedule such as "
    f"`cosine:high=3,low=1` (families: {', '.join(sorted(FAMILIES))})."
)


def _whole(name: str, description: str) -> Any:
    low, high = WHOLE_NUMBERS[name]
    return Field(None, ge=low, le=high, description=description)


class Closed(BaseModel):
    """Base of what clients send: see `clients.as_sent`; an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _as_sent(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        whole = [name for name, one in cls.model_fields.items() if one.annotation == int | None]
        return as_sent(values, known=cls.model_fields, whole=whole)


class PartBody(Closed):
    """Attention manipulation of one part of the UNet; see `PartManipulation`."""

    kind: Literal["off", "scale_power", "softmask"] = "off"
    scale: PerStep = 1.0
    power: PerStep = 1.0
    quantile: PerStep = 0.65
    sharpness: PerStep = 5.0
    adain_weight: PerStep = 1.0
    invert_first_token: bool | None = None
    upper_bound: Number = 10.0


class ManipulationBody(Closed):
    """Attention manipulation per part; a part that is left out is off."""

    down: PartBody | None = None
    mid: PartBody | None = None
    up: PartBody | None = None


class ScaleBody(Closed):
    """λ per part of the UNet; 0.8 where left out."""

    down: Number | None = None
    mid: Number | None = None
    up: Number | None = None


class GenerationBody(Closed):
    """Pictures of a person as a prompt says."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"prompt": "a watercolour portrait", "face_id": "face_…", "preset": "am1+dcg"},
            ]
        }
    )

    @model_validator(mode="before")
    @classmethod
    def _face_of_image(cls, values: Any) -> Any:
        return face_of_image(values) if isinstance(values, dict) else values

    prompt: Prompt = Field(min_length=1, description="What the picture shows.")
    n: int | None = Field(None, ge=1, description="Pictures to make of one seed [1].")
    size: str | None = Field(
        None,
        pattern="^(auto|[1-9][0-9]{0,3}x[1-9][0-9]{0,3})$",
        description="WIDTHxHEIGHT in pixels, or auto: the export's own.",
    )
    response_format: Literal["b64_json"] | None = Field(
        None, description="Pictures are not kept, so there is no address of one."
    )
    quality: Literal["auto", "standard"] | None = Field(
        None, description="Not used: there is one quality, and presets and steps."
    )
    background: Literal["auto", "opaque"] | None = Field(
        None, description="Not used: pictures are opaque."
    )
    moderation: Literal["auto", "low"] | None = Field(
        None, description="Not used: the operator's checks decide."
    )
    input_fidelity: Literal["high", "low"] | None = Field(
        None, description="Not used: see ip_adapter_scale."
    )
    style: Literal["vivid"] | None = Field(None, description="Not used: see prompt.")
    model: Annotated[str, Field(max_length=200)] | None = Field(
        None, description="The name of the served export, as /v1/models tells it, or nothing."
    )
    user: Annotated[str, Field(max_length=512)] | None = Field(
        None, description="Accepted for OpenAI's sake; neither used nor logged."
    )
    safety_identifier: Annotated[str, Field(max_length=512)] | None = Field(
        None, description="Like `user`."
    )
    stream: bool | None = Field(None, description="Answer with server-sent events.")
    partial_images: int | None = Field(
        None, ge=0, le=3, description="With `stream`: previews of each picture at most."
    )
    output_format: PictureFormat | None = Field(None, description="Of the pictures' files [png].")
    output_compression: int | None = Field(
        None,
        ge=0,
        le=100,
        description=f"Quality of JPEG and WebP [{QUALITY}]; a PNG has only 100, which is lossless.",
    )

    face: str | None = Field(
        None,
        min_length=1,
        description="A picture with the face: base64, or a data: URL; OpenAI's `image` or the one "
        "of `images` is read as well.",
    )
    face_id: Annotated[str, Field(min_length=1, max_length=100)] | None = Field(
        None, description="A face registered with POST /v1/faces."
    )
    face_ids: (
        Annotated[
            list[Annotated[str, Field(min_length=1, max_length=100)]],
            Field(min_length=1, max_length=MOST_FACES),
        ]
        | None
    ) = Field(
        None,
        description="Registered faces of one person in several pictures; only where the model's "
        "max_faces is more than 1.",
    )
    face_url: Annotated[str, Field(min_length=1, max_length=2048)] | None = Field(
        None, description="The address of a picture; only where the server fetches pictures."
    )
    face_index: int | None = Field(
        None, ge=0, le=10_000, description="Which face of the picture, largest first [0]."
    )
    channel_order: Literal["bgr", "rgb"] | None = Field(
        None, description="Order in which CLIP sees the face [bgr, as published]."
    )
    seed: int | None = _whole("seed", "[a random one, which the answer tells]; -1 is any, too.")
    negative_prompt: Prompt | None = Field(None, description="What the picture should not show.")
    prompt_syntax: PromptSyntax | None = Field(
        None, description="How weights are written in both prompts [plain: not at all]."
    )
    preset: Annotated[str, Field(max_length=100)] | None = Field(
        None,
        description="Parameters to start from; every field overrides it. [plain]",
        json_schema_extra={"examples": list(PRESETS)},
    )
    steps: int | None = _whole("steps", "UNet steps [the export's].")
    num_inference_steps: int | None = _whole("steps", "diffusers' name of steps.")
    ip_adapter_scale: Number | ScaleBody | None = Field(
        None, description="λ (Eq. 1): one number, or one per part of the UNet [0.8]."
    )
    alpha: PerStep | Annotated[str, Field(max_length=1000)] | None = Field(
        None, description=f"α (Eq. 3). {_SCHEDULE}"
    )
    beta: PerStep | Annotated[str, Field(max_length=1000)] | None = Field(
        None, description=f"β (Eq. 3). {_SCHEDULE}"
    )
    guidance_rescale: Phi | None = Field(
        None, description="φ (Eq. 5); null is off, also where the preset has one."
    )
    rescale: Phi | None = Field(
        None,
        description="The former name of guidance_rescale.",
        json_schema_extra={"deprecated": True},
    )
    dcg_variant: Literal[1, 2, 3] | None = Field(None, description="Appendix D [2].")
    manipulation: ManipulationBody | None = Field(
        None, description="Attention manipulation (Eq. 7 to 10); replaces the preset's."
    )
    scope: StatisticsScope | None = Field(
        None, description="What the softmask normalises over [request]."
    )
    plan: BranchPlan | None = Field(None, description="Branch plan [exact].")
    strength_for_tokens: bool | None = Field(
        None,
        description="Whether s of scale-power is adjusted to the number of image tokens, where "
        "that varies with the number of pictures [true].",
    )
    deadline: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="Seconds from now after which the answer is of no use."
    )

    def request_values(self) -> dict[str, Any]:
        """What `parse_request` takes, without what the client left out.

        A null says off where φ is meant, since a preset may have one; elsewhere it says nothing.
        """
        names = type(self).model_fields.keys() & (PARSED_FIELDS | ALIASES.keys())
        values = self.model_dump(include=names, exclude_none=True)
        off = {"guidance_rescale", "rescale"} & self.model_fields_set
        return dict.fromkeys(off) | values


def face_of_image(values: Mapping[str, Any]) -> dict[str, Any]:
    """A body whose picture is in OpenAI's `image` or `images`, with the picture as ours."""
    read = dict(values)
    for name in ("image", "images"):
        given = read.pop(name, None)
        pictures = given if isinstance(given, list) else [given]
        if len(pictures) > 1:
            raise several_pictures(name, len(pictures))
        picture = pictures[0] if pictures else None
        for key in ("image_url", "url", "b64_json"):
            if isinstance(picture, dict) and key in picture:
                picture = picture[key]
        if picture is None or picture == "":
            continue
        if not isinstance(picture, str):
            raise InvalidField(
                f"The picture in {name} is not one.",
                "Give base64, a data: URL, or an address; a registered face goes into face_id.",
                param=name,
            )
        ours = "face_url" if picture[:8].lower().startswith(("http://", "https://")) else "face"
        if read.get(ours) is not None:
            raise several_pictures(name, 2)
        read[ours] = picture
    return read


def several_pictures(name: str, count: int) -> InvalidField:
    """The error of a request with more than the one picture that a face is taken from."""
    return InvalidField(
        f"{name} holds {count} pictures, and one is of use.",
        "A picture shows one person: send the one with the face.",
        param=name,
    )


def field_names(schema: Mapping[str, Any], above: str = "") -> Iterator[str]:
    """The names of a model's fields and, with what they are in, of the fields of those."""
    for name, one in schema["properties"].items():
        yield f"{above}{name}"
        for option in one.get("anyOf", ()):
            model = schema.get("$defs", {}).get(str(option.get("$ref", "")).rpartition("/")[2])
            if model is not None:
                inner = {"$defs": schema["$defs"], **model}
                yield from field_names(inner, f"{above}{name}.")


class FaceBody(Closed):
    """A face to register."""

    image: str = Field(min_length=1, description="A picture: base64, or a data: URL.")
    face_index: int | None = Field(None, ge=0, le=10_000, description="Largest first [0].")


class FaceForm(Closed):
    """A face to register, whose picture is the file of the form."""

    face_index: int | None = Field(None, ge=0, le=10_000, description="Largest first [0].")
