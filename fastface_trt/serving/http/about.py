"""What the server is and how it is: models, presets, health, metrics."""

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from fastface_trt.requests import request_for
from fastface_trt.runtime.presets import PRESETS, preset_fields
from fastface_trt.serving.http.answers import json_answer
from fastface_trt.serving.http.context import Context, context_of
from fastface_trt.serving.http.openai_errors import RETRY_AFTER_UNAVAILABLE
from fastface_trt.serving.http.openapi import refusals
from fastface_trt.serving.http.responses import (
    HealthAnswer,
    ModelAnswer,
    ModelList,
    PresetAnswer,
    PresetList,
)
from fastface_trt.serving.work import State


def about_router() -> APIRouter:
    """The routes that only tell."""
    router = APIRouter()

    @router.get(
        "/v1/models", response_model=ModelList, responses=refusals(401, 429), tags=["models"]
    )
    async def models(request: Request) -> Response:
        """The served export and what it can do."""
        return json_answer(ModelList(data=[_model(context_of(request))]))

    @router.get(
        "/v1/presets", response_model=PresetList, responses=refusals(401, 429), tags=["models"]
    )
    async def presets(request: Request) -> Response:
        """The presets, and what each sets."""
        return json_answer(PresetList(data=_presets(context_of(request))))

    @router.get("/v2/health/live", response_model=HealthAnswer, tags=["health"])
    async def live(request: Request) -> Response:
        """Whether the process answers at all."""
        return json_answer(HealthAnswer(state=context_of(request).admission.state.value))

    @router.get(
        "/v2/health/ready",
        response_model=HealthAnswer,
        responses={503: {"model": HealthAnswer, "description": "Starting, draining or dead."}},
        tags=["health"],
    )
    async def ready(request: Request) -> Response:
        """Whether it takes requests: its engines are warm and made finite pictures."""
        state = context_of(request).admission.state
        answer = HealthAnswer(state=state.value)
        if state is State.READY:
            return json_answer(answer)
        headers = {"Retry-After": str(int(RETRY_AFTER_UNAVAILABLE))}
        return json_answer(answer, status=503, headers=headers)

    @router.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
        tags=["health"],
    )
    async def metrics(request: Request) -> Response:
        """Prometheus' metrics."""
        return Response(context_of(request).metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return router


def _model(context: Context) -> ModelAnswer:
    manifest = context.manifest
    return ModelAnswer(
        id=manifest.checkpoint,
        created=context.started,
        owned_by="fastface-trt",
        size=f"{manifest.width}x{manifest.height}",
        fixed_size=manifest.fixed_size,
        size_unit=manifest.vae_scale_factor * 4,
        steps=manifest.steps,
        allowed_steps=list(manifest.allowed_steps),
        max_pictures=context.settings.max_pictures,
        backend=context.backend,
        checkpoint=manifest.checkpoint,
        adapter=manifest.adapter,
        adapter_kind=manifest.adapter_kind,
        precision=manifest.precision,
        scheduler=str(manifest.scheduler["class"]),
    )


def _presets(context: Context) -> list[PresetAnswer]:
    answers = []
    for name in PRESETS:
        values = request_for(context.manifest, name, preset=name).to_dict()
        fields = preset_fields(name, context.manifest.steps)
        answers.append(PresetAnswer(name=name, fields={field: values[field] for field in fields}))
    return answers
