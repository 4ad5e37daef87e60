"""Whether a request is let in at all, decided before a byte of its body is read."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fastface_trt.errors import Busy, Unavailable
from fastface_trt.serving.http.errors import Overloaded
from fastface_trt.serving.work import Load, State, Worker

REMEMBERED = 2.0
"""Seconds for which a refusal of the worker is remembered at most."""


@dataclass(frozen=True, slots=True)
class _Refusal:
    """What the worker said, and how busy it was."""

    until: float
    load: Load
    message: str
    hint: str
    retry_after: float


class Admission:
    """Counts the requests in work, and remembers that the worker just refused. Of one thread."""

    def __init__(
        self, worker: Worker, max_requests: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._worker, self._max_requests, self._clock = worker, max_requests, clock
        self._refused: _Refusal | None = None
        self.in_work = 0
        self.leaving = False
        """The server is about to stop, and takes nothing more."""

    @property
    def state(self) -> State:
        """The worker's state; DRAINING from the moment the server is told to stop."""
        state = self._worker.state
        return State.DRAINING if self.leaving and state is State.READY else state

    @contextmanager
    def enter(self) -> Iterator[None]:
        """A request in work. Raises `Unavailable`, `Overloaded` or `Busy`."""
        self._check()
        self.in_work += 1
        try:
            yield
        finally:
            self.in_work -= 1

    def _check(self) -> None:
        state = self.state
        if state is not State.READY:
            raise Unavailable(f"The server is {state.value}.", "Try again in a moment.")
        if self.in_work >= self._max_requests:
            raise Overloaded(
                f"The server works on {self.in_work} requests already.", "Try again in a moment."
            )
        refusal = self._refused
        if refusal is not None:
            now = self._worker.load()
            if (
                self._clock() < refusal.until
                and now.waiting >= refusal.load.waiting
                and now.backlog_seconds >= refusal.load.backlog_seconds
            ):
                raise Busy(refusal.message, refusal.hint, retry_after=refusal.retry_after)
            self._refused = None

    def remember(self, error: Busy) -> None:
        """The worker refused a task.

        As long as it has as much to do as now, the next one would be refused too, and only after
        its face was decoded and analysed, which takes time from those that were let in.
        """
        seconds = error.retry_after
        until = self._clock() + min(seconds, REMEMBERED)
        load = self._worker.load()
        self._refused = _Refusal(until, load, error.message, error.hint, seconds)
