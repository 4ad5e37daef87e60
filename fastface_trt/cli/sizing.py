"""`bench sizing`: what machines would make, from what was measured."""

from pathlib import Path

import click

from fastface_trt.cli.common import FILE


@click.command("sizing")
@click.argument("reports", type=FILE, nargs=-1, required=True, metavar="bench.json …")
@click.option(
    "--utilisation",
    type=float,
    default=0.7,
    show_default=True,
    help="Share of the time that the machine is to work; waiting grows with ρ/(1-ρ).",
)
@click.option(
    "--fill",
    type=float,
    default=1.0,
    show_default=True,
    help="Share of a UNet call's rows that hold work.",
)
@click.option(
    "--fresh",
    type=float,
    default=1.0,
    show_default=True,
    help="Share of requests with a new face and prompt.",
)
@click.option("--price", type=float, help="What an hour of the machine costs, in any currency.")
def sizing(
    reports: tuple[Path, ...], utilisation: float, fill: float, fresh: float, price: float | None
) -> None:
    """Print pictures per second and hour by branch plan, as Markdown, from bench reports."""
    from fastface_trt.bench.compare import read_report
    from fastface_trt.serving.deploy.sizing import Operation, markdown

    operation = Operation(utilisation, fill, fresh, price)
    for text in [markdown(read_report(path), operation) for path in reports]:
        click.echo(text)
