"""An honest client beside a greedy one: latency and throughput, simulated and on a real server.

Everybody is a closed loop: a connection asks, waits for its picture, pauses, and asks again. The
simulation plays the batcher's own policy and turns in simulated time; with `fair=False` all are one
owner, which is first come, first served. `python -m benchmarks.serving.fairness` prints both
machines and measures the mini model behind HTTP, with two keys.
"""

import asyncio
import json
import tempfile
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from heapq import heappop, heappush
from math import inf
from pathlib import Path
from time import perf_counter
from typing import Any

import click
import numpy as np

from benchmarks.load.client import Address, ask
from benchmarks.load.run import GENERATE, register_face
from benchmarks.load.server import serve
from benchmarks.serving.machine import Machine, assumed_accelerator, measured_machine
from benchmarks.serving.servers import Limits
from benchmarks.serving.simulation import plans
from fastface_trt import FastFace
from fastface_trt.measure.machine import describe_machine
from fastface_trt.measure.statistics import percentile
from fastface_trt.measure.tables import Table, print_table, text_console
from fastface_trt.serving.batching.cost import Remaining
from fastface_trt.serving.batching.fairness import Turns, too_many
from fastface_trt.serving.batching.policy import Candidate, Policy

RESULTS = Path(__file__).parents[1] / "results" / "fairness.json"
GUIDED = ("am1+dcg",)
RETRY = 0.5
"""Seconds after which who was refused asks again."""


@dataclass(frozen=True)
class Client:
    """An owner with so many connections, which pause for so many seconds on average.

    `rows` are those of a picture's steps, `area` its size over an ordinary one's.
    """

    owner: str
    connections: int = 1
    pause: float = 0.0
    rows: tuple[int, ...] = plans(GUIDED)[0]
    area: int = 1


@dataclass
class Served:
    """Latencies of pictures and refusals by owner, and how long it all took."""

    latencies: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    refused: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    rows: float = 0.0

    def p99(self, owner: str) -> float:
        """Of an owner's latencies, in seconds; infinite where it got no picture."""
        return self.percentile(owner, 99)

    def percentile(self, owner: str, percent: float) -> float:
        """Likewise."""
        return percentile(self.latencies[owner], percent) if self.latencies[owner] else inf


@dataclass
class _Task:
    order: int
    client: Client
    asked: float
    step: int = 0
    passed_over: int = 0

    @property
    def finished(self) -> bool:
        return self.step == len(self.client.rows)

    def candidate(self, owner: str) -> Candidate:
        rows = self.client.rows[self.step]
        left = len(self.client.rows) - self.step
        sharing = rows, self.client.area
        return Candidate(
            self.order,
            sharing,
            rows,
            self.client.area,
            self.step > 0,
            left,
            self.passed_over,
            owner=owner,
        )


