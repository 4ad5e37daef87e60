"""`python -m benchmarks.load`: starts a server, overloads it, and writes what became of it all."""

import asyncio
import json
from dataclasses import asdict
from pathlib import Path

import click

from benchmarks.load.requests import pictures
from benchmarks.load.run import LoadReport, overload
from benchmarks.load.server import serve
from fastface_trt import FastFace
from fastface_trt.measure.machine import describe_machine

RESULTS = Path(__file__).parents[1] / "results" / "load-mini.json"


def run_load(
    requests: int, times_capacity: float, latency_budget: float, options: tuple[str, ...] = ()
) -> LoadReport:
    """Start `fastface-trt serve` with the mini model, overload it, and stop it."""
    with FastFace.load("mini") as fastface:
        made = pictures(fastface)
    budget = ("--latency-budget", str(latency_budget))
    # All of the load comes from one address here.
    with serve("--max-connections-per-address", "0", *budget, *options) as server:
        report = asyncio.run(
            overload(
                server.wait_until_ready(),
                made,
                requests=requests,
                times_capacity=times_capacity,
                latency_budget=latency_budget,
            )
        )
        status = server.stop()
    if status != 0:
        report.problems.append(f"the server left with status {status}")
    return report


@click.command()
@click.option("--requests", default=10_000, show_default=True)
@click.option("--times-capacity", default=4.0, show_default=True)
@click.option("--latency-budget", default=3.0, show_default=True, help="Seconds.")
@click.option("--out", default=RESULTS, show_default=True, type=click.Path(path_type=Path))
def main(requests: int, times_capacity: float, latency_budget: float, out: Path) -> None:
    """Overload a server of the mini model on this machine's loopback."""
    report = run_load(requests, times_capacity, latency_budget)
    result = {"machine": describe_machine(), **asdict(report)}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    click.echo(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
