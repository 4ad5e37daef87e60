"""Bodies, JSON and multipart, into the same models. Nothing of them is written to a disk."""

import asyncio
import json
import re
from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from python_multipart.exceptions import FormParserError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from fastface_trt.serving.http.clients import REASONS, says_nothing
from fastface_trt.serving.http.errors import InvalidField, UnsupportedBody, invalid_field
from fastface_trt.serving.http.schemas import field_names, several_pictures

Body = TypeVar("Body", bound=BaseModel)
_FREE_TEXT = ("prompt", "negative_prompt")
QUICK_BYTES = 100_000
"""Below this a body is parsed at once; above, beside the event loop."""
MAX_FIELDS = 200
MAX_FILES = 20
"""More than one is refused by its name; OpenAI takes 16 pictures and a mask."""
MAX_DEPTH = 4


def media_type(request: Request) -> str:
    """The type of the body, without its parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def json_body(request: Request, model: type[Body]) -> Body:
    """A JSON body. Raises `InvalidField`, `UnsupportedBody`."""
    _check_type(request, "application/json")
    data = await request.body()
    try:
        if len(data) < QUICK_BYTES:
            return model.model_validate_json(data)
        return await asyncio.to_thread(model.model_validate_json, data)
    except ValidationError as error:
        raise _invalid(error, model) from None


async def form_body(
    request: Request, model: type[Body], max_bytes: int, file_field: str = "image"
) -> tuple[Body, bytes | None]:
    """A multipart body, and the content of its file, if it has one.

    Text stands for JSON wherever the model has no text there; `name[]` is an item of a list and
    `name[key]` a member of an object, as OpenAI's clients write them. Raises `InvalidField`,
    `UnsupportedBody`.
    """
    _check_type(request, "multipart/form-data")
    parser = _InMemory(
        request.headers,
        request.stream(),
        max_files=MAX_FILES,
        max_fields=MAX_FIELDS,
        max_part_size=max_bytes,
    )
    parser.spool_max_size = max_bytes + 1
    try:
        form = await parser.parse()
    except (MultiPartException, FormParserError) as error:
        raise InvalidField(
            "The form cannot be read: "
            f"{str(getattr(error, 'message', error)).rstrip('.') or 'it is broken'}.",
            "Send multipart/form-data with one file at most.",
        ) from None
    files: list[bytes] = []
    values: dict[str, Any] = {}
    text_fields = _text_fields(model)
    try:
        for name, value in form.multi_items():
            if not isinstance(value, UploadFile):
                _put(values, name, value, text_fields)
            elif re.fullmatch(rf"{file_field}(\[[0-9]*\])?", name):
                if value.size or value.filename:  # neither: nothing was chosen in a page's form
                    files.append(await value.read())
            elif value.size:
                hint = REASONS.get(name, f"Send the picture of the face as {file_field}.")
                raise InvalidField(f"The form has a file {name!r}.", hint, param=name)
    finally:
        await form.close()
    if len(files) > 1:
        raise several_pictures(file_field, len(files))
    try:
        return model.model_validate(values), files[0] if files else None
    except ValidationError as error:
        raise _invalid(error, model) from None


def _invalid(error: ValidationError, model: type[BaseModel]) -> InvalidField:
    return invalid_field(error.errors(include_input=False, include_url=False), _known(model))


@cache
def _known(model: type[BaseModel]) -> list[str]:
    return sorted(field_names(model.model_json_schema()))


def _check_type(request: Request, wanted: str) -> None:
    if media_type(request) != wanted:
        raise UnsupportedBody(
            f"The body's type is {media_type(request) or 'not said'!r}.", f"Send {wanted}."
        )


class _InMemory(MultiPartParser):
    """Starlette's parser puts files of a megabyte on the disk; a face must not be there."""


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
    root, *keys = re.split(r"\[|\]\[", name.removesuffix("]"), maxsplit=MAX_DEPTH)
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
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