def play(
    clients: Sequence[Client],
    machine: Machine,
    limits: Limits,
    *,
    seconds: float,
    fair: bool = True,
    seed: int = 0,
) -> Served:
    """Serve closed loops for so many simulated seconds."""
    generator, served = np.random.default_rng(seed), Served()
    cost = machine.cost_model()
    policy = Policy(
        limits.max_running,
        limits.max_passed_over,
        max_rows=limits.max_rows,
        max_area=limits.max_rows,
        call_seconds=cost.call_seconds,
    )
    turns = Turns(cost.seconds_alone(Remaining(plans(GUIDED)[0], 1)))
    coming: list[tuple[float, int, Client]] = []
    tasks: list[_Task] = []
    number, now = 0, 0.0

    def come(client: Client, at: float) -> None:
        nonlocal number
        number += 1
        heappush(coming, (at, number, client))

    def owner_of(task: _Task) -> str:
        return task.client.owner if fair else ""

    for client in clients:
        for _ in range(client.connections):
            come(client, float(generator.exponential(client.pause or 1e-3)))
    while now < seconds:
        while coming and coming[0][0] <= now:
            at, order, client = heappop(coming)
            new = _Task(order, client, at)
            waiting = [one for one in tasks if not one.step]
            held = Counter(map(owner_of, waiting))
            if too_many(owner_of(new), held, limits.max_waiting, "wait"):
                served.refused[client.owner] += 1
                come(client, now + RETRY)
                continue
            tasks.append(new)
        if not tasks:
            now = coming[0][0]
            continue
        claims = turns.claims({owner_of(one) for one in tasks}, now)
        done = min(
            (one for one in tasks if one.finished),
            key=lambda one: (claims[owner_of(one)], one.order),
            default=None,
        )
        choice = policy.choose(
            [one.candidate(owner_of(one)) for one in tasks if not one.finished], claims
        )
        if done is not None and not (
            choice.go and claims[choice.go[0].owner] < claims[owner_of(done)]
        ):
            spent = cost.decoding_seconds(done.client.area)
            now += spent
            turns.charge(owner_of(done), spent)
            served.latencies[done.client.owner].append(now - done.asked)
            tasks.remove(done)
            come(done.client, now + float(generator.exponential(done.client.pause or 1e-9)))
            continue
        by_order = {one.order: one for one in tasks}
        for one in choice.passed_over:
            by_order[one.order].passed_over += 1
        going = [by_order[one.order] for one in choice.go]
        for task in going:
            if not task.step:
                now += machine.preparation
                turns.charge(owner_of(task), machine.preparation)
        rows = sum(one.rows for one in choice.go)
        spent = cost.call_seconds(choice.go[0].area, rows)
        now += spent
        served.rows += rows * choice.go[0].area
        for task, one in zip(going, choice.go, strict=True):
            turns.charge(owner_of(task), spent * one.rows / rows)
            task.step, task.passed_over = task.step + 1, 0
    served.seconds = now
    return served


def scenarios(machine: Machine) -> dict[str, list[Client]]:
    """Honest and greedy clients; pauses are over the seconds of a picture by itself."""
    alone = machine.cost_model().seconds_alone(Remaining(plans(GUIDED)[0], 1))
    now_and_then = Client("honest", pause=3 * alone)
    return {
        "now and then": [now_and_then],
        "all the time": [Client("honest")],
        "greedy alone": [Client("greedy", 30)],
        "now and then, beside 30 connections": [now_and_then, Client("greedy", 30)],
        "now and then, beside 300 connections": [now_and_then, Client("greedy", 300)],
        "now and then, beside 30 of four times the size": [
            now_and_then,
            Client("greedy", 30, area=4),
        ],
        "all the time, beside 30 connections": [Client("honest"), Client("greedy", 30)],
        "eight owners of four connections": [Client(str(n), 4) for n in range(8)],
    }


def simulated(machine: Machine, limits: Limits, seconds: float) -> Table:
    """Every scenario, in turns and first come, first served."""
    rows = []
    for name, clients in scenarios(machine).items():
        cells = [name]
        for fair in (True, False):
            served = play(clients, machine, limits, seconds=seconds, fair=fair)
            owner = clients[0].owner
            cells += [f"{served.p99(owner):.2f}", f"{served.rows / served.seconds:.1f}"]
        rows.append(tuple(cells))
    return Table(
        machine.name,
        ("first client", "p99 s", "rows/s", "p99 s as one queue", "rows/s as one queue"),
        tuple(rows),
    )


# The mini model behind HTTP.

KEYS = {"honest": "honest-0123456789", "greedy": "greedy-0123456789"}


@dataclass(frozen=True)
class Measured:
    """One phase on the real server; pixels are those of all pictures' UNet rows, in millions.

    refused: what the honest client asked for in vain.
    """

    phase: str
    honest_p50: float
    honest_p99: float
    greedy_p50: float
    honest_pictures: int
    megapixel_rows_per_second: float
    refused: int


async def _loop(
    address: Address,
    client: Client,
    face: str,
    size: str,
    over: asyncio.Event,
    said: Served,
    seed: int,
) -> None:
    key, generator = KEYS[client.owner], np.random.default_rng(seed)
    fields: dict[str, Any] = {
        "prompt": "photo; person in a garden",
        "preset": GUIDED[0],
        "size": size,
    }
    pixels = np.prod([int(side) for side in size.split("x")]) / 1e6
    while not over.is_set():
        body = {**fields, "face_id": face, "seed": int(generator.integers(2**31))}
        answer = await ask(address, "POST", GENERATE, body, key=key)
        if answer.status == 200:
            said.latencies[client.owner].append(answer.seconds)
            said.rows += sum(client.rows) * float(pixels)
        elif answer.status in (429, 504):
            said.refused[client.owner] += 1
            await asyncio.sleep(RETRY)
        else:
            raise RuntimeError(f"{answer.status}: {answer.body[:500]!r}")
        if client.pause:
            await asyncio.sleep(float(generator.exponential(client.pause)))


