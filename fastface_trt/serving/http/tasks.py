"""Waiting for a worker: the tasks of one HTTP request, all let in or none, and none left behind.

Beside them, work that ends with its deadline or its client.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import suppress
from math import inf
from types import TracebackType
from typing import Any, TypeVar

from starlette.types import Receive

from fastface_trt.errors import Busy, Cancelled, DeadlinePassed
from fastface_trt.serving.http.admission import Admission
from fastface_trt.serving.http.metrics import Metrics
from fastface_trt.serving.work import Event, PictureDone, StepDone, Task, TaskFailed, Worker

GRACE = 1.0
"""Seconds past a deadline for the worker to say so itself."""
Value = TypeVar("Value")


class SubmittedTasks:
    """The tasks of one request: submitted when it is entered, cancelled when it is left.

    Entering raises what `Worker.submit` raises, and then none of the tasks is left in the worker.
    """

    def __init__(
        self, worker: Worker, tasks: Sequence[Task], admission: Admission, metrics: Metrics
    ) -> None:
        self._worker, self._tasks = worker, tuple(tasks)
        self._admission, self._metrics = admission, metrics
        self._index = {task.id: index for index, task in enumerate(self._tasks)}
        self._open: set[str] = set()
        self._left = False
        self._queue: asyncio.Queue[Event | None] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    async def __aenter__(self) -> "SubmittedTasks":
        try:
            # A worker may have to write to a pipe; the event loop must not wait for that.
            await asyncio.to_thread(self._submit)
        except BaseException as error:
            if isinstance(error, Busy):
                self._admission.remember(self._tasks[0].owner, error)
            self._leave()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._leave()

    def _submit(self) -> None:
        for task in self._tasks:
            if self._left:
                return
            self._open.add(task.id)
            try:
                self._worker.submit(task, self._on_event)
            except BaseException:
                self._open.discard(task.id)
                raise
            if self._left:  # left while the task went in, so nobody else knows of it
                self._worker.cancel(task.id)

    def _on_event(self, event: Event) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._queue.put_nowait, event)

    def _leave(self) -> None:
        self._left = True
        left, self._open = self._open, set()
        if left:
            for _ in left:
                self._metrics.task_ended("cancelled")
            self._loop.run_in_executor(None, self._cancel, left)

    def _cancel(self, ids: set[str]) -> None:
        for one in ids:
            self._worker.cancel(one)

    async def events(
        self, heartbeat: float | None = None
    ) -> AsyncIterator[tuple[int, StepDone | PictureDone] | None]:
        """What happens, with the index of the task, until all are done; None at each heartbeat.

        Raises the error of the first task that fails, and `DeadlinePassed`.
        """
        deadlines = [task.deadline for task in self._tasks if task.deadline is not None]
        end = min(deadlines) + GRACE if deadlines else inf
        while self._open:
            event = await self._next(min(heartbeat or inf, end - time.monotonic()))
            if event is None:
                if time.monotonic() >= end:
                    raise DeadlinePassed("The pictures were not done by their deadline.")
                yield None
                continue
            if not isinstance(event, StepDone):
                self._open.discard(event.id)
            if isinstance(event, TaskFailed):
                self._metrics.task_ended(event.error.code)
                raise event.error
            if isinstance(event, PictureDone):
                self._metrics.task_ended("picture")
                self._metrics.picture(event.seconds)
            yield self._index[event.id], event

    async def _next(self, seconds: float) -> Event | None:
        """The next event, or None after so many seconds."""
        if seconds == inf:
            return await self._queue.get()
        # Not `asyncio.wait_for`: before Python 3.12 it may swallow a cancellation that comes
        # together with an event, and nobody would free the rows of a client that has left.
        alarm = self._loop.call_later(max(seconds, 0), self._queue.put_nowait, None)
        try:
            return await self._queue.get()
        finally:
            alarm.cancel()


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


class ClientGone(Cancelled):
    """The client does not wait for its answer any more."""


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, Value]) -> Value:
    """The result of `work`, which is cancelled when the client goes. Raises `ClientGone`.

    The body must have been read.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone("The client has gone.")
        return working.result()
    finally:
        await end_of({working, leaving})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def end_of(tasks: set[asyncio.Future[Any]]) -> None:
    """Cancel tasks, and wait until they have ended; how they ended does not matter any more."""
    while left := {task for task in tasks if not task.done()}:
        for task in left:
            task.cancel()
        # Again after a while: something that they wait in may have swallowed it.
        await asyncio.wait(left, timeout=1)
    for task in tasks:
        if not task.cancelled():
            task.exception()  # or asyncio complains, with a text that may quote the client
