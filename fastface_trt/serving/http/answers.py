"""Answers as bytes."""

import json
from collections.abc import Mapping

from pydantic import BaseModel
from starlette.responses import Response


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
