"""Attacks of each kind, in short: the honest client beside them is served, and the server lives on.

`python -m benchmarks.attack` runs all of them for longer, and holds them to times and memory.
"""

import pytest

from benchmarks.attack.answers import check_answers
from benchmarks.attack.attacker import Me
from benchmarks.attack.attacks import ATTACKS
from benchmarks.attack.processes import PROCESSES, check_process
from benchmarks.attack.run import ATTACKERS_KEY, Arena

pytestmark = pytest.mark.serving
SECONDS = 1.0
MOST_GAP = 5.0
"""Seconds without an answer to a probe: generous, for tests share the machine with others."""
QUICK = (
    "list of objects",
    "unknown keys",
    "small bodies of unknown keys",
    "depth of lists",
    "a picture that is none",
    "form of small fields",
    "form with a list of objects",
    "2048 x 2048",
    "deadlines that cannot be kept",
    "thirty connections",
    "faces without end",
    "asked and gone",
    "idle streams",
    "headers without a body",
    "bodies but for their last byte",
    "bodies byte by byte",
    "a JPEG of 2,000 scans",
    "15,000 headers, no key",
    "one-byte chunks",
    "requests in a row",
)
ENDS = ("SIGKILL in the midst of work", "workers that die of pictures")


@pytest.fixture(scope="module")
def arena():
    with Arena(("--max-faces", "40"), warm_up=1.0) as arena:
        yield arena


def named(name):
    return next(one for one in ATTACKS if one.name == name)


@pytest.mark.parametrize("name", QUICK)
def test_the_honest_client_is_served_and_the_server_lives(arena, name):
    result = arena.attack(named(name), SECONDS, memory_patience=2.0)
    assert result.gap <= MOST_GAP + result.witness_gap
    assert result.honest_requests
    ends = ("not everybody was served", "the server left", "honest requests ended")
    assert not [problem for problem in result.problems if problem.startswith(ends)]


def test_what_is_wrong_is_refused_by_its_answer_or_the_connections_end(arena):
    checks = check_answers(arena.server.address, Me(ATTACKERS_KEY, arena.face))
    assert {one.name: one.problem for one in checks if one.problem} == {}


@pytest.mark.parametrize(
    ("name", "point", "check"), [one for one in PROCESSES if one[0] in ENDS], ids=ENDS
)
def test_nobody_suffers_of_the_end_of_a_process(name, point, check):
    assert check_process(name, point, check).problem == ""
