"""Poisson arrivals at several loads, served three ways in simulated time."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from benchmarks.serving.machine import AREA, Machine
from benchmarks.serving.servers import SERVERS, Arrival, Limits, Outcome
from fastface_trt.runtime.request import GenerationRequest

PRESETS = ("plain", "am1+dcg", "am2+dcg", "dcg")
STEPS = 4
LOADS = (0.5, 0.8, 1.0, 1.25, 1.5, 2.0, 4.0)
"""Of what the machine can do one by one."""


@dataclass(frozen=True)
class Point:
    """One server at one load. Latencies are those of accepted requests, in seconds.

    throughput: pictures per second from the first arrival to the last picture. rows: mean of a UNet
    call; fill: the same over the most that a call may hold. refused: share of all requests.
    """

    server: str
    load: float
    requests: int
    throughput: float
    p50: float
    p99: float
    rows: float
    fill: float
    refused: float

    @classmethod
    def of(cls, server: str, load: float, outcome: Outcome, limits: Limits) -> "Point":
        """The numbers of an outcome."""
        latencies = list(outcome.latencies.values())
        requests, rows = len(latencies) + outcome.refused, float(np.mean(outcome.rows))
        return cls(
            server,
            load,
            requests,
            len(latencies) / outcome.end,
            float(np.percentile(latencies, 50)),
            float(np.percentile(latencies, 99)),
            rows,
            rows / limits.max_rows,
            outcome.refused / requests,
        )


def plans(presets: Sequence[str] = PRESETS) -> list[tuple[int, ...]]:
    """Rows per step of a request of each preset."""
    requests = [GenerationRequest("a", steps=STEPS).with_preset(name) for name in presets]
    return [tuple(len(s.branches) for s in request.guidance_steps()) for request in requests]


def capacity(machine: Machine) -> float:
    """Pictures per second of an even mix of the presets, one by one."""
    cost = machine.cost_model()
    seconds = [sum(cost.call_seconds(AREA, n) for n in rows) for rows in plans()]
    return 1 / (float(np.mean(seconds)) + machine.decoding + machine.preparation)


def poisson(rate: float, count: int, seed: int) -> list[Arrival]:
    """Arrivals with exponential gaps and presets drawn evenly."""
    generator = np.random.default_rng(seed)
    at = np.cumsum(generator.exponential(1 / rate, count))
    every = plans()
    drawn = generator.integers(len(every), size=count)
    return [Arrival(n, float(at[n]), every[drawn[n]]) for n in range(count)]


def simulate(machine: Machine, count: int, limits: Limits, seed: int = 0) -> list[Point]:
    """Every server at every load, over the same arrivals."""
    points = []
    for load in LOADS:
        arrivals = poisson(load * capacity(machine), count, seed)
        for name, server in SERVERS.items():
            points.append(Point.of(name, load, server(arrivals, machine, limits), limits))
    return points


def report(machine: Machine, points: Sequence[Point], limits: Limits) -> dict[str, Any]:
    """The simulation for a JSON file."""
    return {
        "machine": machine.name,
        "costs": machine.source,
        "call_seconds_by_rows": {str(rows): seconds for rows, seconds in machine.calls.items()},
        "decoding_seconds": machine.decoding,
        "preparation_seconds": machine.preparation,
        "pictures_per_second_one_by_one": capacity(machine),
        "presets": list(PRESETS),
        "limits": asdict(limits),
        "points": [asdict(point) for point in points],
    }
