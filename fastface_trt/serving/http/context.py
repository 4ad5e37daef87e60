"""What the routes of one server share, and who closes it."""

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
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

PICTURE_THREADS = 3
"""Pictures that are decoded or encoded at once, at most two of them of one owner: one of 40
megapixels takes hundreds of megabytes on the way, and they share the cores with the engines."""
PICTURES_IN_HAND = 4
"""Pictures that are being decoded or analysed, one of each owner: 120 MB each at the largest, for a
file of some kilobytes, and seconds of an engine that analyses them in order of arrival."""

Value = TypeVar("Value")


class Turns:
    """`places`, of which an owner holds `each` at most, and for which owners take turns.

    Whoever brings a hundred things waits for its own, and others for one of them. Of one thread.
    """

    def __init__(self, places: int, each: int) -> None:
        self._places, self._each = places, each
        self._held: Counter[str] = Counter()
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # owners, the next one first

    async def take(self, owner: str) -> None:
        """Wait for a place, which `give_back` ends."""
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(owner, deque()).append(turn)
        self._next()
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # both at once
                self.give_back(owner)
            raise

    def give_back(self, owner: str) -> None:
        """The place goes to whose turn it is."""
        self._held -= Counter([owner])
        self._next()

    @asynccontextmanager
    async def of(self, owner: str) -> AsyncIterator[None]:
        """A place for as long as the block lasts."""
        await self.take(owner)
        try:
            yield
        finally:
            self.give_back(owner)

    def _next(self) -> None:
        """Free places go to who holds fewest of them, and of those to who came first."""
        while self._waiting and self._held.total() < self._places:
            owner = min(self._waiting, key=lambda one: self._held[one])
            if self._held[owner] >= self._each:
                return
            turns = self._waiting.pop(owner)
            turn = turns.popleft()
            if turns:
                self._waiting[owner] = turns  # behind the others
            if not turn.done():  # else it left before its turn
                self._held[owner] += 1
                turn.set_result(None)


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
    thread_turns: Turns = field(default_factory=lambda: Turns(PICTURE_THREADS, PICTURE_THREADS - 1))
    pictures_in_hand: Turns = field(default_factory=lambda: Turns(PICTURES_IN_HAND, 1))

    @property
    def model_names(self) -> tuple[str, ...]:
        """What clients may ask for as `model`, the export's own name first."""
        return tuple(dict.fromkeys((self.manifest.checkpoint, *self.settings.model_names)))

    async def in_thread(self, owner: str, function: Callable[..., Value], *arguments: Any) -> Value:
        """Run what is done to an owner's pictures on one of few threads, beside the event loop."""
        loop = asyncio.get_running_loop()
        await self.thread_turns.take(owner)

        def ended(_: object) -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self.thread_turns.give_back, owner)

        try:
            working = self.threads.submit(function, *arguments)
        except RuntimeError:  # the server stops
            self.thread_turns.give_back(owner)
            raise
        # Not when the awaiting ends: a client that leaves does not stop its thread.
        working.add_done_callback(ended)
        return await asyncio.wrap_future(working)

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
