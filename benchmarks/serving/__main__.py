"""One by one, static batches, continuous batching: simulated over load, and on the mini model.

Writes serving.json, serving-simulation.png and serving-mini.png into benchmarks/results.
"""

import json
from pathlib import Path

import click

from benchmarks.serving.machine import assumed_accelerator, measured_machine
from benchmarks.serving.measured import Result, compare, make_works
from benchmarks.serving.plots import measured_plot, simulation_plot
from benchmarks.serving.servers import Limits
from benchmarks.serving.simulation import Point, report, simulate
from fastface_trt import FastFace
from fastface_trt.errors import FastFaceError
from fastface_trt.measure.machine import BUSY, describe_machine, load_average
from fastface_trt.measure.style import require_matplotlib, save
from fastface_trt.measure.tables import Table, print_table, text_console

RESULTS = Path(__file__).parents[1] / "results"


def points_table(title: str, points: list[Point]) -> Table:
    """The simulation as a table."""
    return Table(
        title,
        ("server", "load", "pictures/s", "p50 s", "p99 s", "rows", "fill", "refused"),
        tuple(
            (
                point.server,
                f"{point.load:g}",
                f"{point.throughput:.2f}",
                f"{point.p50:.2f}",
                f"{point.p99:.2f}",
                f"{point.rows:.1f}",
                f"{point.fill:.0%}",
                f"{point.refused:.0%}",
            )
            for point in points
        ),
    )


def measured_table(results: list[Result]) -> Table:
    """The ways on the mini model as a table."""
    return Table(
        "mini model, times the throughput of one by one",
        ("requests", "way", "median (95 % interval)", "simulated"),
        tuple(
            (result.work, name, str(ratio), f"{result.predicted[name]:.2f}")
            for result in results
            for name, ratio in result.speed.items()
        ),
        words=2,
    )


@click.command(help=__doc__)
@click.option("--rounds", default=9, show_default=True, type=click.IntRange(min=2))
@click.option("--requests", default=24, show_default=True, type=click.IntRange(min=1))
@click.option("--simulated", default=4000, show_default=True, type=click.IntRange(min=10))
@click.option("--running", default=8, show_default=True, type=click.IntRange(min=1))
@click.option("--out", default=RESULTS, type=click.Path(path_type=Path, file_okay=False))
def main(rounds: int, requests: int, simulated: int, running: int, out: Path) -> None:
    """Measure the machine, simulate it and an assumed one, and measure the three ways."""
    console, limits, busy = text_console(), Limits(max_running=running), load_average()
    try:
        require_matplotlib()
        with FastFace.load("mini") as fastface:
            fastface.warm_up()
            own = measured_machine(fastface, rounds, running)
            works = make_works(fastface, requests)
            results = [compare(fastface, work, own, limits, rounds) for work in works]
    except FastFaceError as error:
        raise click.ClickException(str(error)) from None
    machines = {machine.name: machine for machine in (own, assumed_accelerator())}
    points = {name: simulate(machine, simulated, limits) for name, machine in machines.items()}
    for name, rows in points.items():
        print_table(console, points_table(name, rows))
    print_table(console, measured_table(results))
    facts = {
        "what": "one by one, static batches and continuous batching of the same requests",
        "machine": describe_machine(),
        "load_average_before": busy,
        "measured": [result.to_dict() for result in results],
        "simulated": [report(machines[name], points[name], limits) for name in machines],
    }
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(facts, indent=2, ensure_ascii=False)
    (out / "serving.json").write_text(text + "\n", encoding="utf-8")
    described = describe_machine()
    subtitle = f"96×96 pixels, 4 steps; {described['processor']}, {described['cores']} cores"
    if (busy or 0) > BUSY:
        warning = f"other programs ran beside this (load {busy}): measure on a quiet machine"
        console.print(warning)
        subtitle += f"; {warning}"
    save(measured_plot(results, subtitle), out / "serving-mini.png")
    both = {name: (machines[name], points[name]) for name in machines}
    save(simulation_plot(both), out / "serving-simulation.png")


if __name__ == "__main__":
    main()
