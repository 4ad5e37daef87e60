"""The HTTP application over a worker, whatever kind of worker it is.

`create_app` puts it together: routes, middleware, errors. The routes that say what the server is
and how it is (models, presets, health, metrics) are here too; the others have files of their own.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from importlib.util import find_spec

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from fastface_trt import __version__
from fastface_trt.engines.manifest import ExportManifest
from fastface_trt.errors import FastFaceError, MissingDependency, install_hint
from fastface_trt.measure.memory import give_memory_back
from fastface_trt.runtime.presets import DESCRIPTIONS, PRESETS, preset_fields
from fastface_trt.runtime.request import request_for
from fastface_trt.serving.http.admission import Admission
from fastface_trt.serving.http.context import (
    PICTURE_THREADS,
    Context,
    context_of,
)
from fastface_trt.serving.http.errors import (
    RETRY_AFTER_UNAVAILABLE,
    UnknownModel,
    error_answer,
    http_error_answer,
    invalid_field,
    is_internal,
)
from fastface_trt.serving.http.faces import Faces, OwnFaces
from fastface_trt.serving.http.images import images_router
from fastface_trt.serving.http.metrics import Metrics
from fastface_trt.serving.http.middleware import (
    ApiKeys,
    BodyLimit,
    Gate,
    RateLimit,
    RequestLog,
    has_passed_the_gate,
    record_of,
)
from fastface_trt.serving.http.openapi import document, refusals
from fastface_trt.serving.http.reference import reference_router
from fastface_trt.serving.http.registration import faces_router
from fastface_trt.serving.http.responses import (
    HealthAnswer,
    ModelAnswer,
    ModelList,
    PresetAnswer,
    PresetList,
    json_answer,
)
from fastface_trt.serving.http.tasks import ClientGone
from fastface_trt.serving.http.tracing import Spans, Tracing
from fastface_trt.serving.pictures.checks import Checks
from fastface_trt.serving.pictures.provenance import open_signer
from fastface_trt.serving.settings import ServerSettings
from fastface_trt.serving.ui.page import page_router
from fastface_trt.serving.work import State, Worker

SWEEP_SECONDS = 5.0
"""How often faces whose time is over are dropped, though nobody asks for them."""


def create_app(
    worker: Worker,
    settings: ServerSettings,
    manifest: ExportManifest,
    *,
    backend: str | None = None,
    tracing: Tracing | None = None,
    faces: Faces | None = None,
) -> FastAPI:
    """The application; the worker stays the caller's, who closes it.

    `manifest` is of the export that the worker serves, `backend` what /v1/models says about it.
    `tracing` replaces what the settings say, `faces` the registry of this process. Raises
    `MissingDependency` and `InvalidRequest` for what the settings name and this machine lacks.
    """
    if settings.heif and find_spec("pillow_heif") is None:
        raise MissingDependency("HEIC pictures need pillow-heif.", f"Run {install_hint('heif')}")
    context = _context(worker, settings, manifest, backend, tracing, faces)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        sweeping = asyncio.create_task(_sweep(context))
        try:
            yield
        finally:
            sweeping.cancel()
            with suppress(asyncio.CancelledError):
                await sweeping
            context.close()

    app = FastAPI(
        title="FastFace-TRT",
        version=__version__,
        lifespan=lifespan,
        openapi_url=None,  # and no page that loads scripts from elsewhere: `reference`
        # A client that sends what no route takes gets an error, not a redirect to follow.
        redirect_slashes=False,
    )
    app.state.context = context
    app.include_router(images_router())
    app.include_router(faces_router())
    app.include_router(about_router())
    app.include_router(reference_router(lambda: document(app, secured=bool(settings.api_keys))))
    if settings.ui:
        app.include_router(page_router(manifest))
    _handle_errors(app)
    # The last added is the first that a request passes.
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes, seconds=settings.body_timeout)
    app.add_middleware(
        Gate,
        keys=context.keys,
        metrics_keys=ApiKeys(settings.metrics_keys) if settings.metrics_keys else None,
        limit=context.limit,
        admission=context.admission,
    )
    app.add_middleware(RequestLog, metrics=context.metrics, tracing=context.tracing)
    if settings.allow_origins:  # outermost, since a page reads no error without these headers
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allow_origins,
            allow_methods=("GET", "POST", "DELETE"),
            allow_headers=("*",),  # whatever clients add, Authorization among it
            allow_private_network=True,
            expose_headers=("Retry-After", "WWW-Authenticate", "X-Request-Id"),
        )
    return app


def _context(
    worker: Worker,
    settings: ServerSettings,
    manifest: ExportManifest,
    backend: str | None,
    tracing: Tracing | None,
    faces: Faces | None,
) -> Context:
    admission = Admission(worker, settings)
    faces = faces or OwnFaces(settings.faces_ttl, settings.max_faces)
    if tracing is None:
        tracing = Spans() if settings.telemetry else Tracing()
    return Context(
        worker=worker,
        settings=settings,
        manifest=manifest,
        backend=backend,
        started=int(time.time()),
        admission=admission,
        keys=ApiKeys(settings.api_keys),
        limit=RateLimit(settings.requests_per_minute),
        faces=faces,
        checks=Checks.load(settings.checks),
        signer=open_signer(settings),
        metrics=Metrics(worker, lambda: admission.state, lambda: faces.count),
        tracing=tracing,
        threads=ThreadPoolExecutor(PICTURE_THREADS, thread_name_prefix="fastface-pictures"),
    )


async def _sweep(context: Context) -> None:
    """Drop faces whose time is over, and as often what workers keep of any face.

    Memory of bodies and their pictures goes back to the system, which the C library keeps for long.
    """
    forgotten, bytes_read = time.monotonic(), 0
    while True:
        await asyncio.sleep(min(SWEEP_SECONDS, context.settings.faces_ttl))
        await context.faces.forget_expired()
        if time.monotonic() - forgotten >= context.settings.faces_ttl:
            forgotten = time.monotonic()
            context.worker.forget()
        if context.admission.bytes_read != bytes_read:
            bytes_read = context.admission.bytes_read
            await asyncio.to_thread(give_memory_back)


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(FastFaceError)
    async def known(request: Request, error: FastFaceError) -> Response:
        record = record_of(request.scope)
        record.outcome = "disconnected" if isinstance(error, ClientGone) else error.code
        if is_internal(error):
            record.failure = error
        return error_answer(error, record.id)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return await known(request, invalid_field(error.errors()))

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        return http_error_answer(error)

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return await known(request, ClientGone("The client has gone."))


def about_router() -> APIRouter:
    """The routes of models, presets, health and metrics."""
    router = APIRouter()
    keyed = [Depends(has_passed_the_gate)]

    @router.get(
        "/v1/models",
        response_model=ModelList,
        responses=refusals(401, 429),
        tags=["models"],
        dependencies=keyed,
    )
    async def models(request: Request) -> Response:
        """The served export and what it can do."""
        context = context_of(request)
        return json_answer(ModelList(data=[_model(context, id) for id in context.model_names]))

    @router.get(
        "/v1/models/{id:path}",
        response_model=ModelAnswer,
        responses=refusals(401, 404, 429),
        tags=["models"],
        dependencies=keyed,
    )
    async def one_model(request: Request, id: str) -> Response:
        """The same of one by its name."""
        context = context_of(request)
        known = context.model_names
        if id not in known:
            raise UnknownModel(
                "There is no such model here.", f"It serves {' and '.join(known)}.", param="id"
            )
        return json_answer(_model(context, id))

    @router.get(
        "/v1/presets",
        response_model=PresetList,
        responses=refusals(401, 429),
        tags=["models"],
        dependencies=keyed,
    )
    async def presets(request: Request) -> Response:
        """The presets, and what each sets."""
        return json_answer(PresetList(data=_presets(context_of(request))))

    @router.get("/v2/health/live", response_model=HealthAnswer, tags=["health"])
    async def live(request: Request) -> Response:
        """Whether the process answers at all."""
        return json_answer(HealthAnswer(state=context_of(request).admission.state.value))

    # The names that other servers and platforms have for it.
    @router.api_route("/health", methods=["GET", "HEAD"], include_in_schema=False)
    @router.api_route("/healthz", methods=["GET", "HEAD"], include_in_schema=False)
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
        if context_of(request).settings.metrics_keys:
            await has_passed_the_gate(request)
        return Response(context_of(request).metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return router


def _model(context: Context, id: str) -> ModelAnswer:
    manifest = context.manifest
    return ModelAnswer(
        id=id,
        created=context.started,
        owned_by="fastface-trt",
        size=f"{manifest.width}x{manifest.height}",
        fixed_size=manifest.fixed_size,
        size_unit=manifest.size_unit,
        steps=manifest.steps,
        allowed_steps=list(manifest.allowed_steps),
        max_pictures=context.settings.max_pictures,
        backend=context.backend,
        checkpoint=manifest.checkpoint,
        adapter=manifest.adapter,
        adapter_kind=manifest.adapter_kind,
        max_faces=manifest.max_faces,
        precision=manifest.precision,
        scheduler=str(manifest.scheduler["class"]),
    )


def _presets(context: Context) -> list[PresetAnswer]:
    answers = []
    for name in PRESETS:
        values = request_for(context.manifest, name, preset=name).to_dict()
        fields = preset_fields(name, context.manifest.steps)
        answers.append(
            PresetAnswer(
                name=name,
                description=DESCRIPTIONS[name],
                fields={field: values[field] for field in fields},
            )
        )
    return answers
