"""`/v1/images/generations` and `/v1/images/edits`."""

import time

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from fastface_trt.serving.http.answers import json_answer
from fastface_trt.serving.http.bodies import form_body, json_body
from fastface_trt.serving.http.context import context_of
from fastface_trt.serving.http.front import has_passed_the_gate
from fastface_trt.serving.http.openapi import event_stream, form_of, json_of, refusals
from fastface_trt.serving.http.responses import ImagesAnswer, Picture
from fastface_trt.serving.http.schemas import GenerationBody
from fastface_trt.serving.http.streaming import PictureStream
from fastface_trt.serving.http.tasks import unless_disconnected
from fastface_trt.serving.http.work_order import WorkOrder, work_order
from fastface_trt.serving.work import PictureDone

REFUSALS = (400, 401, 404, 408, 413, 415, 429, 500, 503, 504)


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
        body = await json_body(request, GenerationBody)
        return await _answer(request, body, None, "image_generation")

    @router.post(
        "/v1/images/edits",
        response_model=ImagesAnswer,
        responses={**refusals(*REFUSALS), 200: event_stream("image_edit")},
        openapi_extra=form_of(GenerationBody, without=("face",)),
        summary="Make pictures of the person in a picture",
    )
    async def edits(request: Request) -> Response:
        """The same from a form, whose file `image` is the picture with the face."""
        limit = context_of(request).settings.max_body_bytes
        body, file = await form_body(request, GenerationBody, limit)
        return await _answer(request, body, file, "image_edit")

    return router


async def _answer(
    request: Request, body: GenerationBody, file: bytes | None, prefix: str
) -> Response:
    ordering = work_order(context_of(request), request, body, file)
    if body.stream:
        order = await unless_disconnected(request.receive, ordering)
        return PictureStream(order, prefix)

    async def work() -> Response:
        return json_answer(await _made(await ordering))

    return await unless_disconnected(request.receive, work())


async def _made(order: WorkOrder) -> ImagesAnswer:
    pictures: dict[int, Picture] = {}
    async with order.submitted() as tasks:
        async for event in tasks.events():
            if event is None:
                continue
            index, done = event
            if not isinstance(done, PictureDone):
                continue
            pictures[index] = Picture(
                b64_json=await order.file(done),
                seed=order.tasks[index].request.seed,
                parameters=dict(done.parameters),
                warnings=list(done.warnings),
                seconds=dict(done.seconds),
            )
    return ImagesAnswer(
        created=int(time.time()),
        data=[pictures[index] for index in sorted(pictures)],
        usage=order.usage(),
        output_format=order.format,
        size=order.size,
    )
