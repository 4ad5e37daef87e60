"""Where the time of a call goes: spans with a name, which the pipeline opens around its stages.

A `Timeline` records nothing and costs next to nothing; a `Recorder` keeps every span. Work on a GPU
is timed by events on the thread's stream, which are read when the call is over, so that looking
does not change what is looked at.
"""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from time import perf_counter
from types import TracebackType
from typing import Any, Final

from fastface_trt.engines.device import Device, Marker

Ranges = Callable[[str], AbstractContextManager[Any]]
"""Opens a range of a profiler, such as NVTX, for the time of a span."""

_NOTHING: Final = nullcontext()


class Timeline:
    """Is told the stages of a call and forgets them."""

    def span(
        self, name: str, device: Device | None = None, **attributes: Any
    ) -> AbstractContextManager[Any]:
        """The stage `name` lasts as long as the block; on `device` where its work runs there."""
        return _NOTHING


NO_TIMELINE: Final = Timeline()


@dataclass(frozen=True, slots=True)
class Span:
    """A stage that is over.

    start, seconds: on the host, by the recorder's clock; on a GPU that is how long queueing the
    work took. device_start, device_seconds: by the device's events, set on the same axis as the
    host's; None where the work was done on the host. depth: how many spans it lies in; leaf: none
    lies in it.
    """

    name: str
    attributes: dict[str, Any]
    thread: int
    depth: int
    leaf: bool
    start: float
    seconds: float
    device_start: float | None = None
    device_seconds: float | None = None

    @property
    def duration(self) -> float:
        """Seconds that the work itself took, wherever it ran."""
        return self.seconds if self.device_seconds is None else self.device_seconds


@dataclass(slots=True)
class _Open:
    """A span on its way; marks are None where the host's clock tells the same."""

    name: str
    attributes: dict[str, Any]
    thread: int
    depth: int
    start: float = 0.0
    end: float = 0.0
    leaf: bool = True
    started: Marker | None = None
    ended: Marker | None = None


@dataclass(slots=True)
class _Thread:
    """Open spans of a thread, and one moment by both clocks."""

    stack: list[_Open] = field(default_factory=list)
    origin: tuple[float, Marker] | None = None


class Recorder(Timeline):
    """Keeps the spans of any number of threads, in the order in which they ended.

    `clock` gives seconds from any origin and never goes back. `ranges` opens a profiler's range for
    every span.
    """

    def __init__(
        self, clock: Callable[[], float] = perf_counter, ranges: Ranges | None = None
    ) -> None:
        self._clock = clock
        self._ranges = ranges
        self._done: list[_Open] = []
        self._threads: dict[int, _Thread] = {}

    def span(
        self, name: str, device: Device | None = None, **attributes: Any
    ) -> AbstractContextManager[Any]:
        """Spans of a thread nest; an exception ends them too."""
        return _Block(self, name, device, attributes)

    def spans(self) -> list[Span]:
        """Every span that is over; waits for a GPU, so call it when the work is done."""
        return [self._read(one) for one in self._done]

    def _open(self, name: str, attributes: dict[str, Any], device: Device | None) -> _Open:
        ident = threading.get_ident()
        thread = self._threads.setdefault(ident, _Thread())
        for outer in thread.stack[-1:]:
            outer.leaf = False
        one = _Open(name, attributes, ident, len(thread.stack))
        thread.stack.append(one)
        one.started = None if device is None else device.mark()
        one.start = self._clock()
        if one.started is not None and thread.origin is None:
            thread.origin = (one.start, one.started)
        return one

    def _close(self, one: _Open, device: Device | None) -> None:
        one.end = self._clock()
        one.ended = None if device is None else device.mark()
        self._threads[one.thread].stack.remove(one)
        self._done.append(one)

    def _read(self, one: _Open) -> Span:
        origin = self._threads[one.thread].origin
        start = seconds = None
        if origin is not None and one.started is not None and one.ended is not None:
            start = origin[0] + one.started.seconds_since(origin[1])
            seconds = one.ended.seconds_since(one.started)
        return Span(
            one.name,
            one.attributes,
            one.thread,
            one.depth,
            one.leaf,
            one.start,
            one.end - one.start,
            start,
            seconds,
        )


class _Block:
    """The context manager of one span."""

    __slots__ = ("_attributes", "_device", "_name", "_one", "_ranges", "_recorder")

    def __init__(
        self, recorder: Recorder, name: str, device: Device | None, attributes: dict[str, Any]
    ) -> None:
        self._recorder, self._name = recorder, name
        self._device, self._attributes = device, attributes
        self._ranges = ExitStack()

    def __enter__(self) -> None:
        if self._recorder._ranges is not None:
            self._ranges.enter_context(self._recorder._ranges(_label(self._name, self._attributes)))
        self._one = self._recorder._open(self._name, self._attributes, self._device)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._recorder._close(self._one, self._device)
        self._ranges.close()


def _label(name: str, attributes: dict[str, Any]) -> str:
    return " ".join([name, *(f"{key}={value}" for key, value in attributes.items())])
