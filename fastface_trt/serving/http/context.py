"""What the routes of one server share, and who closes it."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import HTTPConnection

from fastface_trt.engines.manifest import ExportManifest
from fastface_trt.serving.http.admission import Admission
from fastface_trt.serving.http.faces import Faces
from fastface_trt.serving.http.metrics import Metrics
from fastface_trt.serving.http.middleware import ApiKeys, RateLimit
from fastface_trt.serving.http.tracing import Tracing
from fastface_trt.serving.pictures.checks import Checks
from fastface_trt.serving.pictures.provenance import PictureSigner
from fastface_trt.serving.settings import ServerSettings
from fastface_trt.serving.work import Worker

PICTURE_THREADS = 2
"""Pictures that are decoded or encoded at once: one of 40 megapixels takes hundreds of megabytes on
the way, and they share the cores with the engines."""

Value = TypeVar("Value")


@dataclass(frozen=True)
class Context:
    """Everything that a request may need."""

    worker: Worker
    settings: ServerSettings
    manifest: ExportManifest
    backend: str | None
    started: int
    admission: Admission
    keys: ApiKeys
    limit: RateLimit
    faces: Faces
    checks: Checks
    signer: PictureSigner | None
    metrics: Metrics
    tracing: Tracing
    threads: ThreadPoolExecutor

    @property
    def model_names(self) -> tuple[str, ...]:
        """What clients may ask for as `model`, the export's own name first."""
        return tuple(dict.fromkeys((self.manifest.checkpoint, *self.settings.model_names)))

    async def in_thread(self, function: Callable[..., Value], *arguments: Any) -> Value:
        """Run what is done to pictures on one of few threads, beside the event loop."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.threads, lambda: function(*arguments))

    def close(self) -> None:
        """Forget the faces, send the last traces, end the threads, forget the key."""
        self.faces.close()
        self.tracing.close()
        self.threads.shutdown(wait=False, cancel_futures=True)
        if self.signer is not None:
            self.signer.close()


def context_of(connection: HTTPConnection) -> Context:
    """The context of the server that a request came to."""
    context = connection.app.state.context
    assert isinstance(context, Context)
    return context
