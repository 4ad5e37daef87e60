"""/openapi.json, and /docs, which shows it as a page: made once, without scripts, of nothing else.

Its only style is named by its hash in the content security policy, so that whatever else might
find its way into the page does nothing.
"""

import base64
import hashlib
import json
from collections.abc import Callable, Mapping
from functools import cache
from html import escape
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from fastface_trt.serving.ui.page import PageFile

Schema = Mapping[str, Any]
STYLE = """
:root { color-scheme: light dark; font: 15px/1.45 system-ui, sans-serif; }
body { margin: 2rem auto; padding: 0 1rem; max-width: 60rem; overflow-wrap: break-word; }
h2 { margin-top: 2.5rem; border-top: 1px solid GrayText; padding-top: .8rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .2rem .8rem .2rem 0; }
"""
POLICY = (
    "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; style-src "
    f"'sha256-{base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()}'"
)


def reference_router(document: Callable[[], dict[str, Any]]) -> APIRouter:
    """The routes of both; `document` makes the OpenAPI document when somebody first asks."""
    router = APIRouter(include_in_schema=False)

    @cache
    def files() -> tuple[PageFile, PageFile]:
        made = document()
        page = PageFile("docs.html", reference_page(made).encode(), POLICY)
        return PageFile("openapi.json", json.dumps(made).encode()), page

    @router.get("/openapi.json")
    async def openapi(request: Request) -> Response:
        """The document."""
        return files()[0].answer(request)

    @router.get("/docs")
    async def docs(request: Request) -> Response:
        """The page."""
        return files()[1].answer(request)

    return router


def reference_page(document: Schema) -> str:
    """An OpenAPI document as HTML: its operations with what they take and give, then its types."""
    info = document["info"]
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(info['title'])}</title>",
        '<meta name=viewport content="width=device-width">',
        f"<style>{STYLE}</style><h1>{escape(info['title'])} {escape(info['version'])}</h1>",
        _prose(info["description"]),
        '<p>The same for programs: <a href="openapi.json">openapi.json</a>.',
    ]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            parts += _operation(f"{method.upper()} {path}", operation)
    for name, schema in document["components"]["schemas"].items():
        parts.append(f'<h2 id="{escape(name)}">{escape(name)}</h2>')
        parts += [_prose(schema.get("description", "")), _fields(schema)]
    return "\n".join(parts)


def _operation(name: str, operation: Schema) -> list[str]:
    parts = [f"<h2><code>{escape(name)}</code></h2>", _prose(operation.get("summary", ""))]
    parts.append(_prose(operation.get("description", "")))
    if "security" in operation:
        parts.append("<p>Needs a key.")
    for kind, body in operation.get("requestBody", {}).get("content", {}).items():
        parts += [f"<h3>{escape(kind)}</h3>", _fields(body["schema"])]
    rows = []
    for status, answer in operation["responses"].items():
        kinds = [
            f"{escape(kind)} {_type(content.get('schema', {}))}"
            for kind, content in answer.get("content", {}).items()
        ]
        rows.append((escape(status), "<br>".join(kinds), escape(answer["description"])))
    return [*parts, "<h3>Answers</h3>", _table(rows)]


def _fields(schema: Schema) -> str:
    """The fields of an object, or the type of whatever else it is."""
    if "properties" not in schema:
        return f"<p>{_type(schema)}"
    rows = []
    for name, field in schema["properties"].items():
        required = "<br>required" if name in schema.get("required", ()) else ""
        text = escape(field.get("description", ""))
        rows.append((f"<code>{escape(name)}</code>{required}", _type(field), text))
    return _table(rows)


def _type(schema: Schema) -> str:
    """A type in a few words, with links to those that have a name."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#{name}">{name}</a>'
    if "anyOf" in schema:  # where null, as everywhere here, is a field that is left out
        return " or ".join(_type(one) for one in schema["anyOf"] if one.get("type") != "null")
    if "enum" in schema or "const" in schema:
        values = schema.get("enum", [schema.get("const")])
        return " or ".join(f"<code>{escape(json.dumps(one))}</code>" for one in values)
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {})) or 'anything'}"
    if schema.get("type") == "string" and "pattern" in schema:
        return f"string <code>{escape(schema['pattern'])}</code>"
    words = [str(schema.get("format") or schema.get("type") or "")]
    words += [
        f"{word} {schema[name]:g}"
        for name, word in (
            *(("minimum", "from"), ("exclusiveMinimum", "above")),
            *(("maximum", "to"), ("exclusiveMaximum", "below")),
        )
        if name in schema
    ]
    return escape(" ".join(words).strip())


def _prose(text: str) -> str:
    return "".join(f"<p>{escape(part)}" for part in text.split("\n\n") if part)


def _table(rows: list[tuple[str, str, str]]) -> str:
    lines = ("<tr>" + "".join(f"<td>{cell}" for cell in row) for row in rows)
    return f"<table>{''.join(lines)}</table>"
