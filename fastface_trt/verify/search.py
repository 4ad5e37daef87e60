"""Find the tensor where two evaluations of one graph part, with as few evaluations as possible.

Knows nothing of ONNX or engines: a graph is names with their producers, an evaluation is a function
that measures some of them. Each evaluation asks for a few tensors, so it narrows the search as a
bisection does, (marks + 1)-fold.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fastface_trt.verify.difference import Difference

Measure = Callable[[Sequence[str]], Mapping[str, Difference]]
"""Builds both sides with these tensors as outputs and compares them."""

_INHERITED = 2.0
"""An error up to this many times a producer's excused one comes from there."""


class TensorGraph(Protocol):
    """The tensors that can be compared, in topological order, and what each is computed from."""

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors, in topological order."""
        ...

    def producers(self, name: str) -> frozenset[str]:
        """The nearest tensors that `name` is computed from."""
        ...

    def ancestors(self, name: str) -> frozenset[str]:
        """All tensors that `name` is computed from."""
        ...


@dataclass(frozen=True)
class Found:
    """Where the search ended.

    `name` is beyond the tolerance and none of its `producers` is. With `vanished`, the difference
    of `name` disappears as soon as these tensors are returned, too: it comes from a fusion across
    them. With `excused`, no operator is at fault: sums that cancel amplify rounding errors which
    are within the tolerance of their operands.
    """

    name: str
    difference: Difference
    producers: Mapping[str, Difference] = field(default_factory=dict)
    vanished: tuple[str, ...] = ()
    excused: bool = False


class Search:
    """One search; `known` and `builds` say what was measured, and in how many evaluations."""

    def __init__(
        self,
        graph: TensorGraph,
        measure: Measure,
        tolerance: float,
        *,
        marks: int = 16,
        known: Mapping[str, Difference] | None = None,
    ) -> None:
        self.graph = graph
        self.known: dict[str, Difference] = dict(known or {})
        self.builds = 0
        self._measure = measure
        self._tolerance = tolerance
        self._marks = marks
        self._order = {name: index for index, name in enumerate(graph.names)}

    def run(self, start: str, difference: Difference) -> Found:
        """The first tensor at fault among `start`, which is beyond the tolerance, and above it."""
        self.known[start] = difference
        trail = [start]
        marks = self._marks
        while trail:
            current = trail[-1]
            if self._excused(current):
                trail.pop()
                continue
            above = self.graph.ancestors(current)
            bad = self._in_order(name for name in self.known if name in above and self._bad(name))
            if bad:
                trail.append(bad[0])
                continue
            wanted = self._candidates(current, above, marks)
            if not wanted:
                producers = self.graph.producers(current)
                around = {name: self.known[name] for name in self._in_order(producers)}
                return Found(current, self.known[current], around)
            measured = dict(self._measure([*wanted, current]))
            self.builds += 1
            again = measured.pop(current)
            self.known.update(measured)
            if not again.exceeds(self._tolerance) and not any(map(self._bad, measured)):
                for name in measured:  # says nothing about the engine without these outputs
                    del self.known[name]
                if len(wanted) == 1:
                    return Found(current, self.known[current], vanished=tuple(wanted))
                marks = len(wanted) // 2  # fewer outputs disturb the backend less
        return Found(start, difference, excused=True)

    def _candidates(self, current: str, above: Collection[str], marks: int) -> list[str]:
        """What to measure next: spread over what is open, or else the producers still unknown."""
        settled: set[str] = set()
        for name in self.known:
            if name in above and name not in settled:
                settled |= {name} | self.graph.ancestors(name)
        left = [n for n in self._in_order(above) if n not in settled]
        if not left:
            left = [n for n in self._in_order(self.graph.producers(current)) if n not in self.known]
        if len(left) <= marks:
            return left
        return [left[(2 * index + 1) * len(left) // (2 * marks)] for index in range(marks)]

    def _bad(self, name: str) -> bool:
        return self.known[name].exceeds(self._tolerance) and not self._excused(name)

    def _excused(self, name: str) -> bool:
        """Whether an error beyond the tolerance is only that of operands, made large by a sum.

        That is so where the operands cancel, and where a tensor inherits the error of one that is
        excused.
        """
        difference = self.known[name]
        if not difference.exceeds(self._tolerance):
            return False
        if difference.cancels(self._tolerance):
            return True
        return any(
            difference.relative_l2 <= _INHERITED * self.known[producer].relative_l2
            for producer in self.graph.producers(name)
            if producer in self.known and self._excused(producer)
        )

    def _in_order(self, names: Iterable[str]) -> list[str]:
        return sorted(names, key=self._order.__getitem__)
