"""CUDA graphs of engines: the launches of one run, recorded once and replayed as a whole.

A graph freezes shapes and addresses, so it is found by both. It is recorded from a run whose shapes
the execution context has run before: the first run after a change of shapes does work of its own
that must not be recorded.
"""

from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from fastface_trt.engines.cuda.driver import Driver, Handle
from fastface_trt.errors import EngineFailed

_KEPT = 64
"""Each holds some device memory; a picture needs at most one per module and branch count."""


@dataclass(frozen=True)
class GraphKey:
    """What a graph is for. `engine` tells engines apart; addresses include the scratch memory's."""

    engine: int
    profile: int
    shapes: tuple[tuple[int, ...], ...]
    addresses: tuple[int, ...]


@dataclass(slots=True)
class GraphCounts:
    """How often a run was replayed, recorded, and refused to be recorded."""

    replayed: int = 0
    captured: int = 0
    refused: int = 0


class Graphs:
    """The graphs of one stream; used by the stream's thread only."""

    def __init__(self, driver: Driver, stream: Handle, warn: Callable[[str], None]) -> None:
        self.counts = GraphCounts()
        self._driver, self._stream, self._warn = driver, stream, warn
        self._graphs: OrderedDict[GraphKey, Handle] = OrderedDict()
        self._refused: set[GraphKey] = set()

    def __len__(self) -> int:
        return len(self._graphs)

    def replay(self, key: GraphKey) -> bool:
        """Replay the graph for `key`; False when there is none."""
        graph = self._graphs.get(key)
        if graph is None:
            return False
        self._graphs.move_to_end(key)
        self._driver.graph_launch(graph, self._stream)
        self.counts.replayed += 1
        return True

    def capture(self, key: GraphKey, enqueue: Callable[[], None]) -> bool:
        """Record what `enqueue` puts on the stream, and replay it once.

        False when it cannot be recorded: then nothing was done, `warn` is told once, and the key is
        not tried again.
        """
        if key in self._refused:
            return False
        try:
            graph = self._record(enqueue)
            try:
                executable = self._driver.graph_instantiate(graph)
            finally:
                self._driver.graph_destroy(graph)
        except EngineFailed as error:
            self._refused.add(key)
            self.counts.refused += 1
            self._warn(f"No CUDA graph, launching kernels one by one: {error.message}")
            return False
        self._graphs[key] = executable
        self.counts.captured += 1
        while len(self._graphs) > _KEPT:
            self._destroy(next(iter(self._graphs)))
        return self.replay(key)

    def forget(self, *, engine: int | None = None, address: int | None = None) -> None:
        """Destroy the graphs of an engine, or those that use an address, before it is freed."""
        for key in [*self._graphs, *self._refused]:
            if key.engine == engine or address in key.addresses:
                self._refused.discard(key)
                self._destroy(key)

    def close(self) -> None:
        """Destroy every graph."""
        for key in list(self._graphs):
            self._destroy(key)

    def _record(self, enqueue: Callable[[], None]) -> Handle:
        self._driver.capture_begin(self._stream)
        try:
            enqueue()
        except BaseException:
            # The stream must leave the recording whatever went wrong in it.
            with suppress(EngineFailed):  # a recording that broke has no graph
                self._driver.graph_destroy(self._driver.capture_end(self._stream))
            raise
        return self._driver.capture_end(self._stream)

    def _destroy(self, key: GraphKey) -> None:
        executable = self._graphs.pop(key, None)
        if executable is not None:
            # It may still be running.
            self._driver.stream_synchronize(self._stream)
            self._driver.graph_exec_destroy(executable)