async def _phase(
    address: Address, name: str, clients: Mapping[Client, str], pictures: int, seconds: float
) -> Measured:
    """Until the first client has so many pictures, or where it is greedy, for so many seconds."""
    said, over = Served(), asyncio.Event()
    faces = {one.owner: await register_face(address, KEYS[one.owner]) for one in clients}
    loops = [
        asyncio.create_task(_loop(address, client, faces[client.owner], size, over, said, seed))
        for client, size in clients.items()
        for seed in range(client.connections)
    ]
    started = perf_counter()
    while perf_counter() - started < seconds or (
        any(one.owner == "honest" for one in clients) and len(said.latencies["honest"]) < pictures
    ):
        await asyncio.sleep(0.1)
        for loop in loops:
            if loop.done():
                loop.result()
    rate = said.rows / (perf_counter() - started)
    over.set()
    await asyncio.gather(*loops)
    return Measured(
        name,
        said.percentile("honest", 50),
        said.p99("honest"),
        said.percentile("greedy", 50),
        len(said.latencies["honest"]),
        rate,
        said.refused["honest"],
    )


def measured(pictures: int, seconds: float, connections: int) -> list[Measured]:
    """The honest client alone, the greedy one alone, and both, on the mini model."""
    honest = Client("honest", pause=1.0)
    greedy = Client("greedy", connections)
    phases: dict[str, dict[Client, str]] = {
        "honest alone": {honest: "96x96"},
        "greedy alone": {greedy: "96x96"},
        "both": {honest: "96x96", greedy: "96x96"},
        "both, greedy with four times the size": {honest: "96x96", greedy: "192x192"},
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "keys"
        file.write_text("\n".join(KEYS.values()))
        with serve("--api-keys-file", str(file)) as server:
            address = server.wait_until_ready()
            results = [
                asyncio.run(_phase(address, name, clients, pictures, seconds))
                for name, clients in phases.items()
            ]
            if server.stop() != 0:
                raise RuntimeError("the server failed:\n" + "".join(server.log))
    return results


def measured_table(results: Sequence[Measured]) -> Table:
    """The phases as a table."""
    return Table(
        "mini model behind HTTP",
        (
            "phase",
            "honest p50 s",
            "honest p99 s",
            "greedy p50 s",
            "pictures",
            "refused",
            "Mpixel rows/s",
        ),
        tuple(
            (
                one.phase,
                f"{one.honest_p50:.2f}",
                f"{one.honest_p99:.2f}",
                f"{one.greedy_p50:.2f}",
                f"{one.honest_pictures}",
                f"{one.refused}",
                f"{one.megapixel_rows_per_second:.2f}",
            )
            for one in results
        ),
    )


@click.command(help=__doc__)
@click.option("--pictures", default=100, show_default=True, help="Of the honest client.")
@click.option("--seconds", default=20.0, show_default=True, help="Of each phase at least.")
@click.option("--connections", default=30, show_default=True, help="Of the greedy client.")
@click.option("--out", default=RESULTS, show_default=True, type=click.Path(path_type=Path))
def main(pictures: int, seconds: float, connections: int, out: Path) -> None:
    """Measure this machine, simulate it and an assumed one, and measure the real server."""
    console, limits = text_console(), Limits()
    with FastFace.load("mini") as fastface:
        fastface.warm_up()
        own = measured_machine(fastface, 5, limits.max_running)
    tables = [simulated(machine, limits, 60.0) for machine in (own, assumed_accelerator())]
    results = measured(pictures, seconds, connections)
    for table in (*tables, measured_table(results)):
        print_table(console, table)
    facts = {
        "what": main.help,
        "machine": describe_machine(),
        "simulated": [
            {"machine": one.title, "columns": one.headings, "rows": one.rows} for one in tables
        ],
        "measured": [asdict(one) for one in results],
    }
    out.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
