"""`/v1/images/generations` and `/v1/images/edits`: the pictures as one answer, or as a stream.

A stream has server-sent events: every step, previews on request, each picture when it is done.
"""

import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from fastface_trt.errors import FastFaceError
from fastface_trt.serving.http.bodies import form_body, json_body, media_type
from fastface_trt.serving.http.context import context_of
from fastface_trt.serving.http.errors import error_event, is_internal
from fastface_trt.serving.http.middleware import has_passed_the_gate, record_of
from fastface_trt.serving.http.openapi import either, event_stream, form_of, json_of, refusals
from fastface_trt.serving.http.responses import (
    ImagesAnswer,
    Picture,
    json_answer,
    server_sent_event,
)
from fastface_trt.serving.http.schemas import GenerationBody
from fastface_trt.serving.http.tasks import ClientGone, unless_disconnected
from fastface_trt.serving.http.work_order import WorkOrder, work_order
from fastface_trt.serving.work import PictureDone, StepDone

REFUSALS = (400, 401, 404, 408, 413, 415, 429, 500, 503, 504)
HEARTBEAT = 10.0
"""Seconds of silence after which a comment is sent, so that nothing between the two gives up."""
_START: Any = {
    "type": "http.response.start",
    "status": 200,
    "headers": [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-store"),
        (b"x-accel-buffering", b"no"),  # nginx would keep the events together
    ],
}


def images_router() -> APIRouter:
    """The routes that make pictures."""
    router = APIRouter(tags=["images"], dependencies=[Depends(has_passed_the_gate)])

    @router.post(
        "/v1/images/generations",
        response_model=ImagesAnswer,
        responses={**refusals(*REFUSALS), 200: event_stream("image_generation")},
        openapi_extra=json_of(GenerationBody),
        summary="Make pictures of a person",
    )
    async def generations(request: Request) -> Response:
        """Pictures of the person of `face`, `face_id` or `face_url`, as the prompt says."""
        return await _answer(request, "image_generation")

    @router.post(
        "/v1/images/edits",
        response_model=ImagesAnswer,
        responses={**refusals(*REFUSALS), 200: event_stream("image_edit")},
        openapi_extra=either(json_of(GenerationBody), form_of(GenerationBody, without=("face",))),
        summary="Make pictures of the person in a picture",
    )
    async def edits(request: Request) -> Response:
        """The same from a form, whose file `image` is the picture with the face, or from JSON."""
        form = media_type(request) != "application/json"
        return await _answer(request, "image_edit", form=form)

    return router


async def _ordered(request: Request, form: bool) -> WorkOrder:
    """The order of a request's body, of which nothing stays in memory but what the order has.

    The request is in work from when its body is there until its answer was sent.
    """
    context, record = context_of(request), record_of(request.scope)
    with context.admission.reading(record.owner) as reading:
        file = None
        if form:
            body, file = await form_body(context, request, reading, GenerationBody)
        else:
            body = await json_body(context, request, reading, GenerationBody)
        record.held.enter_context(context.admission.enter(record.owner))
        ordering = work_order(context, request, reading, body, file)
        return await unless_disconnected(request.receive, ordering)


async def _answer(request: Request, prefix: str, *, form: bool = False) -> Response:
    order = await _ordered(request, form)
    if order.body.stream:
        return PictureStream(order, prefix)
    return json_answer(await unless_disconnected(request.receive, _made(order)))


async def _made(order: WorkOrder) -> ImagesAnswer:
    pictures: dict[int, Picture] = {}
    async with order.submitted() as tasks:
        async for event in tasks.events():
            if event is None:
                continue
            index, done = event
            if not isinstance(done, PictureDone):
                continue
            pictures[index] = await order.picture(index, done)
    return ImagesAnswer(
        created=int(time.time()),
        data=[pictures[index] for index in sorted(pictures)],
        usage=order.usage(),
        output_format=order.format,
        size=order.size,
    )


class PictureStream(Response):
    """The pictures of an order as events; errors before the first event are ordinary answers."""

    def __init__(self, order: WorkOrder, prefix: str) -> None:
        self.order, self.prefix = order, prefix
        self.background = None
        self._previewed: set[tuple[int, int]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        record = self.order.record
        try:
            await unless_disconnected(receive, self._send_all(send))
        except ClientGone:
            record.outcome = "disconnected"

    async def _send_all(self, send: Send) -> None:
        record, started = self.order.record, False
        try:
            async with self.order.submitted() as tasks:
                await send(_START)
                started = True
                async for event in tasks.events(HEARTBEAT):
                    async for chunk in self._chunks(event):
                        await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except FastFaceError as error:
            if not started:
                raise
            record.outcome = error.code
            if is_internal(error):
                record.failure = error
            last = error_event(error, record.id)
            await send({"type": "http.response.body", "body": last, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _chunks(
        self, event: tuple[int, StepDone | PictureDone] | None
    ) -> AsyncIterator[bytes]:
        if event is None:
            yield b": still working\n\n"
            return
        index, news = event
        if isinstance(news, PictureDone):
            yield self._event("completed", await self._completed(index, news))
            return
        progress = {"index": index, "step": news.step, "steps": news.steps}
        yield self._event("progress", progress)
        partials = partial_steps(news.steps, self.order.body.partial_images or 0)
        # A worker that died is replaced by one that begins its pictures again.
        new = (index, news.step) not in self._previewed
        if news.preview is not None and news.step in partials and new:
            self._previewed.add((index, news.step))
            height, width = news.preview.shape[:2]
            yield self._event(
                "partial_image",
                {
                    **self._like_openai(),
                    "b64_json": await self.order.preview_file(news.preview),
                    "partial_image_index": partials[news.step],
                    "index": index,
                    "step": news.step,
                    "preview_size": f"{width}x{height}",
                },
            )

    async def _completed(self, index: int, done: PictureDone) -> dict[str, Any]:
        picture = await self.order.picture(index, done)
        return {
            **self._like_openai(),
            "b64_json": picture.b64_json,
            "index": index,
            **picture.model_dump(),
            "usage": self.order.usage((self.order.tasks[index],)).model_dump(),
        }

    def _like_openai(self) -> dict[str, Any]:
        return {
            "created_at": int(time.time()),
            "size": self.order.size,
            "output_format": self.order.format,
            "background": "opaque",
            "quality": "auto",
        }

    def _event(self, name: str, values: dict[str, Any]) -> bytes:
        kind = f"{self.prefix}.{name}"
        return server_sent_event(kind, {"type": kind, **values})


def partial_steps(steps: int, count: int) -> dict[int, int]:
    """Steps, counted from 1, whose preview is sent, evenly between start and end: step → index.

    The last step is never among them: after it comes the picture itself.
    """
    chosen = sorted({round(steps * (k + 1) / (count + 1)) for k in range(count)} - {0, steps})
    return {step: index for index, step in enumerate(chosen)}
