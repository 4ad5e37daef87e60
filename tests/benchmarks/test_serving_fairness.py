"""An honest client beside a greedy one: simulated over costs by hand, and once on a real server."""

from dataclasses import replace

import pytest

from benchmarks.serving.fairness import Client, measured, play
from benchmarks.serving.machine import Machine
from benchmarks.serving.servers import Limits

CPU = Machine(
    "as a small CPU", "by hand", {1: 0.01, 3: 0.025, 6: 0.047, 24: 0.175}, 0.02, preparation=0.01
)
GPU = replace(CPU, name="as a small GPU", calls={1: 0.06, 24: 0.52}, decoding=0.06)
MACHINES = pytest.mark.parametrize("machine", [CPU, GPU], ids=lambda one: one.name)
LIMITS, SECONDS = Limits(), 60
GREEDY = Client("greedy", 30)


def honest(machine, pause):
    return Client("honest", pause=pause * play([Client("a")], machine, LIMITS, seconds=1).p99("a"))


@MACHINES
@pytest.mark.parametrize("connections", [30, 300])
def test_a_client_hardly_notices_who_asks_all_the_time(machine, connections):
    one = honest(machine, 3.0)
    alone = play([one], machine, LIMITS, seconds=SECONDS)
    beside = play([one, replace(GREEDY, connections=connections)], machine, LIMITS, seconds=SECONDS)
    assert beside.p99("honest") <= 2 * alone.p99("honest")
    assert beside.refused["honest"] == 0
    # As one queue it would wait for everybody, or be refused.
    queue = play([one, GREEDY], machine, LIMITS, seconds=SECONDS, fair=False)
    assert queue.p99("honest") > 10 * alone.p99("honest")


@MACHINES
def test_nor_who_asks_for_pictures_of_four_times_the_size(machine):
    one = honest(machine, 3.0)
    alone = play([one], machine, LIMITS, seconds=SECONDS)
    beside = play([one, replace(GREEDY, area=4)], machine, LIMITS, seconds=SECONDS)
    # It waits for one step of one of them, since no call can be interrupted.
    step = machine.cost_model().call_seconds(4, 3)
    assert beside.p99("honest") <= 1.6 * alone.p99("honest") + step


@MACHINES
def test_together_they_get_nearly_as_much_as_one_alone(machine):
    alone = play([GREEDY], machine, LIMITS, seconds=SECONDS)
    both = play([honest(machine, 3.0), GREEDY], machine, LIMITS, seconds=SECONDS)
    assert both.rows / both.seconds >= 0.84 * alone.rows / alone.seconds
    # And one owner alone as much as without owners: its calls are full.
    queue = play([GREEDY], machine, LIMITS, seconds=SECONDS, fair=False)
    assert alone.rows / alone.seconds == pytest.approx(queue.rows / queue.seconds)


@MACHINES
def test_clients_who_ask_all_the_time_have_equal_parts(machine):
    clients = [Client("a", 2), Client("b", 30), Client("c", 30, area=4)]
    served = play(clients, machine, LIMITS, seconds=4 * SECONDS)
    pixels = {one.owner: one.area * len(served.latencies[one.owner]) for one in clients}
    assert max(pixels.values()) <= 1.5 * min(pixels.values()), pixels


@pytest.mark.serving
def test_a_key_is_served_beside_another_that_has_many_connections():
    """Compared with the other key's own waits at the same time, so that no speed is assumed."""
    for phase in measured(pictures=10, seconds=3, connections=16)[2:]:
        assert phase.refused == 0
        assert phase.honest_pictures >= 10
        assert phase.honest_p50 <= phase.greedy_p50 / 3, phase
