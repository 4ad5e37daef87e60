"""From a checked body to the requests that a worker gets."""

from typing import Any

from fastface_trt.engines.manifest import ExportManifest
from fastface_trt.errors import InvalidRequest, UnknownName
from fastface_trt.requests import check_size, request_for
from fastface_trt.runtime.guidance import parse_schedule
from fastface_trt.runtime.manipulation import AttentionManipulation
from fastface_trt.runtime.request import GenerationRequest
from fastface_trt.serving.http.errors import InvalidField
from fastface_trt.serving.http.schemas import GenerationBody, ScaleBody, given
from fastface_trt.serving.settings import ServerSettings

FACE_FIELDS = ("face", "face_id", "face_url")


def generation_requests(
    body: GenerationBody, manifest: ExportManifest, settings: ServerSettings
) -> list[GenerationRequest]:
    """One request per picture: the export's defaults, the preset's fields, and then the body's.

    Raises `InvalidRequest`, `InvalidField` and `UnknownName`.
    """
    if body.response_format == "url":
        raise InvalidField(
            "Pictures are not kept here, so there is no address of one.",
            "Ask for response_format b64_json.",
            param="response_format",
        )
    if body.model not in (None, manifest.checkpoint):
        raise UnknownName("model", body.model or "", [manifest.checkpoint])
    count = body.n or 1
    if count > settings.max_pictures:
        raise InvalidField(
            f"n is {count}.", f"This server makes up to {settings.max_pictures} at once.", param="n"
        )
    if body.partial_images and not body.stream:
        raise InvalidField(
            "partial_images needs a stream.", "Set stream to true.", param="partial_images"
        )
    if body.output_format in (None, "png") and body.output_compression not in (None, 100):
        raise InvalidField(
            "A PNG loses nothing, so it has no output_compression but 100.",
            "Ask for output_format jpeg or webp.",
            param="output_compression",
        )
    fields = _fields(body)
    requests = [
        request_for(
            manifest,
            body.prompt,
            preset=body.preset or "plain",
            steps=body.steps,
            picture=picture,
            **fields,
        )
        for picture in range(count)
    ]
    check_size(manifest, requests[0])
    return requests


def _fields(body: GenerationBody) -> dict[str, Any]:
    fields = given(
        body, "seed", "negative_prompt", "rescale", "dcg_variant", "scope", "plan", "alpha", "beta"
    )
    for name in ("alpha", "beta"):
        if isinstance(fields.get(name), str):
            fields[name] = parse_schedule(fields[name])
    if "rescale" in body.model_fields_set:
        fields["rescale"] = body.rescale  # null says off, and a preset may say otherwise
    scale = body.ip_adapter_scale
    if scale is not None:
        fields["ip_adapter_scale"] = (
            given(scale, "down", "mid", "up") if isinstance(scale, ScaleBody) else scale
        )
    if body.manipulation is not None:
        parts = body.manipulation.model_dump(exclude_none=True)
        fields["manipulation"] = AttentionManipulation.from_dict(parts)
    if body.size not in (None, "auto"):
        width, height = str(body.size).split("x")
        fields |= {"width": int(width), "height": int(height)}
    return fields


def deadline_of(body: GenerationBody, settings: ServerSettings, arrived: float) -> float:
    """When the answer is of no use any more, in seconds of `time.monotonic`."""
    seconds = settings.default_deadline if body.deadline is None else body.deadline
    if seconds > settings.max_deadline:
        raise InvalidField(
            f"deadline is {seconds:g} seconds.",
            f"This server works on a request for up to {settings.max_deadline:g}.",
            param="deadline",
        )
    return arrived + seconds


def check_one_face(body: GenerationBody, *, file: bool) -> None:
    """Raise `InvalidRequest` unless there is one face: a field, or the file of a form."""
    named = [name for name in FACE_FIELDS if getattr(body, name) is not None]
    if file:
        named.insert(0, "image")
    if len(named) != 1:
        raise InvalidRequest(
            f"Several faces are given: {', '.join(named)}." if named else "No face is given.",
            "Give one of face (base64), face_id (of /v1/faces), face_url, or in a form the file "
            "image.",
        )
