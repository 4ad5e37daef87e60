"""`python -m benchmarks.attack`: attacks a server of the mini model; what others felt."""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click

from benchmarks.attack.answers import Checked, check_answers
from benchmarks.attack.attacker import Me
from benchmarks.attack.attacks import ATTACKS
from benchmarks.attack.processes import PROCESSES, check_process
from benchmarks.attack.run import ATTACKERS_KEY, Arena, Round, rounds_of
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


def checks_table(checks: Sequence[Checked]) -> Table:
    """The single requests, files and processes: what came of each."""
    rows = tuple((one.name, one.measured[:60], "bad" if one.problem else "good") for one in checks)
    return Table("single requests, files and processes", ("what", "seen", "verdict"), rows, 3)


@click.command()
@click.option("--only", default="", help="Attacks whose name or point holds this text.")
@click.option("--rounds", default=3, show_default=True, help="Of an attack that ends badly.")
@click.option("--seconds", type=float, help="Of each attack [its own].")
@click.option("--minutes", default=10.0, show_default=True, help="For all of them.")
@click.option("--out", default=RESULTS, show_default=True, type=click.Path(path_type=Path))
def main(only: str, rounds: int, seconds: float | None, minutes: float, out: Path) -> None:
    """Attack a server of the mini model on this machine's loopback."""
    begun, busy = time.monotonic(), load_average()
    results: list[Round] = []
    checks: list[Checked] = []
    left: list[str] = []

    def is_time_for(point: str, name: str) -> bool:
        if only not in f"{point} {name}":
            return False
        if time.monotonic() - begun > 60 * minutes:
            left.append(name)
            return False
        return True

    with Arena(OPTIONS) as arena:
        address = arena.server.address
        checks += check_answers(address, Me(ATTACKERS_KEY, arena.face), only)
        for attack in ATTACKS:
            if is_time_for(attack.point, attack.name):
                arena.wait_quietly(1.0)
                results.append(rounds_of(arena, attack, rounds, seconds))
                click.echo(_line(results[-1], "; ".join(results[-1].problems)), err=True)
    for name, point, check in PROCESSES:
        if is_time_for(point, name):
            checks.append(check_process(name, point, check))
            click.echo(_line(checks[-1], checks[-1].problem), err=True)
    facts = {
        "what": "one client attacks, another makes pictures, and a prober asks whether it lives",
        "machine": describe_machine(),
        "load_average_before": busy,
        "seconds": time.monotonic() - begun,
        "attacks": [{**asdict(one), "verdict": one.verdict} for one in results],
        "checks": [asdict(one) for one in checks],
        "not_run": left,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(facts, indent=1) + "\n")
    for table in (table_of(results), checks_table(checks)):
        print_table(text_console(), table)
    sys.exit(bool(left or any(o.problems for o in results) or any(o.problem for o in checks)))


def _line(one: Round | Checked, problem: str) -> str:
    name = one.attack if isinstance(one, Round) else one.name
    return f"{one.point}: {name}: {problem or 'good'}"


if __name__ == "__main__":
    main()
