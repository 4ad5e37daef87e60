"""`python -m benchmarks.attack`: attacks a server of the mini model; what others felt."""

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import click

from benchmarks.attack.attacks import ATTACKS
from benchmarks.attack.run import Arena, Round, rounds_of
from fastface_trt.measure.machine import describe_machine, load_average
from fastface_trt.measure.tables import Table, print_table, text_console

RESULTS = Path(__file__).parents[1] / "results" / "attack.json"
OPTIONS = ("--max-faces", "40")
"""Beside a key file all that is not as `serve` has it: a registry that can be filled in seconds."""


def table_of(rounds: list[Round]) -> Table:
    """Attack by attack what others felt of it."""
    return Table(
        "one client attacks, another makes pictures",
        ("attack", "gap s", "honest p99 s", "without", "memory MB", "peak", "after", "verdict"),
        tuple(
            (
                one.attack,
                f"{one.gap:.2f}",
                f"{one.honest_p99:.2f}",
                f"{one.honest_p99_without:.2f}",
                f"{one.memory_before / 1e6:.0f}",
                f"{one.memory_peak / 1e6:.0f}",
                f"{one.memory_after / 1e6:.0f}",
                one.verdict,
            )
            for one in rounds
        ),
    )


@click.command()
@click.option("--only", default="", help="Attacks whose name or point holds this text.")
@click.option("--rounds", default=3, show_default=True, help="Of an attack that ends badly.")
@click.option("--seconds", type=float, help="Of each attack [its own].")
@click.option("--minutes", default=10.0, show_default=True, help="For all of them.")
@click.option("--out", default=RESULTS, show_default=True, type=click.Path(path_type=Path))
def main(only: str, rounds: int, seconds: float | None, minutes: float, out: Path) -> None:
    """Attack a server of the mini model on this machine's loopback."""
    begun, busy, results = time.monotonic(), load_average(), []
    chosen = [one for one in ATTACKS if only in f"{one.point} {one.name}"]
    left = []
    with Arena(OPTIONS) as arena:
        for attack in chosen:
            if time.monotonic() - begun > 60 * minutes:
                left.append(attack.name)
                continue
            arena.wait_quietly(1.0)
            result = rounds_of(arena, attack, rounds, seconds)
            results.append(result)
            click.echo(
                f"{result.point}: {result.attack}: {result.verdict} "
                f"{'; '.join(result.problems)} {result.answers}",
                err=True,
            )
    facts = {
        "what": "one client attacks, another makes pictures, and a prober asks whether it lives",
        "machine": describe_machine(),
        "load_average_before": busy,
        "seconds": time.monotonic() - begun,
        "attacks": [{**asdict(one), "verdict": one.verdict} for one in results],
        "not_run": left,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(facts, indent=1) + "\n")
    print_table(text_console(), table_of(results))
    sys.exit(bool(left) or any(one.problems for one in results))


if __name__ == "__main__":
    main()
