"""The options of `serve` for Ray Serve, and what they mean."""

from collections.abc import Mapping
from typing import Any

import click

from fastface_trt.cli.common import Command
from fastface_trt.serving.settings import ServerSettings, WorkerSettings

_COUNT = click.IntRange(min=1)
_SHARE = click.FloatRange(min=0)


def ray_options(command: Command) -> Command:
    """`--ray` and what goes with it."""
    for option in (
        click.option("--replica-cpus", type=_SHARE, help="With --ray: CPUs of each replica [1]."),
        click.option("--replica-gpus", type=_SHARE, help="With --ray: GPUs of each replica [0]."),
        click.option(
            "--max-replicas", type=_COUNT, help="With --ray: scale up to so many [--workers]."
        ),
        click.option(
            "--ray-address",
            metavar="ADDRESS",
            help="With --ray: deploy to this cluster, or update what it serves, and return.",
        ),
        click.option(
            "--ray", "on_ray", is_flag=True, help="Replicas behind Ray Serve; --workers of them."
        ),
    ):
        command = option(command)
    return command


def serve_on_ray(
    worker: WorkerSettings, server: ServerSettings, workers: int | None, given: Mapping[str, Any]
) -> None:
    """See `run_on_ray`; `given` holds the values of `ray_options`."""
    from fastface_trt.serving.ray.arguments import Placement
    from fastface_trt.serving.ray.run import run_on_ray

    names = {
        "min_replicas": workers,
        "max_replicas": given["max_replicas"],
        "num_gpus": given["replica_gpus"],
        "num_cpus": given["replica_cpus"],
    }
    placement = Placement.model_validate({n: v for n, v in names.items() if v is not None})
    run_on_ray(worker, server, placement, address=given["ray_address"], say=click.echo)
