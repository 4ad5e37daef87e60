"""Structured logs: one JSON object per line, one line per request, nobody's words or face in it."""

import json
import logging
import traceback
from datetime import datetime, timezone
from typing import Any, TextIO

from fastface_trt.errors import FastFaceError

LOGGER = "fastface_trt.serving"
FIELDS = "fields"


class JsonLines(logging.Formatter):
    """A record as one line of JSON: time, level, logger, message, and the fields it carries."""

    def format(self, record: logging.LogRecord) -> str:
        values: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        values |= getattr(record, FIELDS, {})
        if record.exc_info and record.exc_info[1] is not None:
            values |= describe(record.exc_info[1])
        return json.dumps(values, default=str)


def describe(error: BaseException) -> dict[str, Any]:
    """An error for the log: its type and where it was raised, and our own sentence.

    The text of a foreign error may quote what a client sent, so it is left out.
    """
    values: dict[str, Any] = {
        "error": type(error).__name__,
        "traceback": [
            f"{frame.filename}:{frame.lineno} {frame.name}"
            for frame in traceback.extract_tb(error.__traceback__)
        ],
    }
    if isinstance(error, FastFaceError):
        values |= {"code": error.code, "detail": str(error)}
    if error.__cause__ is not None:
        values["cause"] = describe(error.__cause__)
    return values


def log_json(stream: TextIO, level: int = logging.INFO) -> None:
    """Send the logs of the server and of uvicorn to `stream` as JSON lines."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    for name in (LOGGER, "uvicorn", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers = [handler] if name != "uvicorn.error" else []
        logger.propagate = name == "uvicorn.error"
        # uvicorn warns of every request that is none: lines for whoever wants a full disk.
        logger.setLevel(level if name == LOGGER else logging.ERROR)


def log_event(message: str, *, level: int = logging.INFO, **fields: Any) -> None:
    """Log a message of the server with its fields."""
    logging.getLogger(LOGGER).log(level, message, extra={FIELDS: fields})
