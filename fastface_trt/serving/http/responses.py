"""What the server answers with: models for the OpenAPI document, and their bytes."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field
from starlette.responses import Response

from fastface_trt.runtime.picture_file import PictureFormat


class ErrorDetail(BaseModel):
    """One error, as OpenAI's clients read it."""

    message: str
    type: str
    param: str | None = None
    code: str


class ErrorAnswer(BaseModel):
    """Every answer that is not a success."""

    error: ErrorDetail


class TokenDetails(BaseModel):
    """Always 0: the clients' models have these fields, and nothing here is sold by token."""

    image_tokens: int = 0
    text_tokens: int = 0


class Usage(BaseModel):
    """What was used: pictures, and UNet samples (rows of UNet calls)."""

    pictures: int
    unet_samples: int
    input_tokens: int = 0
    input_tokens_details: TokenDetails = TokenDetails()
    output_tokens: int = 0
    total_tokens: int = 0


class Picture(BaseModel):
    """One picture: a file of `output_format`, and how it was made."""

    b64_json: str
    seed: int
    parameters: dict[str, Any]
    warnings: list[str]
    seconds: dict[str, float]


class ImagesAnswer(BaseModel):
    """The pictures of a request."""

    created: int
    data: list[Picture]
    usage: Usage
    background: Literal["opaque"] = "opaque"
    output_format: PictureFormat
    size: str


class FaceAnswer(BaseModel):
    """A registered face: where it is in its picture, and until when the server knows it."""

    id: str
    object: Literal["face"] = "face"
    created_at: int
    expires_at: int
    # Not a tuple: many readers of OpenAPI documents do not know `prefixItems`.
    box: Annotated[list[float], Field(min_length=4, max_length=4)]
    score: float
    index: int
    count: int
    warnings: list[str]


class FaceList(BaseModel):
    """The faces of one key."""

    object: Literal["list"] = "list"
    data: list[FaceAnswer]


class ModelAnswer(BaseModel):
    """The served export."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    size: str
    fixed_size: bool
    size_unit: int
    steps: int
    allowed_steps: list[int]
    max_pictures: int
    backend: str | None
    checkpoint: str
    adapter: str
    adapter_kind: str
    max_faces: int
    precision: str
    scheduler: str


class ModelList(BaseModel):
    """What can be asked for as `model`."""

    object: Literal["list"] = "list"
    data: list[ModelAnswer]


class PresetAnswer(BaseModel):
    """A preset: the fields of a request that it sets, written out for the export's steps."""

    name: str
    description: str
    fields: dict[str, Any]


class PresetList(BaseModel):
    """All presets."""

    data: list[PresetAnswer]


class HealthAnswer(BaseModel):
    """How the server is."""

    state: str


def json_answer(
    answer: BaseModel, *, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """A model as JSON.

    Escaped to ASCII, because a name that a client sent may hold half a surrogate pair, which has no
    UTF-8.
    """
    return Response(
        json.dumps(answer.model_dump(), allow_nan=False),
        status_code=status,
        headers=dict(headers or {}),
        media_type="application/json",
    )


def server_sent_event(name: str, values: Mapping[str, Any]) -> bytes:
    """An event of a streamed answer, its values as JSON."""
    return f"event: {name}\ndata: {json.dumps(values, allow_nan=False)}\n\n".encode("ascii")
