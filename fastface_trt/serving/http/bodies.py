"""Bodies, JSON and multipart, into the same models. Nothing of them is written to a disk."""

import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from fastface_trt.serving.http.admission import Reading
from fastface_trt.serving.http.clients import REASONS, says_nothing
from fastface_trt.serving.http.context import Context
from fastface_trt.serving.http.errors import InvalidField, UnsupportedBody, invalid_field
from fastface_trt.serving.http.json_text import MAX_NAME, MAX_REST, MAX_TEXT, read_json
from fastface_trt.serving.http.multipart import read_form
from fastface_trt.serving.http.schemas import PICTURE_FIELDS, field_names, several_pictures

Body = TypeVar("Body", bound=BaseModel)
Value = TypeVar("Value")
_FREE_TEXT = ("prompt", "negative_prompt")
QUICK_BYTES = 16_000
"""Below this a body is parsed at once; above, beside the event loop."""
_INNER_NAMES = 4
"""Names within each other that the name of a form's field may hold."""


def media_type(request: Request) -> str:
    """The type of the body, without its parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def json_body(
    context: Context, request: Request, reading: Reading, model: type[Body]
) -> Body:
    """A JSON body.

    Raises `InvalidField`, `UnsupportedBody`, `BadPicture`, and what `Reading.add` raises.
    """
    _check_type(request, "application/json")

    def parse(data: bytearray) -> Body:
        try:
            return model.model_validate(read_json(data, PICTURE_FIELDS))
        except ValidationError as error:
            raise _invalid(error, model) from None
        except ValueError:
            raise InvalidField(
                "The body is not a JSON object.", "See /docs for what it holds."
            ) from None

    return await _parsed(context, reading, await _data(request, reading), parse)


async def form_body(
    context: Context, request: Request, reading: Reading, model: type[Body]
) -> tuple[Body, bytes | None]:
    """A multipart body, and the content of its file `image`, if it has one.

    Text stands for JSON wherever the model has no text there; `name[]` is an item of a list and
    `name[key]` a member of an object, as OpenAI's clients write them. Raises as `json_body` does.
    """
    _check_type(request, "multipart/form-data")

    def parse(data: bytearray) -> tuple[Body, bytes | None]:
        values, file = _form_values(request.headers["content-type"], data, _text_fields(model))
        try:
            return model.model_validate(values), file
        except ValidationError as error:
            raise _invalid(error, model) from None

    return await _parsed(context, reading, await _data(request, reading), parse)


async def _data(request: Request, reading: Reading) -> bytearray:
    data = bytearray()  # the request itself would keep its body until it is answered
    async for chunk in request.stream():
        reading.add(len(chunk))
        data += chunk
    return data


async def _parsed(
    context: Context, reading: Reading, data: bytearray, parse: Callable[[bytearray], Value]
) -> Value:
    if len(data) < QUICK_BYTES:
        return parse(data)
    return await context.in_thread(reading.owner, parse, data)


def _form_values(
    content_type: str, data: bytearray, text_fields: frozenset[str]
) -> tuple[dict[str, Any], bytes | None]:
    """The fields of a form, and the content of its file."""
    files: list[bytes] = []
    values: dict[str, Any] = {}
    rest = 0
    for part in read_form(content_type, data):
        root = part.name.partition("[")[0]
        if len(part.name) > MAX_NAME:
            raise InvalidField(
                f"The name of a field has {len(part.name):,} characters.", "See /docs."
            )
        if part.filename is not None:
            if re.fullmatch(r"image(\[[0-9]*\])?", part.name):
                if part.data or part.filename:  # neither: nothing was chosen in a page's form
                    files.append(part.data)
            elif part.data:
                hint = REASONS.get(part.name, "Send the picture of the face as image.")
                raise InvalidField(f"The form has a file {part.name!r}.", hint, param=part.name)
            continue
        long = len(part.data) > MAX_TEXT
        rest += 0 if long else len(part.data)
        if rest > MAX_REST or (long and root not in PICTURE_FIELDS):
            raise InvalidField(
                f"{part.name} is longer than {MAX_TEXT:,} bytes, or all text than {MAX_REST:,}.",
                "Only a picture may be that long.",
                param=part.name,
            )
        _put(values, part.name, part.text, text_fields)
    if len(files) > 1:
        raise several_pictures("image", len(files))
    return values, files[0] if files else None


def _invalid(error: ValidationError, model: type[BaseModel]) -> InvalidField:
    return invalid_field(error.errors(include_input=False, include_url=False), _known(model))


@cache
def _known(model: type[BaseModel]) -> list[str]:
    return sorted(field_names(model.model_json_schema()))


def _check_type(request: Request, wanted: str) -> None:
    if media_type(request) != wanted:
        raise UnsupportedBody(
            f"The body's type is {media_type(request) or 'not said'!r:.80}.", f"Send {wanted}."
        )


@cache
def _text_fields(model: type[BaseModel]) -> frozenset[str]:
    """Fields that take nothing but text."""
    properties: Mapping[str, Any] = model.model_json_schema()["properties"]
    return frozenset(
        name
        for name, schema in properties.items()
        if {one.get("type") for one in schema.get("anyOf", [schema])} <= {"string", "null"}
    )


def _put(values: dict[str, Any], name: str, text: str, text_fields: frozenset[str]) -> None:
    """Set the field `name`, `name[]` or `name[key][key]` of `values`."""
    root, *keys = re.split(r"\[|\]\[", name.removesuffix("]"), maxsplit=_INNER_NAMES)
    value = text if root in text_fields else _decoded(text)
    if isinstance(value, str) and root not in _FREE_TEXT and says_nothing(value):
        value = None
    twice = InvalidField(f"The field {root!r} is given twice.", "Give it once.", param=root)
    place, key = values, root
    for next_key in keys:
        if next_key == "":
            place.setdefault(key, [])
            if isinstance(place[key], list):
                place[key].append(value)
                return
            raise twice
        inner = place.setdefault(key, {})
        if not isinstance(inner, dict):
            raise twice
        place, key = inner, next_key
    if key in place:
        raise twice
    place[key] = value


def _decoded(text: str) -> Any:
    if len(text) > MAX_TEXT:  # a picture
        return text
    try:
        return read_json(text.encode())
    except ValueError:
        return text
