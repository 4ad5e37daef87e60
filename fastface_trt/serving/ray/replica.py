"""What runs in each replica: a batcher and the HTTP app over it, changed together without a gap."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.types import ASGIApp

from fastface_trt.engines.manifest import EXPORT_MANIFEST, ExportManifest, read_manifest
from fastface_trt.export_folder import find_export, with_schedule_of
from fastface_trt.serving.batching import Batcher
from fastface_trt.serving.batching.opening import open_batcher
from fastface_trt.serving.distribution import with_obtained
from fastface_trt.serving.http.app import create_app
from fastface_trt.serving.ray.arguments import Checkpoint, RayArguments
from fastface_trt.serving.ray.faces import SharedFaces, ask_actor
from fastface_trt.serving.ray.served import Current, Served
from fastface_trt.serving.settings import WorkerSettings
from fastface_trt.serving.work import State

LOGGER = "fastface_trt.serving.ray"


class Replica:
    """A Ray Serve deployment's class; Ray calls everything here on one event loop.

    `ask` reaches the registry of faces; see `SharedFaces`.
    """

    def __init__(
        self, arguments: dict[str, Any], ask: Callable[..., Awaitable[Any]] = ask_actor
    ) -> None:
        self._arguments = RayArguments.model_validate(arguments)
        self._faces = SharedFaces(ask)
        self._current = Current(self._arguments.drain_seconds)
        self._changing = asyncio.Lock()
        self._checkpoint: Checkpoint | None = None

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return self._current

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve this checkpoint: at the start, and in place of another while that goes on.

        The new export is obtained, opened and warmed up beside the old one, which therefore needs
        memory for two. Where it fails, Ray Serve replaces the replica.
        """
        checkpoint = Checkpoint.model_validate(user_config)
        async with self._changing:
            if checkpoint == self._checkpoint:
                return
            settings = self._arguments.worker.model_copy(update=checkpoint.model_dump())
            batcher, manifest = await asyncio.to_thread(_open, settings)
            await self._current.replace(lambda: self._serve(batcher, manifest))
            self._checkpoint = checkpoint

    def check_health(self) -> None:
        """Raises when the engines failed for good; Ray Serve then replaces the replica."""
        worker = self._current.worker
        if worker is not None and worker.state is State.DEAD:
            raise RuntimeError("the engines of this replica failed for good")

    async def close(self) -> None:
        """End the requests inside with their answers, and free the engines."""
        await self._current.close()

    def _serve(self, batcher: Batcher, manifest: ExportManifest) -> Served:
        app = create_app(
            batcher,
            self._arguments.server,
            manifest,
            backend=self._arguments.backend,
            faces=self._faces,
        )
        return Served(batcher, app)


class RayReplica(Replica):
    """The class that Ray Serve gets: it awaits the finaliser of what it stops."""

    async def __del__(self) -> None:
        await self.close()


def _open(settings: WorkerSettings) -> tuple[Batcher, ExportManifest]:
    settings = with_obtained(settings, progress=logging.getLogger(LOGGER).info)
    manifest = read_manifest(find_export(settings.export) / EXPORT_MANIFEST, ExportManifest)
    if settings.schedule_of is not None:
        manifest = with_schedule_of(manifest, settings.schedule_of)
    return open_batcher(settings), manifest
