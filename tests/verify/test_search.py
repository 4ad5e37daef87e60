"""The search by itself, on graphs that are made up."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastface_trt.verify.difference import Difference
from fastface_trt.verify.search import Search

TOLERANCE = 1e-3


def difference(relative, scale=1.0):
    return Difference(relative, relative, relative, scale)


class Graph:
    """Tensors t0, t1, … with the producers given by number."""

    def __init__(self, producers):
        self.names = tuple(f"t{i}" for i in range(len(producers)))
        self._above = [frozenset(f"t{p}" for p in some) for some in producers]
        self._all = []
        for direct in self._above:
            self._all.append(direct.union(*(self._all[int(one[1:])] for one in direct)))

    def producers(self, name):
        return self._above[int(name[1:])]

    def ancestors(self, name):
        return self._all[int(name[1:])]


class Evaluation:
    """Errors that start at `wrong` and reach everything computed from it."""

    def __init__(self, graph, wrong, size=0.1):
        self.graph, self.wrong, self.size = graph, wrong, size
        self.asked = []

    def __call__(self, names):
        self.asked.append(list(names))
        return {name: difference(self.error(name)) for name in names}

    def error(self, name):
        reached = name == self.wrong or self.wrong in self.graph.ancestors(name)
        return self.size if reached else 1e-6


@st.composite
def graphs(draw):
    size = draw(st.integers(1, 60))
    return Graph([draw(st.sets(st.integers(0, i - 1), max_size=3)) if i else set()
                  for i in range(size)])  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(graphs(), st.data(), st.integers(1, 8))
def test_finds_the_only_tensor_that_is_wrong(graph, data, marks):
    last = graph.names[-1]
    wrong = data.draw(st.sampled_from(sorted({last} | graph.ancestors(last))))
    evaluate = Evaluation(graph, wrong)
    found = Search(graph, evaluate, TOLERANCE, marks=marks).run(last, difference(0.1))
    assert found.name == wrong
    assert not found.excused
    assert found.vanished == ()
    assert found.producers.keys() == graph.producers(wrong)
    assert all(len(names) <= marks + 1 for names in evaluate.asked)


@pytest.mark.parametrize("marks", [1, 4, 16])
def test_a_chain_takes_a_logarithm_of_builds(marks):
    graph = Graph([{i - 1} if i else set() for i in range(1000)])
    for wrong in ("t0", "t1", "t499", "t998", "t999"):
        evaluate = Evaluation(graph, wrong)
        search = Search(graph, evaluate, TOLERANCE, marks=marks)
        assert search.run("t999", difference(0.1)).name == wrong
        assert search.builds <= math.ceil(math.log(1000, marks + 1)) + 1


def test_of_two_wrong_tensors_the_first_is_named():
    graph = Graph([{i - 1} if i else set() for i in range(50)])
    early, late = Evaluation(graph, "t10"), Evaluation(graph, "t40")

    def evaluate(names):
        return {n: difference(max(early.error(n), late.error(n))) for n in names}

    assert Search(graph, evaluate, TOLERANCE, marks=3).run("t49", difference(0.1)).name == "t10"


def test_a_difference_that_a_mark_removes_is_a_fusion():
    graph = Graph([{i - 1} if i else set() for i in range(20)])

    def evaluate(names):
        fused = not {"t11", "t12"} & set(names)
        return {n: difference(0.1 if fused and int(n[1:]) > 12 else 0.0) for n in names}

    search = Search(graph, evaluate, TOLERANCE, marks=19)
    found = search.run("t19", difference(0.1))
    # Either a mark that removes it, or the place behind the fusion that no mark disturbed.
    assert found.vanished in {("t11",), ("t12",)} or found.name == "t13"
    assert found.difference.relative_l2 == 0.1


def test_rounding_that_a_cancelling_sum_enlarges_is_no_fault():
    """t1 cancels and t2 inherits it; the fault is at t3, whose other operand is clean."""
    graph = Graph([set(), {0}, {1}, {0}, {2, 3}])
    errors = {
        "t0": difference(1e-6),
        "t1": Difference(1e-5, 0.02, 1e-5, 1.0),  # large beside itself, small beside t0
        "t2": difference(0.03),
        "t3": difference(0.5),
        "t4": difference(0.4),
    }

    def evaluate(names):
        return {name: errors[name] for name in names}

    assert Search(graph, evaluate, TOLERANCE, marks=9).run("t4", errors["t4"]).name == "t3"
    errors["t3"] = difference(1e-6)
    errors["t4"] = difference(0.05)
    found = Search(graph, evaluate, TOLERANCE, marks=9).run("t4", errors["t4"])
    assert found.excused


def test_not_finite_is_beyond_every_tolerance():
    graph = Graph([set(), {0}, {1}])
    evaluate = Evaluation(graph, "t1", size=math.inf)
    assert Search(graph, evaluate, TOLERANCE, marks=1).run("t2", difference(math.inf)).name == "t1"
