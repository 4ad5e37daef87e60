"""CUDA events that take the time: points of a stream, read when the GPU has passed them."""

from collections import deque

from fastface_trt.engines.cuda.driver import Driver, Handle
from fastface_trt.engines.device import Marker
from fastface_trt.errors import EngineFailed


class Event:
    """A recorded timing event. Its handle is used again once nobody holds the event any more."""

    __slots__ = ("_events", "handle")

    def __init__(self, handle: Handle, events: "TimingEvents") -> None:
        self.handle = handle
        self._events = events

    def seconds_since(self, earlier: Marker) -> float:
        """Seconds between two events by the GPU's clock; waits until the GPU has reached this one.

        Raises `EngineFailed` when their device was closed.
        """
        if not isinstance(earlier, Event):
            raise TypeError("the earlier point is not a CUDA event")
        return self._events.seconds(earlier.handle, self.handle)

    def __del__(self) -> None:
        # It may come on any thread and in the middle of anything, so it makes no CUDA call.
        self._events.unused.append(self.handle)


class TimingEvents:
    """The timing events of one device; any thread may record them."""

    def __init__(self, driver: Driver, context: Handle) -> None:
        self._driver, self._context = driver, context
        self._all: deque[Handle] = deque()
        self._closed = False
        self.unused: deque[Handle] = deque()

    def record(self, stream: Handle) -> Event:
        """An event behind what is on `stream` now."""
        try:
            handle = self.unused.popleft()
        except IndexError:
            handle = self._driver.timing_event_create()
            self._all.append(handle)
        self._driver.event_record(handle, stream)
        return Event(handle, self)

    def seconds(self, earlier: Handle, later: Handle) -> float:
        """Seconds between two recorded events."""
        if self._closed:
            raise EngineFailed(
                "The device of these times is closed.", "Read them before the model is closed."
            )
        # Whoever reads the times may be a thread that never worked on the GPU.
        self._driver.use_context(self._context)
        return self._driver.event_seconds(earlier, later)

    def close(self) -> None:
        """Destroy every event, also those that somebody still holds."""
        self._closed = True
        self.unused.clear()
        while self._all:
            self._driver.event_destroy(self._all.popleft())
