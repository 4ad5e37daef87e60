"""The OpenAPI document: bodies that routes read themselves, and errors in OpenAI's shape."""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from fastface_trt import __version__
from fastface_trt.serving.http.responses import ErrorAnswer
from fastface_trt.serving.http.schemas import FaceBody, GenerationBody

REF = "#/components/schemas/{model}"
# Forms are written out where they are used: their files are no part of the models.
BODIES: tuple[type[BaseModel], ...] = (GenerationBody, FaceBody)
DESCRIPTIONS = {
    400: "The request is not one, or not one for this server.",
    401: "No valid API key.",
    404: "There is no such face or model.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body's type is another.",
    429: "Too many requests, or too many in the queue; see Retry-After.",
    500: "The server failed; its log says why.",
    503: "The server is starting, stopping or overloaded; see Retry-After.",
    504: "The deadline has passed.",
}
ABOUT = """Identity-preserving few-step SDXL generation (FastFace).

The image routes are OpenAI's, with further fields. Send an API key, where the server has any, as
`Authorization: Bearer KEY`. Every answer has an `X-Request-Id`."""


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Documents these statuses as errors."""
    return {
        status: {"model": ErrorAnswer, "description": DESCRIPTIONS[status]} for status in statuses
    }


def event_stream(prefix: str) -> dict[str, Any]:
    """Documents the events of a streamed answer."""
    return {
        "description": "The pictures; with `stream`, server-sent events: "
        f"`{prefix}.progress` per step, `{prefix}.partial_image`, `{prefix}.completed` per "
        "picture, or `error`.",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }


def json_of(model: type[BaseModel]) -> dict[str, Any]:
    """Documents a JSON body."""
    return _body("application/json", {"$ref": REF.format(model=model.__name__)})


def form_of(model: type[BaseModel], without: Sequence[str] = ()) -> dict[str, Any]:
    """Documents a multipart body with the file `image`."""
    schema = model.model_json_schema(ref_template=REF)
    schema.pop("$defs", None)
    schema.pop("examples", None)
    properties = {k: v for k, v in schema["properties"].items() if k not in without}
    file = {"type": "string", "format": "binary", "description": "The picture with the face."}
    schema["properties"] = {"image": file, **properties}
    return _body("multipart/form-data", schema)


def either(*bodies: dict[str, Any]) -> dict[str, Any]:
    """Documents a body that may have several types."""
    content = {kind: one for body in bodies for kind, one in body["requestBody"]["content"].items()}
    return {"requestBody": {"required": True, "content": content}}


def _body(media_type: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {media_type: {"schema": schema}}}}


def document(app: FastAPI, *, secured: bool) -> dict[str, Any]:
    """The OpenAPI document of the app."""
    made = get_openapi(
        title="FastFace-TRT", version=__version__, description=ABOUT, routes=app.routes
    )
    _, definitions = models_json_schema(
        [(model, "validation") for model in BODIES], ref_template=REF
    )
    schemas = made.setdefault("components", {}).setdefault("schemas", {})
    schemas |= definitions["$defs"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    for path, operations in made["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)  # what does not fit is 400 here
            if secured and path.startswith("/v1/"):
                operation["security"] = [{"key": []}]
    if secured:
        made["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return made
