"""The tasks of a batcher and its state: what its threads share, behind one lock."""

import threading
from collections.abc import Callable, Sequence

from fastface_trt.errors import FastFaceError, Unavailable
from fastface_trt.serving.batching.entry import Entry
from fastface_trt.serving.work import State

Admit = Callable[[Sequence[Entry]], None]
"""Raises where a new task must not come behind these."""


class TaskTable:
    """Tasks by id in the order in which they came; threads may share it.

    Only the engine thread removes tasks, after it told their last event, so `drain` returns when
    everybody was told.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._entries: dict[str, Entry] = {}
        self._state = State.STARTING
        self._failure: FastFaceError | None = None
        self._closing = False

    @property
    def state(self) -> State:
        """How the batcher is."""
        return self._state

    def entries(self) -> list[Entry]:
        """Every task that has not ended."""
        with self._changed:
            return list(self._entries.values())

    def add(self, entry: Entry, admit: Admit) -> None:
        """Take a task in, unless not READY (`Unavailable`) or `admit` raises."""
        with self._changed:
            if self._state is not State.READY or self._closing:
                raise Unavailable(f"This worker is {self._state.value}.", "Try again later.")
            if entry.task.id in self._entries:
                raise ValueError(f"A task {entry.task.id!r} is in work already.")
            admit(list(self._entries.values()))
            self._entries[entry.task.id] = entry
            self._changed.notify_all()

    def cancel(self, task_id: str) -> None:
        """Mark a task; the engine thread ends it."""
        with self._changed:
            if task_id in self._entries:
                self._entries[task_id].cancelled = True

    def remove(self, entry: Entry) -> None:
        """A task ended."""
        with self._changed:
            del self._entries[entry.task.id]
            self._changed.notify_all()

    def wait_for_work(self) -> list[Entry]:
        """The tasks, as soon as there are any; none when the batcher is being closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._entries)
            return [] if self._closing else list(self._entries.values())

    def ready(self) -> None:
        """Warm-up is over."""
        with self._changed:
            if self._state is State.STARTING:
                self._state = State.READY
            self._changed.notify_all()

    def dead(self, failure: FastFaceError) -> None:
        """The engines failed for good; the first failure is what `wait_until_started` raises."""
        with self._changed:
            self._state = State.DEAD
            self._failure = self._failure or failure
            self._changed.notify_all()

    def wait_until_started(self) -> None:
        """Until warm-up is over; raises what it failed with."""
        with self._changed:
            self._changed.wait_for(lambda: self._state is not State.STARTING or self._closing)
            if self._failure is not None:
                raise self._failure

    def drain(self, seconds: float) -> bool:
        """Take no more tasks; whether all ended in that time."""
        with self._changed:
            if self._state is State.READY:
                self._state = State.DRAINING
            return self._changed.wait_for(lambda: not self._entries, seconds)

    def close(self) -> None:
        """Let the engine thread end."""
        with self._changed:
            self._closing = True
            if self._state is not State.DEAD:
                self._state = State.DRAINING
            self._changed.notify_all()
