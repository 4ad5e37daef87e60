"""`export-triton`: a model repository for NVIDIA's Triton Inference Server."""

from pathlib import Path
from typing import Any

import click

from fastface_trt.cli.common import (
    FOLDER,
    Counts,
    backend_options,
    console,
    licence_option,
    timed_lines,
)


@click.command("export-triton")
@click.argument("out", type=FOLDER)
@backend_options
@licence_option
@click.option("--build", is_flag=True, help="Build engines that the cache lacks.")
@click.option("--replace", is_flag=True, help="Replace an earlier repository at OUT.")
@click.option(
    "--max-batch",
    type=click.IntRange(min=1),
    help="Pictures that Triton may hand over together [what the engines were built for].",
)
@click.option("--max-queue", type=click.IntRange(min=1), default=64, show_default=True)
@click.option(
    "--queue-delay",
    type=click.FloatRange(min=0),
    default=0.002,
    show_default=True,
    help="Seconds that Triton waits for more requests to hand over together.",
)
@click.option(
    "--queue-timeout",
    type=click.FloatRange(min=0),
    default=60.0,
    show_default=True,
    help="Seconds after which a request that still waits is refused; 0 for never.",
)
@click.option("--gpus", type=Counts(), default=(), help="GPUs to use, such as 0,1 [all].")
@click.option(
    "--instances",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Processes for each GPU, or on the CPU.",
)
@click.option(
    "--max-running",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Pictures between their first step and their end, in each process.",
)
@click.option("--decoupled", is_flag=True, help="Answer after every step, too; gRPC streams only.")
@click.option("--schedule-of", help="Sampler and steps of another checkpoint.")
@click.option("--execution-env", help="Triton's EXECUTION_ENV_PATH: a packed Python environment.")
def export_triton(
    out: Path,
    export_folder: str,
    backend: str,
    cache: Path | None,
    threads: int | None,
    accept_licence: bool,
    build: bool,
    replace: bool,
    max_running: int,
    schedule_of: str | None,
    **given: Any,
) -> None:
    """Write a Triton model repository to OUT: config, model file, export and engines.

    The engines must be in the cache already, unless --build is given. Not run in a real Triton
    server so far.
    """
    from fastface_trt.serving.settings import WorkerSettings
    from fastface_trt.serving.triton.repository import RepositoryOptions, write_repository

    worker = WorkerSettings(
        export=export_folder,
        backend=backend,
        cache=cache,
        threads=threads,
        licence_acknowledged=accept_licence,
        schedule_of=schedule_of,
        max_running=max_running,
    )
    line = timed_lines(console())
    write_repository(out, worker, RepositoryOptions(**given), line, build=build, replace=replace)
    click.echo(str(out))
