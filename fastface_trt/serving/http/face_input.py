"""The face of a request: registered, in its body, a file of its form, or at an address."""

import asyncio
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastface_trt.errors import Busy, DeadlinePassed
from fastface_trt.runtime.face import Face
from fastface_trt.serving.http.context import Context
from fastface_trt.serving.http.errors import InvalidField
from fastface_trt.serving.http.schemas import GenerationBody
from fastface_trt.serving.http.tasks import end_of
from fastface_trt.serving.intake import decode_base64, decode_picture

Value = TypeVar("Value")


async def face_of(context: Context, body: GenerationBody, file: bytes | None, owner: str) -> Face:
    """Whichever one face the request has; see `conversion.check_one_face`.

    Raises `BadPicture`, `NoFaceFound`, `FaceIndexOutOfRange`, `UnknownFace`, `InvalidField`,
    `Refused`, `Unavailable`.
    """
    if body.face_id is not None:
        if body.face_index is not None:
            raise InvalidField(
                "face_index goes with a picture.",
                "A registered face is one already: leave it out.",
                param="face_index",
            )
        return (await context.faces.get(owner, body.face_id)).face
    if body.face is not None:
        file = await context.beside(decode_base64, body.face, context.settings)
    elif body.face_url is not None:
        file = await _fetched(context, body.face_url)
    assert file is not None
    return await analysed(context, file, body.face_index)


async def analysed(context: Context, file: bytes, index: int | None) -> Face:
    """The face of a picture file: the largest, or the `index`-th by size.

    Raises `BadPicture`, `Refused`, `NoFaceFound`, `FaceIndexOutOfRange`, `Busy`,
    `Unavailable`.
    """
    pixels = await context.beside(decode_picture, file, context.settings)
    await context.checks.check_face(pixels)
    # A worker may have to send megabytes of pixels to another process.
    future = await context.beside(context.worker.analyze, pixels, index)
    try:
        return await asyncio.wrap_future(future)
    except Busy as error:
        context.admission.remember(error)
        raise


async def _fetched(context: Context, url: str) -> bytes:
    if not context.settings.fetch_urls:
        raise InvalidField(
            "This server fetches no pictures.",
            "Send the picture itself as face, or start the server with --fetch-urls.",
            param="face_url",
        )
    from fastface_trt.serving.fetch import fetch_picture

    return await fetch_picture(url, context.settings)


async def within(deadline: float, work: Coroutine[Any, Any, Value]) -> Value:
    """The result of `work`. Raises `DeadlinePassed` at `deadline` of `time.monotonic`."""
    working = asyncio.ensure_future(work)
    try:
        await asyncio.wait({working}, timeout=max(deadline - time.monotonic(), 0))
        if not working.done():
            raise DeadlinePassed("The face was not ready by the request's deadline.")
        return working.result()
    finally:
        await end_of({working})
