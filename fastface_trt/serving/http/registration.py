"""`/v1/faces`: register a face once, name it afterwards, have it forgotten."""

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from fastface_trt.serving.http.bodies import form_body, json_body, media_type
from fastface_trt.serving.http.context import context_of
from fastface_trt.serving.http.errors import InvalidField
from fastface_trt.serving.http.faces import RegisteredFace
from fastface_trt.serving.http.middleware import has_passed_the_gate, record_of
from fastface_trt.serving.http.openapi import either, form_of, json_of, refusals
from fastface_trt.serving.http.responses import FaceAnswer, FaceList, json_answer
from fastface_trt.serving.http.schemas import FaceBody, FaceForm
from fastface_trt.serving.http.tasks import unless_disconnected, within
from fastface_trt.serving.http.work_order import analysed
from fastface_trt.serving.pictures.files import decode_base64


def faces_router() -> APIRouter:
    """The routes of registered faces."""
    router = APIRouter(tags=["faces"], dependencies=[Depends(has_passed_the_gate)])

    @router.post(
        "/v1/faces",
        status_code=201,
        response_model=FaceAnswer,
        responses=refusals(400, 401, 408, 413, 415, 429, 500, 503, 504),
        openapi_extra=either(json_of(FaceBody), form_of(FaceForm)),
        summary="Register a face",
    )
    async def register(request: Request) -> Response:
        """Find the face of a picture and keep what the model needs of it, for a time, in memory."""
        context, record = context_of(request), record_of(request.scope)
        owner = record.owner
        with context.admission.reading(owner) as reading:
            if media_type(request) == "multipart/form-data":
                form, file = await form_body(context, request, reading, FaceForm)
                if file is None:
                    raise InvalidField(
                        "The file 'image' is missing.", "Send the picture as image.", param="image"
                    )
                index = form.face_index
            else:
                body = await json_body(context, request, reading, FaceBody)
                file, index = (
                    await context.in_thread(owner, decode_base64, body.image, context.settings),
                    body.face_index,
                )
            record.held.enter_context(context.admission.enter(owner))
            deadline = record.arrived + context.settings.default_deadline
            face = await unless_disconnected(
                request.receive, within(deadline, analysed(context, file, index, owner))
            )
        one = await context.faces.add(record.owner, face)
        return json_answer(_face_answer(one), status=201)

    @router.get(
        "/v1/faces",
        response_model=FaceList,
        responses=refusals(401, 429),
        summary="List your faces",
    )
    async def registered(request: Request) -> Response:
        """The faces that were registered with this key, oldest first."""
        faces = await context_of(request).faces.of(record_of(request.scope).owner)
        return json_answer(FaceList(data=[_face_answer(one) for one in faces]))

    @router.delete(
        "/v1/faces/{id}",
        status_code=204,
        response_class=Response,
        responses=refusals(401, 404, 429),
        summary="Forget a face",
    )
    async def delete(request: Request, id: str) -> Response:
        """Forget a face at once, and what workers keep of it for the next picture."""
        context = context_of(request)
        await context.faces.delete(record_of(request.scope).owner, id)
        context.worker.forget()
        return Response(status_code=204)

    return router


def _face_answer(one: RegisteredFace) -> FaceAnswer:
    face = one.face
    return FaceAnswer(
        id=one.id,
        created_at=one.created_at,
        expires_at=one.expires_at,
        box=list(face.box),
        score=face.score,
        index=face.index,
        count=face.count,
        warnings=[] if face.warning is None else [face.warning],
    )
