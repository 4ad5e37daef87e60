"""What runs in each replica: a batcher and the HTTP app over it, changed together without a gap.

`Replica` is what Ray Serve calls; `CurrentExport` sends requests to the `ServedExport` in use.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from starlette.types import ASGIApp, Receive, Scope, Send

from fastface_trt.engines.children import leave_with_starter
from fastface_trt.engines.manifest import ExportManifest
from fastface_trt.runtime.export_folder import Export
from fastface_trt.serving.batching import Batcher
from fastface_trt.serving.batching.opening import open_batcher
from fastface_trt.serving.http.app import create_app
from fastface_trt.serving.ray.arguments import Checkpoint, RayArguments
from fastface_trt.serving.ray.faces import SharedFaces, ask_actor
from fastface_trt.serving.settings import WorkerSettings
from fastface_trt.serving.storage.distribution import with_obtained
from fastface_trt.serving.work import State, Worker

if TYPE_CHECKING:
    from fastapi import FastAPI


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
        self._current = CurrentExport(self._arguments.drain_seconds)
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

    def _serve(self, batcher: Batcher, manifest: ExportManifest) -> "ServedExport":
        app = create_app(
            batcher,
            self._arguments.server,
            manifest,
            backend=self._arguments.backend,
            faces=self._faces,
        )
        return ServedExport(batcher, app)


class RayReplica(Replica):
    """The class that Ray Serve gets: it ends with its node, and its finaliser is awaited."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        leave_with_starter()
        super().__init__(arguments)

    async def __del__(self) -> None:
        await self.close()


def _open(settings: WorkerSettings) -> tuple[Batcher, ExportManifest]:
    settings = with_obtained(settings, progress=logging.getLogger(LOGGER).info)
    export = Export.open(settings.export, schedule_of=settings.schedule_of)
    return open_batcher(settings), export.manifest


class ServedExport:
    """One export, served: its worker, its HTTP app, and the requests inside."""

    def __init__(self, worker: Worker, app: "FastAPI") -> None:
        self.worker = worker
        self._app = app
        self._requests = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._stop = asyncio.Event()
        self._running: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Run the app's start; raises what it raises."""
        started: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        async def run() -> None:
            # In one task, as the frameworks under an app's lifespan want it.
            try:
                async with self._app.router.lifespan_context(self._app):
                    started.set_result(None)
                    await self._stop.wait()
            except BaseException as error:
                if started.done():
                    raise
                started.set_exception(error)

        self._running = asyncio.create_task(run(), name="lifespan")
        await started

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._requests += 1
        self._idle.clear()
        try:
            await self._app(scope, receive, send)
        finally:
            self._requests -= 1
            if not self._requests:
                self._idle.set()

    async def retire(self, seconds: float) -> None:
        """Let the requests inside end for so long, then end them; closes the app and the worker."""
        with suppress(asyncio.TimeoutError):  # closing the worker ends what is left
            await asyncio.wait_for(self._idle.wait(), seconds)
        await asyncio.to_thread(self.worker.close)
        self._stop.set()
        if self._running is not None:
            await self._running


class CurrentExport:
    """Which of the served exports new requests go to."""

    def __init__(self, seconds_to_retire: float) -> None:
        self._seconds = seconds_to_retire
        self._served: ServedExport | None = None
        self._retiring: set[asyncio.Task[None]] = set()

    @property
    def worker(self) -> Worker | None:
        """The worker of new requests."""
        return None if self._served is None else self._served.worker

    async def replace(self, make: Callable[[], ServedExport]) -> None:
        """Open another export beside the one in use, then send new requests to it.

        `make` runs on the event loop and returns what is warm. The requests inside the old one end
        there. Where opening fails, the old one stays.
        """
        served = make()
        try:
            await served.start()
        except BaseException:
            await asyncio.to_thread(served.worker.close)
            raise
        old, self._served = self._served, served
        if old is not None:
            task = asyncio.create_task(old.retire(self._seconds), name="retiring export")
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Start and end of an app's life are those of the exports, not of the server."""
        if scope["type"] == "lifespan":
            await _live(receive, send)
            return
        assert self._served is not None, "Ray Serve sends requests after reconfigure"
        await self._served(scope, receive, send)

    async def close(self) -> None:
        """End what is there; requests inside are waited for."""
        served, self._served = self._served, None
        if served is not None:
            await served.retire(self._seconds)
        if self._retiring:
            await asyncio.gather(*self._retiring)


async def _live(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
